// A program over the four functions of cpu/tiles.cpp, which stands before it: every tensor in a buffer of exactly its
// size, so that AddressSanitizer sees an access outside. Run by test_source.py.

#include <vector>

struct Shape {
    long long T, rows, length, gap;  // x and grad_spikes are `rows` rows, `gap` apart; they end where the last one does
    long long channels, inner;
};

template <class T> static std::vector<T> of(long long n, T value = T()) { return std::vector<T>(n, value); }

static void run(const Shape& s, bool all) {
    const STATE_T some = 0.7;
    const long long frame = s.rows * s.length, stride = s.length + s.gap, once = (s.rows - 1) * stride + s.length;
    const long long steps = (s.T - 1) * s.rows * stride + once;
    auto x = of<IO_T>(INJECT_FIRST ? once : steps), grad_x = of<IO_T>(INJECT_FIRST ? frame : s.T * frame);
    auto grad_spikes = of<IO_T>(steps);
    auto spikes = of<SPIKE_T>(s.T * frame);
    auto v = of(frame, some), v_last = v, grad_v_last = v, grad_v = v, threshold = of(s.channels, some);
    auto sums = of<double>(s.channels);

    Arguments a = {};
    a.x = x.data(), a.threshold = threshold.data(), a.spikes = spikes.data();
    a.grad_spikes = grad_spikes.data(), a.grad_x = grad_x.data();
    if (all) {
        a.v = v.data(), a.v_last = v_last.data(), a.grad_v_last = grad_v_last.data(), a.grad_v = grad_v.data();
        a.grad_threshold = sums.data();
    }
    a.T = s.T, a.frame = frame, a.x_step = a.grad_step = s.rows * stride, a.length = s.length, a.rows = s.rows;
    a.sizes[0] = s.rows, a.x_strides[0] = a.grad_strides[0] = stride, a.channels = s.channels, a.inner = s.inner;
    a.threads = 2, a.decay = 0.5, a.scale = a.alpha = a.levels = a.frame_weight = a.sum_scale = 1;
    if (forward(&a) || backward(&a)) std::abort();

    auto x_once = of<IO_T>(once), grad_total = of<IO_T>(once), grad_x_once = of<IO_T>(frame);
    auto total = of<SPIKE_T>(frame);
    a.x = x_once.data(), a.grad_spikes = grad_total.data(), a.spikes = total.data(), a.grad_x = grad_x_once.data();
    a.v = a.grad_v_last = nullptr, a.v_last = a.grad_v = nullptr;
    if (forward_sum(&a) || backward_sum(&a)) std::abort();
}

int main() {
    for (long long T : {1, 3, 33, 130})
        for (bool all : {false, true}) {
            for (long long length : {1, 2, 15, 63, 1023, 1025, 4099}) {
                run({T, 1, length, 0, 1, 1}, all);
                run({T, 1, length, 0, length, 1}, all);
                run({T, 3, length, 5, 3, length}, all);
                run({T, 2, length, 1, length, 1}, all);
            }
            run({T, 6, 50, 3, 3, 50}, all);
        }
}
