// Projections of spikes, y = W s: the one source of spike_linear.cuh, for a GPU, and of the CPU's cpu/gather.hpp. Included
// behind steps.cuh.
//
// What a build defines before, besides what steps.cuh asks for (STATE_T is float; IO_T: x and y; SPIKE_T is not used):
//   WEIGHT_T   how weights are stored: as one of IO_T's types, as signed char, or as unsigned char: packed codes
//   CODE_BITS  of a packed code, 1 (binary) or 2 (ternary); 0 for weights that are numbers
//   SPIKING    0 or 1; 0: no neurons, values are x itself

constexpr int MOST_TOKENS = 4;
constexpr int MOST_PROJECTIONS = 4;
constexpr int MOST_STEPS = 64;

// One projection of a bank. Every member is 8 bytes; cpu/spike_linear.py packs it.
struct Projection {
    const WEIGHT_T* weights;  // a row per input channel, `stride` bytes from one to the next
    const float* scale;       // [scales], factors of the outputs' sums, or null
    const float* bias;        // [outputs], or null
    IO_T* y;                  // [tokens, outputs], dense
    long long outputs, stride;
    long long scales;         // 1 or outputs
};

// A bank of neurons and the projections behind it, which are given its active channels: those in which a token's sum of
// frames is not 0.
struct Call {
    const IO_T* x;           // [tokens, channels], dense
    const float* threshold;  // [thresholds]
    long long* active;       // the result: how many channels are active
    void* scratch;           // what a device kernel asks for
    long long tokens, channels;
    long long thresholds;    // 1 or channels
    long long T;
    long long most;          // with more active channels nothing else is computed
    long long threads;
    long long projections;
    double decay, v_reset, levels;  // of the neuron, see ops/kernel.py
    double frame_weight;
    double value_scale;      // of a channel's sum of frames: where weights are codes, to an integer
    double output_scale;     // of sums over channels
    Projection projection[MOST_PROJECTIONS];
};

template <class R> INLINE Numbers<R> numbers_of(const Call& call) {
    const R zero = constant<R>(0);
    return {constant<R>(call.decay), constant<R>(call.v_reset), zero, zero, constant<R>(call.levels), zero};
}

// The value of a channel, value_scale sum_t frame_weight^t s_t, or x.
template <class R> INLINE R value_of(R x, R threshold, const Call& call, const float* weights, const Numbers<R>& numbers) {
    if constexpr (!SPIKING) return x;
    R total[1];
    const R inputs[1] = {x};
    sums_of_spikes<false, 1>(inputs, [&](long long, int) { return threshold; }, total, call.T, weights, numbers);
    return total[0] * constant<R>(call.value_scale);
}

// From a sum of values times stored weights, or codes, to the output; `total` is the sum of the values alone.
template <class R> INLINE R output_of(R sum, float total, R scale, R bias, const Call& call) {
    if constexpr (CODE_BITS == 2) sum = sum - constant<R>(total);                      // codes - 1
    if constexpr (CODE_BITS == 1) sum = sum * constant<R>(2) - constant<R>(total);     // 2 codes - 1
    return sum * (scale * constant<R>(call.output_scale)) + bias;
}
