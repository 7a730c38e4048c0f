// The kernels for a GPU over the step functions of steps.cuh. A thread takes VECTOR neighbouring neurons through all
// steps with everything in registers, then the next ones, `threads` * VECTOR further on. cuda/launch.py calls them.
//
// What a build defines before: what steps.cuh asks for (but INLINE), and
//   KERNEL          FORWARD, FORWARD_SUM, BACKWARD or BACKWARD_SUM: what `run` does
//   T_STEPS         the number of steps, up to 32, or 0: Arguments.T, and a backward's membranes are in scratch memory
//   VECTOR          neurons of a thread: a power of 2 that divides a row's length and all strides; every pointer is
//                   aligned for as many elements, up to 16 bytes
//   NEEDS_THRESHOLD 0 or 1: whether a backward leaves the threshold's gradient in scratch memory for `add_partials`

#include "scalars.cuh"

// What a thread loads or stores at once.
template <class E> struct alignas(sizeof(E) * VECTOR < 16 ? sizeof(E) * VECTOR : 16) Pack {
    E at[VECTOR];
};

template <class E> INLINE Pack<E> load(const E* from) { return *reinterpret_cast<const Pack<E>*>(from); }
template <class E> INLINE void store(E* to, const STATE_T (&values)[VECTOR]) {
    Pack<E> pack;
    UNROLL for (int j = 0; j < VECTOR; ++j) narrow(values[j], pack.at[j]);
    *reinterpret_cast<Pack<E>*>(to) = pack;
}

// ---- places

enum Kernel { FORWARD, FORWARD_SUM, BACKWARD, BACKWARD_SUM };
constexpr bool backwards = KERNEL == BACKWARD || KERNEL == BACKWARD_SUM;
constexpr bool sums_up = KERNEL == FORWARD_SUM || KERNEL == BACKWARD_SUM;
constexpr bool once = INJECT_FIRST || sums_up;  // x enters at t = 0 alone
constexpr bool delayed = reset_kind == SOFT_DELAYED;
constexpr int at_once = T_STEPS ? T_STEPS : 8;  // steps whose input is loaded ahead

// With no more blocks on a multiprocessor, all steps fit into registers; left to itself the compiler spills for more.
constexpr int block = 128;
constexpr int resident_blocks = T_STEPS * sizeof(STATE_T) <= 128 ? 3 : 2;

INLINE long long steps_of(const Arguments& a) { return T_STEPS ? T_STEPS : a.T; }
INLINE long long thread_number() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

// Where element i of a frame lies in a tensor that is read through `strides`.
INLINE long long offset_of(long long i, const Arguments& a, const long long (&strides)[4]) {
    if (a.rows == 1) return i;
    long long row = i / a.length, offset = i - row * a.length;
    UNROLL for (int axis = 3; axis >= 0; --axis) {
        if (a.sizes[axis] == 0) continue;  // padding
        const long long outer = row / a.sizes[axis];
        offset += (row - outer * a.sizes[axis]) * strides[axis];
        row = outer;
    }
    return offset;
}

// Whether a thread's neurons share one threshold, wherever it stands.
INLINE bool one_channel(const Arguments& a) { return a.channels == 1 || a.inner % VECTOR == 0; }

INLINE void thresholds_of(long long i, const Arguments& a, STATE_T (&V)[VECTOR]) {
    if (a.channels == 1) {
        const STATE_T single = a.threshold[0];
        UNROLL for (int j = 0; j < VECTOR; ++j) V[j] = single;
        return;
    }
    const long long run = i / a.inner;
    long long channel = run % a.channels, left = a.inner - (i - run * a.inner);
    UNROLL for (int j = 0; j < VECTOR; ++j) {
        V[j] = a.threshold[channel];
        if (--left == 0) {
            left = a.inner;
            channel = channel + 1 == a.channels ? 0 : channel + 1;
        }
    }
}

INLINE void membranes_before(long long i, const Arguments& a, STATE_T (&v)[VECTOR]) {
    if (a.v) {
        const Pack<STATE_T> pack = load(a.v + i);
        UNROLL for (int j = 0; j < VECTOR; ++j) v[j] = pack.at[j];
    } else {
        UNROLL for (int j = 0; j < VECTOR; ++j) v[j] = (STATE_T)a.start;
    }
}

// A kernel's one parameter. `weights` of a sum's steps: frame_weight^t, rounded as ops/reference.py does.
struct Call {
    Arguments a;
    STATE_T weights[32];
};

// Scratch memory: a weight for every step, then the partial sums of every thread, then its membranes at every step. The
// first and the last only where T_STEPS is 0.
INLINE const STATE_T* weights_of(const Call& call) {
    return T_STEPS ? call.weights : static_cast<const STATE_T*>(call.a.scratch);
}
INLINE double* partials_of(const Arguments& a) { return static_cast<double*>(a.scratch) + (T_STEPS ? 0 : a.T); }

// h of every step.
struct Membranes {
#if T_STEPS
    STATE_T values[T_STEPS][VECTOR];
    INLINE Membranes of(const Arguments&) { return {}; }
    __device__ __forceinline__ STATE_T& at(long long t, int j) { return values[t][j]; }
#else
    STATE_T* values;  // a column for each thread
    long long threads;
    INLINE Membranes of(const Arguments& a) {
        void* behind = partials_of(a) + (NEEDS_THRESHOLD ? a.threads * VECTOR : 0);
        return {static_cast<STATE_T*>(behind) + thread_number(), a.threads};
    }
    __device__ __forceinline__ STATE_T& at(long long t, int j) { return values[(t * VECTOR + j) * threads]; }
#endif
};

// ---- forward

// Takes v through all steps of the input at x and calls each(t, stepped) after every one.
template <class Each> INLINE void run_steps(
    const Arguments& a, const IO_T* x, const STATE_T (&V)[VECTOR], STATE_T (&v)[VECTOR], const Numbers<STATE_T>& n,
    Each each) {
    const long long T = steps_of(a);
    for (long long first = 0; first < T; first += at_once) {
        Pack<IO_T> inputs[once ? 1 : at_once];  // all loads before any store
        if constexpr (once) {
            if (first == 0 && !a.started) inputs[0] = load(x);
        } else {
            UNROLL for (int k = 0; k < at_once; ++k)
                if (first + k < T) inputs[k] = load(x + (first + k) * a.x_step);
        }
        UNROLL for (int k = 0; k < at_once; ++k) {
            const long long t = first + k;
            if (t >= T) break;
            Stepped<STATE_T> stepped[VECTOR];
            UNROLL for (int j = 0; j < VECTOR; ++j) {
                if (!once || (t == 0 && !a.started))
                    stepped[j] = step<true>(widen(inputs[once ? 0 : k].at[j]), v[j], V[j], n);
                else
                    stepped[j] = step<false>((STATE_T)0, v[j], V[j], n);
                v[j] = stepped[j].v;
            }
            each(t, stepped);
        }
    }
}

INLINE void forward(const Arguments& a) {
    const Numbers<STATE_T> n = numbers_of<STATE_T>(a);
    for (long long i = thread_number() * VECTOR; i < a.frame; i += a.threads * VECTOR) {
        STATE_T V[VECTOR], v[VECTOR];
        thresholds_of(i, a, V);
        membranes_before(i, a, v);
        run_steps(a, a.x + offset_of(i, a, a.x_strides), V, v, n, [&](long long t, const auto& stepped) {
            STATE_T spikes[VECTOR];
            UNROLL for (int j = 0; j < VECTOR; ++j) spikes[j] = stepped[j].spikes;
            store(a.spikes + t * a.frame + i, spikes);
        });
        if (a.v_last) store(a.v_last + i, v);
    }
}

INLINE void forward_sum(const Arguments& a, const STATE_T* weights) {
    const Numbers<STATE_T> n = numbers_of<STATE_T>(a);
    for (long long i = thread_number() * VECTOR; i < a.frame; i += a.threads * VECTOR) {
        STATE_T x[VECTOR], V[VECTOR], total[VECTOR];
        thresholds_of(i, a, V);
        const Pack<IO_T> pack = load(a.x + offset_of(i, a, a.x_strides));
        UNROLL for (int j = 0; j < VECTOR; ++j) {
            x[j] = widen(pack.at[j]);
            const auto threshold = [&](long long, int) { return V[j]; };
            sums_of_spikes<false, 1>(x + j, threshold, total + j, steps_of(a), weights, n);
            total[j] = total[j] * (STATE_T)a.sum_scale;
        }
        store(a.spikes + i, total);
    }
}

// ---- backward: h of every step is computed again, then the steps are walked back

INLINE void backward(const Arguments& a, const STATE_T* weights) {
    constexpr int ahead = sums_up || !T_STEPS ? 1 : T_STEPS;  // packs of the spikes' gradients held at once
    const long long T = steps_of(a);
    const Numbers<STATE_T> n = numbers_of<STATE_T>(a);
    double partials[VECTOR] = {};
    for (long long i = thread_number() * VECTOR; i < a.frame; i += a.threads * VECTOR) {
        const IO_T* grad_spikes = a.grad_spikes ? a.grad_spikes + offset_of(i, a, a.grad_strides) : nullptr;
        Pack<IO_T> grads[ahead] = {};
        if ((T_STEPS || sums_up) && grad_spikes) {
            UNROLL for (int t = 0; t < ahead; ++t) grads[t] = load(grad_spikes + t * a.grad_step);
        }
        STATE_T V[VECTOR], v[VECTOR], carry[VECTOR] = {}, last[VECTOR] = {}, at_threshold[VECTOR] = {};
        if (a.grad_v_last) {
            const Pack<STATE_T> pack = load(a.grad_v_last + i);
            UNROLL for (int j = 0; j < VECTOR; ++j) (delayed ? last[j] : carry[j]) = pack.at[j];
        }
        thresholds_of(i, a, V);
        membranes_before(i, a, v);
        Membranes h = Membranes::of(a);
        run_steps(a, a.x + offset_of(i, a, a.x_strides), V, v, n, [&](long long t, const auto& stepped) {
            UNROLL for (int j = 0; j < VECTOR; ++j) h.at(t, j) = stepped[j].h;
        });
        UNROLL for (long long t = T - 1; t >= 0; --t) {
            if (!T_STEPS && !sums_up && grad_spikes) grads[0] = load(grad_spikes + t * a.grad_step);
            STATE_T at_h[VECTOR];
            UNROLL for (int j = 0; j < VECTOR; ++j) {
                STATE_T at_spikes = widen(grads[ahead == 1 ? 0 : t].at[j]);
                if constexpr (sums_up) at_spikes = at_spikes * weights[t];
                const STATE_T extra = t == T - 1 ? last[j] : (STATE_T)0;
                const Gradients<STATE_T> g =
                    gradient(h.at(t, j), V[j], (STATE_T)1 / V[j], at_spikes, carry[j], extra, n);
                at_h[j] = g.h;
                carry[j] = g.carry;
                at_threshold[j] += g.threshold;
            }
            if (!once || (t == 0 && !a.started)) store(a.grad_x + (once ? 0 : t * a.frame) + i, at_h);
        }
        membranes_before(i, a, v);
        UNROLL for (int j = 0; j < VECTOR; ++j) {
            const Gradients<STATE_T> g = gradient_of_start(v[j], V[j], (STATE_T)1 / V[j], carry[j], n);
            carry[j] = g.carry;
            partials[j] += at_threshold[j] + g.threshold;
        }
        if (a.grad_v) store(a.grad_v + i, carry);
    }
    if constexpr (NEEDS_THRESHOLD) {
        double* to = partials_of(a);
        if (one_channel(a)) {
            UNROLL for (int j = 1; j < VECTOR; ++j) partials[0] += partials[j];
            to[thread_number()] = partials[0];
        } else {
            UNROLL for (int j = 0; j < VECTOR; ++j) to[thread_number() * VECTOR + j] = partials[j];
        }
    }
}

// ---- kernels

extern "C" __global__ void __launch_bounds__(block, resident_blocks) run(const __grid_constant__ Call call) {
    if (thread_number() >= call.a.threads) return;
    if constexpr (backwards)
        backward(call.a, weights_of(call));
    else if constexpr (sums_up)
        forward_sum(call.a, weights_of(call));
    else
        forward(call.a);
}

// Before a sum of more steps than a Call has weights for.
extern "C" __global__ void prepare(const __grid_constant__ Call call) {
    if constexpr (sums_up && !T_STEPS) {
        STATE_T* weights = static_cast<STATE_T*>(call.a.scratch);
        for (long long t = threadIdx.x; t < call.a.T; t += blockDim.x)
            weights[t] = (STATE_T)pow(call.a.frame_weight, (double)t);
    }
}

// A block adds up one channel's partials, always in the same order. They lie as the thresholds of a smaller frame do.
extern "C" __global__ void __launch_bounds__(1024) add_partials(const __grid_constant__ Call call) {
    __shared__ double sums[32];
    const Arguments& a = call.a;
    const bool one = one_channel(a);
    const long long inner = a.channels == 1 ? 1 : one ? a.inner / VECTOR : a.inner;
    const long long count = a.threads * (one ? 1 : VECTOR) / a.channels;
    const double* partials = partials_of(a) + blockIdx.x * inner;
    double sum = 0;
    for (long long k = threadIdx.x; k < count; k += blockDim.x) {
        const long long outer = k / inner;
        sum += partials[outer * a.channels * inner + (k - outer * inner)];
    }
    UNROLL for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffff, sum, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
        a.grad_threshold[blockIdx.x] = total;
    }
}
