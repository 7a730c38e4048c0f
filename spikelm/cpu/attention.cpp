// The CPU's driver over cuda/entries.cuh: a thread takes a few neighbouring queries of a head, first to the words of
// their maps, whose bits are SIMD lanes of keys, then to their sums, whose lanes are channels. cpu/module.py puts the
// definitions before it and the included files in.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <omp.h>

#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_STEPS UNROLL

#include "lanes.hpp"
#include "bits.hpp"
#include "steps.cuh"

INLINE Lanes real(WordLanes count) { return __builtin_convertvector((IntegerLanes)count, Lanes); }

#include "entries.cuh"

constexpr int AT_ONCE = 4;  // queries that share what is loaded of keys and values

// A head of a sequence.
struct Head {
    const uint32_t *queries, *keys, *values;
    long long out;  // the place of its first query's first sum, in rows of CHANNELS

    Head(const Call& call, long long batch, long long head)
        : queries(call.queries + batch * call.query_strides[1] + head * call.query_strides[2]),
          keys(call.keys + batch * call.key_strides[1] + head * call.key_strides[2]),
          values(call.values + batch * call.value_strides[1] + head * call.value_strides[2]),
          out(batch * call.length * call.heads + head) {}
};

// A vector of keys gives a piece of the word; of 4 lanes, two give one.
typedef std::conditional<LANES == 16, uint16_t, uint8_t>::type Piece __attribute__((may_alias));
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

// `count` entries, from key `first` on, of each of `many` queries: to map[t][query][word].
template <int many, class Count> INLINE void map_entries(
    const Neuron<Lanes>& neuron, const uint32_t (&queries)[many][T_STEPS][WORDS],
    const uint32_t* const (&keys)[T_STEPS][WORDS], long long first, uint32_t* map, long long words, Count count) {
    WordLanes key[T_STEPS][WORDS];
    UNROLL_STEPS for (int t = 0; t < T_STEPS; ++t)
        UNROLL for (int w = 0; w < WORDS; ++w) key[t][w] = bits_at<WordLanes>(keys[t][w] + first, count);
    UNROLL for (int i = 0; i < many; ++i)
        through_steps<Lanes>(
            neuron, [&](int t) { return shared_spikes(queries[i][t], key[t]); },
            [&](int t, Lanes spikes) {
                Piece* piece = (Piece*)(map + (t * many + i) * words) + first / (8 * sizeof(Piece));
                const uint32_t bits = bits_of((WordLanes)spikes);
                *piece = first % (8 * sizeof(Piece)) ? *piece | bits << 4 : bits;
            });
}

// The sums of `many` queries over a map at step t, of the channels from `channel` on, in `vectors` vectors.
template <int many, int vectors, class Count> INLINE void sum_channels(
    const Call& call, const uint32_t* values, const uint32_t* map, long long words, SPIKE_T* out, Count last) {
    WordLanes sums[many][vectors] = {};
    for (long long word = 0; word < words; ++word) {
        WordLanes value[vectors];
        UNROLL for (int k = 0; k < vectors; ++k) {
            const uint32_t* from = values + word * call.value_strides[3] + k * LANES;
            value[k] = k + 1 < vectors ? bits_at<WordLanes>(from, All{}) : bits_at<WordLanes>(from, last);
        }
        UNROLL for (int i = 0; i < many; ++i)
            UNROLL for (int k = 0; k < vectors; ++k) sums[i][k] += population(map[i * words + word] & value[k]);
    }
    for (int i = 0; i < many; ++i)
        for (int k = 0; k < vectors; ++k) {
            SPIKE_T* to = out + i * call.heads * CHANNELS + k * LANES;
            k + 1 < vectors ? store(to, real(sums[i][k]), All{}) : store(to, real(sums[i][k]), last);
        }
}

// Fills map[t][query][word] of `many` queries; bits of keys that a query does not see are still to be cleared.
template <int many> static void map_queries(
    const Call& call, const Head& head, long long query, uint32_t* map, long long words) {
    uint32_t queries[many][T_STEPS][WORDS];
    const uint32_t* rows[T_STEPS][WORDS];
    for (int t = 0; t < T_STEPS; ++t)
        for (int w = 0; w < WORDS; ++w) {
            rows[t][w] = head.keys + t * call.key_strides[0] + w * call.key_strides[3];
            for (int i = 0; i < many; ++i)
                queries[i][t][w] = head.queries[t * call.query_strides[0] + w * call.query_strides[3] + query + i];
        }
    const Neuron<Lanes> neuron = neuron_of<Lanes>(call);
    const long long keys = std::min(32 * words, call.num_keys);
    long long key = 0;
    for (; key + LANES <= keys; key += LANES) map_entries(neuron, queries, rows, key, map, words, All{});
    if (key < keys) map_entries(neuron, queries, rows, key, map, words, (long)(keys - key));
}

template <int many> static void attend_queries(const Call& call, const Head& head, long long query, uint32_t* map) {
    const long long words = (seen_by(query + many - 1, call) + 31) / 32;
    map_queries<many>(call, head, query, map, words);
    for (int t = 0; t < T_STEPS; ++t, map += many * words) {
        const long long row = t * call.batch * call.length * call.heads + head.out + query * call.heads;
        for (int i = 0; i < many; ++i) {
            const long long seen = seen_by(query + i, call);
            uint32_t* own = map + i * words;
            int fired = 0;
            for (long long word = seen / 32; word < words; ++word) own[word] &= bits_below(seen - 32 * word);
            for (long long word = 0; word < words; ++word) fired += __builtin_popcount(own[word]);
            call.fired[row + i * call.heads] = fired;
        }
        SPIKE_T* out = call.out + row * CHANNELS;
        const uint32_t* values = head.values + t * call.value_strides[0];
        constexpr long vectors = 4, whole = CHANNELS / (vectors * LANES) * vectors * LANES, rest = CHANNELS - whole;
        for (long channel = 0; channel < whole; channel += vectors * LANES)
            sum_channels<many, vectors>(call, values + channel, map, words, out + channel, All{});
        if constexpr (rest > 0) {
            typedef std::integral_constant<long, (rest - 1) % LANES + 1> Last;
            sum_channels<many, (rest + LANES - 1) / LANES>(call, values + whole, map, words, out + whole, Last{});
        }
    }
}

extern "C" int attend(const Call* arguments) {
    const Call& call = *arguments;
    const long long blocks = (call.length + AT_ONCE - 1) / AT_ONCE, words = (call.num_keys + 31) / 32;
    const size_t bytes = (T_STEPS * AT_ONCE * words * sizeof(uint32_t) + 63) / 64 * 64;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        uint32_t* map = (uint32_t*)std::aligned_alloc(64, bytes);
        if (!map) failed = true;
#pragma omp for schedule(dynamic)
        for (long long i = 0; i < call.batch * call.heads * blocks; ++i) {
            if (!map) continue;
            const long long head = i / blocks, query = (blocks - 1 - i % blocks) * AT_ONCE;  // the longest first
            const Head at(call, head / call.heads, head % call.heads);
            if (query + AT_ONCE <= call.length) {
                attend_queries<AT_ONCE>(call, at, query, map);
            } else {
                for (long long one = query; one < call.length; ++one) attend_queries<1>(call, at, one, map);
            }
        }
        std::free(map);
    }
    return failed;
}
