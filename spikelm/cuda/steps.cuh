// One step of a neuron and its gradient: the one source of every kernel. Compiled by NVRTC and nvcc (multistep.cuh), by
// the system's C++ compiler over SIMD lanes (cpu/tiles.cpp), and by the same compiler thread by thread (a test).
//
// No header is included. What a build defines before:
//   FIRE, RESET, SURROGATE      one of the names below
//   INJECT_FIRST, DETACH_RESET  0 or 1
//   SGC                         0 or 1: the derivative of levels tanh(y / levels) is mixed into integer firing's
//   IO_T, SPIKE_T, STATE_T      storage of input and gradients, of spikes, of the membrane (float or double)
//   INLINE                      how a function is declared for this compiler
// and, for the lanes R that it uses (a float, a double, or a SIMD vector of them): constant<R>(double), absolute(R),
// with_sign_of(R magnitude, R sign), truncate(R) for values below 2^31, exponential(R) for values <= 0. A condition picks
// per lane: c ? a : b.
//
// The order of operations is ops/reference.py's, so that without contraction to FMA the forward is equal bit for bit.

enum Fire { BINARY, TERNARY, INTEGER };
enum Reset { SOFT, SOFT_DELAYED, HARD };
enum Surrogate { WINDOW, ATAN, SIGMOID, TRIANGLE, INVERSE_SQUARE, EXPONENTIAL, GAUSSIAN, RECTANGLE };

constexpr Fire fire_kind = FIRE;
constexpr Reset reset_kind = RESET;
constexpr Surrogate surrogate_kind = SURROGATE;
constexpr double largest = sizeof(STATE_T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;

// What Python passes, packed by ops/layout.py: every member is 8 bytes. A frame is one step's [N, *], in row-major order;
// x and grad_spikes are read through strides (in elements), everything else is dense.
struct Arguments {
    const IO_T* x;                  // [T, frame]; [frame] where it enters once
    const STATE_T* v;               // the membrane before the first step, or null: `start` everywhere
    const STATE_T* threshold;       // [channels]
    SPIKE_T* spikes;                // [T, frame], or their weighted sum [frame]
    STATE_T* v_last;                // [frame], or null
    const IO_T* grad_spikes;        // of the shape of spikes, or null: zeros
    const STATE_T* grad_v_last;     // [frame], or null: zeros
    IO_T* grad_x;                   // of the shape of x
    STATE_T* grad_v;                // [frame], or null
    double* grad_threshold;         // [channels], or null
    void* scratch;                  // what a device kernel asks for
    long long T, frame;             // steps, elements of a frame
    long long x_step, grad_step;    // strides of the step
    long long length, rows;         // a frame is `rows` dense rows of `length` elements ...
    long long sizes[4], x_strides[4], grad_strides[4];  // ... over up to four outer axes, the first one outermost
    long long channels, inner;      // the channel of element i is (i / inner) % channels
    long long started;              // x does not enter, its one step was taken before
    long long threads;
    double decay, v_reset, scale, alpha, levels, sgc_weight;  // the kernel's numbers, see ops/kernel.py
    double start;
    double frame_weight, sum_scale;  // the sum is sum_scale * sum_t frame_weight^t spikes_t
};

template <class R> struct Numbers {
    R decay, v_reset, scale, alpha, levels, sgc_weight;
};

template <class R> INLINE Numbers<R> numbers_of(const Arguments& a) {
    return {constant<R>(a.decay), constant<R>(a.v_reset), constant<R>(a.scale),
            constant<R>(a.alpha), constant<R>(a.levels),  constant<R>(a.sgc_weight)};
}

// ---- forward

template <class R> INLINE R fire(R h, R V, const Numbers<R>& n) {
    const R zero = constant<R>(0), one = constant<R>(1);
    if constexpr (fire_kind == BINARY) {
        return h >= V ? one : zero;  // for a normal V, h / V rounds to 1 or more exactly where h >= V
    } else if constexpr (fire_kind == TERNARY) {
        return (h >= V ? one : zero) - (h <= -V ? one : zero);
    } else {
        const R y = h / V;
        const R shifted = absolute(y) + constant<R>(0.5);
        const R count = truncate(shifted < n.levels ? shifted : n.levels);
        const R spikes = (y < zero ? -count : count) + zero;  // + 0: no -0 for a small negative y
        return y == y ? spikes : zero;
    }
}

template <class R> struct Stepped {
    R h, spikes, v;
};

// `injects`: whether x enters; it is ignored otherwise.
template <bool injects, class R> INLINE Stepped<R> step(R x, R v, R V, const Numbers<R>& n) {
    R h = v * n.decay;
    if constexpr (injects) h = h + x;
    if constexpr (reset_kind == SOFT_DELAYED) h = h - fire(v, V, n) * V;
    const R s = fire(h, V, n);
    if constexpr (reset_kind == SOFT) return {h, s, h - s * V};
    if constexpr (reset_kind == HARD) return {h, s, s != constant<R>(0) ? n.v_reset : h};
    return {h, s, h};
}

// total[i] = sum_t weights[t] spikes_t of the T frames of x[i], which enters a fresh membrane once. Several at a time:
// their steps do not wait for each other. V(t, i) is the threshold. `scaled`, for a decay that is a power of two: V(t, i)
// is divided by decay^t, which is the same as multiplying every h.
template <bool scaled, int many, class R, class Thresholds>
INLINE void sums_of_spikes(
    const R* x, const Thresholds& V, R* total, long long T, const STATE_T* weights, const Numbers<R>& n) {
    const R zero = constant<R>(0);
    R h[many];
    if constexpr (fire_kind == TERNARY && reset_kind == SOFT) {  // no step changes the sign: the magnitude is enough
        for (int i = 0; i < many; ++i) h[i] = absolute(x[i]), total[i] = zero;
        for (long long t = 0; t < T; ++t) {
            const R weight = constant<R>(weights[t]);
            for (int i = 0; i < many; ++i) total[i] = h[i] >= V(t, i) ? total[i] + weight : total[i];
            if (t + 1 == T) break;
            for (int i = 0; i < many; ++i) {
                h[i] = h[i] >= V(t, i) ? h[i] - V(t, i) : h[i];
                if (!scaled) h[i] = h[i] * n.decay;
            }
        }
        for (int i = 0; i < many; ++i) total[i] = with_sign_of(total[i], x[i]) + zero;
    } else {
        for (int i = 0; i < many; ++i) {
            const R here = V(0, i);
            Stepped<R> at = step<true>(x[i], zero, here, n);
            total[i] = zero;
            for (long long t = 0; t < T; ++t) {
                if (t) at = step<false>(x[i], at.v, here, n);
                total[i] = total[i] + constant<R>(weights[t]) * at.spikes;
            }
        }
    }
}

// ---- backward

// The surrogate's derivative at a distance x from the threshold, in units of it.
template <class R> INLINE R derivative(R x, const Numbers<R>& n) {
    const R zero = constant<R>(0), one = constant<R>(1);
    const R scaled = absolute(x) * n.alpha;
    if constexpr (surrogate_kind == ATAN) return n.scale / (one + scaled * scaled);
    if constexpr (surrogate_kind == INVERSE_SQUARE) return n.scale / ((one + scaled) * (one + scaled));
    if constexpr (surrogate_kind == TRIANGLE) return scaled < one ? n.scale * (one - scaled) : zero;
    if constexpr (surrogate_kind == RECTANGLE) return absolute(x) < n.alpha ? n.scale : zero;
    if constexpr (surrogate_kind == EXPONENTIAL) return n.scale * exponential(-scaled);
    if constexpr (surrogate_kind == GAUSSIAN) return n.scale * exponential(-scaled * scaled);
    if constexpr (surrogate_kind == SIGMOID) {
        const R e = exponential(-scaled);
        return n.scale * e / ((one + e) * (one + e));
    }
    return zero;
}

// h / V, exactly where the derivative jumps; elsewhere to rounding.
template <class R> INLINE R in_thresholds(R h, R V, R inverse, const Numbers<R>&) {
    if constexpr (surrogate_kind == RECTANGLE || surrogate_kind == WINDOW) return h / V;
    return h * inverse;
}

template <class R> struct Slopes {
    R spikes, mask;  // d spikes / dy and d reset mask / dy
};

template <class R> INLINE Slopes<R> slopes(R y, const Numbers<R>& n) {
    const R zero = constant<R>(0), one = constant<R>(1);
    if constexpr (fire_kind == BINARY) {
        const R up = derivative(y - one, n);
        return {up, up};
    } else if constexpr (fire_kind == TERNARY) {
        const R up = derivative(y - one, n), down = derivative(y + one, n);
        return {up + down, up - down};
    } else {
        R slope = absolute(y) <= n.levels ? n.scale : zero;
        if constexpr (SGC) {
            const R e = exponential(absolute(y) * n.alpha * constant<R>(-2));
            const R smooth = constant<R>(4) * e / ((one + e) * (one + e));  // 1 - tanh^2
            slope = (one - n.sgc_weight) * slope + n.sgc_weight * smooth;
        }
        return {slope, zero};
    }
}

template <class R> struct Gradients {
    R h;          // dL/dh_t, which is dL/dx_t where x entered
    R carry;      // handed to the step before
    R threshold;  // this step's share of dL/dV
};

// From the step after: `carry`, which for SOFT and HARD is dL/dv_t (at first grad_v_last), for SOFT_DELAYED dL/dh_{t+1}
// (at first 0; grad_v_last is then `extra`, which is 0 at every other step and unused by the other resets).
template <class R> INLINE Gradients<R> gradient(R h, R V, R inverse, R grad_spikes, R carry, R extra, const Numbers<R>& n) {
    const R zero = constant<R>(0);
    const R y = in_thresholds(h, V, inverse, n);
    const Slopes<R> slope = slopes(y, n);
    const R s = fire(h, V, n);
    R through, at_y, at_threshold = zero;
    if constexpr (reset_kind == HARD) {
        through = s != zero ? zero : carry;
        at_y = grad_spikes * slope.spikes;
        if constexpr (!DETACH_RESET && fire_kind != INTEGER) {
            const R finite = (absolute(h) <= constant<R>(largest)) ? h : zero;
            at_y = at_y + carry * (n.v_reset - finite) * slope.mask;
        }
    } else {
        through = reset_kind == SOFT ? carry : carry * n.decay + extra;
        at_y = (DETACH_RESET ? grad_spikes : grad_spikes - carry * V) * slope.spikes;
        at_threshold = -(s * carry);
    }
    const R at_h = at_y * inverse;
    const R grad_h = through + at_h;
    return {grad_h, reset_kind == SOFT_DELAYED ? grad_h : grad_h * n.decay, at_threshold - at_h * y};
}

// After the first step: what `carry` means for the membrane before it.
template <class R> INLINE Gradients<R> gradient_of_start(R v, R V, R inverse, R carry, const Numbers<R>& n) {
    const R zero = constant<R>(0);
    if constexpr (reset_kind == SOFT_DELAYED) return gradient(v, V, inverse, zero, carry, zero, n);
    return {carry, carry, zero};
}
