// Spiking attention on a GPU over the functions of entries.cuh. A warp takes one query of a head: at every word of 32
// keys a lane is a key, whose entry goes through all steps in a register; the warp's votes are the words of the map,
// for which a lane then is a channel. cuda/attention.py calls it.
//
// What a build defines before: what entries.cuh asks for (but UNROLL and UNROLL_STEPS).

#include "scalars.cuh"

constexpr int unrolled_steps = T_STEPS <= 16 ? T_STEPS : 1;  // of more, sums are in local memory
#define UNROLL_STEPS _Pragma("unroll unrolled_steps")

INLINE unsigned population(unsigned bits) { return __popc(bits); }
INLINE float real(unsigned count) { return (float)count; }

#include "entries.cuh"

extern "C" __global__ void __launch_bounds__(128) attend(const __grid_constant__ Call call) {
    const long long warp = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32, sequence = warp / call.length;
    if (sequence >= call.batch * call.heads) return;
    const long long query = call.length - 1 - warp % call.length;  // the longest first
    const long long batch = sequence / call.heads, head = sequence % call.heads, seen = seen_by(query, call);
    const int lane = threadIdx.x % 32;
    const unsigned* keys = call.keys + batch * call.key_strides[1] + head * call.key_strides[2] + lane;
    const unsigned* values = call.values + batch * call.value_strides[1] + head * call.value_strides[2] + lane;

    unsigned queries[T_STEPS][WORDS], sums[T_STEPS][WORDS] = {}, fired[T_STEPS] = {};
    const unsigned* from = call.queries + batch * call.query_strides[1] + head * call.query_strides[2] + query;
    UNROLL_STEPS for (int t = 0; t < T_STEPS; ++t)
        UNROLL for (int w = 0; w < WORDS; ++w)
            queries[t][w] = from[t * call.query_strides[0] + w * call.query_strides[3]];

    const Neuron<float> neuron = neuron_of<float>(call);
    for (long long first = 0; first < seen; first += 32) {
        const bool sees = first + lane < seen;
        const unsigned* value = values + first / 32 * call.value_strides[3];
        const auto count = [&](int t) {
            unsigned key[WORDS];
            UNROLL for (int w = 0; w < WORDS; ++w)
                key[w] = sees ? keys[t * call.key_strides[0] + w * call.key_strides[3] + first] : 0;
            return shared_spikes(queries[t], key);
        };
        const auto vote = [&](int t, float spikes) {
            const unsigned map = __ballot_sync(0xffffffff, spikes != 0);
            fired[t] += population(map);
            UNROLL for (int w = 0; w < WORDS; ++w)
                if (32 * w + lane < CHANNELS)
                    sums[t][w] += population(map & value[t * call.value_strides[0] + 32 * w]);
        };
        through_steps(neuron, count, vote);
    }

    UNROLL_STEPS for (int t = 0; t < T_STEPS; ++t) {
        const long long row = ((t * call.batch + batch) * call.length + query) * call.heads + head;
        if (lane == 0) call.fired[row] = fired[t];
        UNROLL for (int w = 0; w < WORDS; ++w)
            if (32 * w + lane < CHANNELS) narrow(real(sums[t][w]), call.out[row * CHANNELS + 32 * w + lane]);
    }
}
