// An entry of the attention map, a query and a key, through all steps: the one source of spiking attention. Included
// behind steps.cuh by the drivers, attention.cuh for a GPU and cpu/attention.cpp.
//
// What a build defines before, besides what steps.cuh asks for (binary firing, soft delayed reset; SPIKE_T: the sums):
//   T_STEPS               the number of steps
//   CHANNELS              those of a head
//   UNROLL, UNROLL_STEPS  in front of a loop over words, over steps
// and, for its lanes R and for words N of as many lanes: population(N) counts bits, real(N) converts counts to R.

constexpr int WORDS = (CHANNELS + 31) / 32;  // of a query or key

// What Python passes, packed by cpu/attention.py: every member is 8 bytes. Strides are in words; rows are dense.
struct Call {
    const unsigned* queries;  // [T, batch, heads, WORDS, length]: bit c % 32 of word c / 32 is channel c
    const unsigned* keys;     // [T, batch, heads, WORDS, num_keys or more]
    const unsigned* values;   // [T, batch, heads, num_keys / 32 or more, CHANNELS]: bit j % 32 of word j / 32: token j
    SPIKE_T* out;             // [T, batch, length, heads, CHANNELS], dense
    int* fired;               // [T, batch, length, heads], dense
    long long batch, heads, length, num_keys;
    long long threads;
    long long query_strides[4], key_strides[4], value_strides[4];
    double beta, threshold;
};

// How many keys a query sees.
INLINE long long seen_by(long long query, const Call& call) { return call.num_keys - call.length + query + 1; }

// Bits 0 .. count - 1 of a word.
INLINE unsigned bits_below(long long count) {
    return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

template <class R> struct Neuron {
    R V;
    Numbers<R> numbers;
};

template <class R> INLINE Neuron<R> neuron_of(const Call& call) {
    static_assert(fire_kind == BINARY && reset_kind == SOFT_DELAYED);
    Neuron<R> neuron{constant<R>(call.threshold), {}};
    neuron.numbers.decay = constant<R>(call.beta);
    return neuron;
}

// Takes entries from rest through all steps: count(t) spikes are shared at step t, fired(t, spikes) takes the result.
template <class R, class Count, class Fired>
INLINE void through_steps(const Neuron<R>& neuron, const Count& count, const Fired& fired) {
    R v = constant<R>(0);
    UNROLL_STEPS for (int t = 0; t < T_STEPS; ++t) {
        const Stepped<R> at = step<true>(real(count(t)), v, neuron.V, neuron.numbers);
        fired(t, at.spikes);
        v = at.v;
    }
}

// The spikes that a query and a key have in common.
template <class N, class Query> INLINE N shared_spikes(const Query (&query)[WORDS], const N (&key)[WORDS]) {
    N count = population(query[0] & key[0]);
    UNROLL for (int word = 1; word < WORDS; ++word) count = count + population(query[word] & key[word]);
    return count;
}
