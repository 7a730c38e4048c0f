// Spikes to bits, for spiking attention: what is not 0 is a spike. cpu/module.py puts the types before it, IO_T that of
// the spikes, and the included files in.

#include <algorithm>
#include <omp.h>

#include "lanes.hpp"
#include "bits.hpp"

// What Python passes, packed by cpu/attention.py: every member is 8 bytes.
struct Call {
    const IO_T* spikes;  // [T, batch, tokens, heads, channels], read through strides; the last axis is dense
    uint32_t* packed;    // [T, batch, heads, words, tokens] or [T, batch, heads, words, channels], dense
    long long T, batch, tokens, heads, channels;
    long long first;     // where in the first word the tokens begin
    long long threads;
    long long strides[4];
    long long words;
};

typedef uint8_t UnsignedByteLanes __attribute__((vector_size(LANES)));

// Not 0 where there is a spike; -0 is none.
template <class Count> INLINE WordLanes spikes_at(const IO_T* at, Count count) {
    if constexpr (sizeof(IO_T) == 4)
        return bits_at<WordLanes>(at, count) & 0x7fffffffu;
    else if constexpr (sizeof(IO_T) == 2)
        return __builtin_convertvector(bits_at<ShortLanes>(at, count), WordLanes) & 0x7fffu;
    else  // by way of 16 bits: g++ takes the lanes one by one else
        return __builtin_convertvector(
            __builtin_convertvector(bits_at<UnsignedByteLanes>(at, count), ShortLanes), WordLanes);
}

INLINE const IO_T* token_at(const Call& call, long long t, long long b, long long token) {
    return call.spikes + t * call.strides[0] + b * call.strides[1] + token * call.strides[2];
}

// body(t, b, i) for every step, sequence and i below `parts`, over the threads.
template <class Body> static void for_parts(const Call& call, long long parts, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.threads > 1)
    for (long long i = 0; i < call.T * call.batch * parts; ++i)
        body(i / parts / call.batch, i / parts % call.batch, i % parts);
}

extern "C" int pack_channels(const Call* arguments) {
    const Call& call = *arguments;
    constexpr long long part = 64;  // tokens: their words fill whole lines of every head
    for_parts(call, (call.tokens + part - 1) / part, [&](long long t, long long b, long long i) {
        uint32_t* packed = call.packed + (t * call.batch + b) * call.heads * call.words * call.tokens;
        for (long long token = i * part; token < std::min(call.tokens, (i + 1) * part); ++token)
            for (long long head = 0; head < call.heads; ++head) {
                const IO_T* from = token_at(call, t, b, token) + head * call.strides[3];
                uint32_t* to = packed + head * call.words * call.tokens + token;
                for (long long word = 0; word < call.words; ++word) {
                    uint32_t bits = 0;
                    const long long left = std::min(32LL, call.channels - 32 * word);
                    for_lanes(left, [&](long j, auto count) {
                        bits |= bits_of(spikes_at(from + 32 * word + j, count)) << j;
                    });
                    to[word * call.tokens] = bits;
                }
            }
    });
    return 0;
}

extern "C" int pack_tokens(const Call* arguments) {
    const Call& call = *arguments;
    for_parts(call, call.words, [&](long long t, long long b, long long word) {
        const long long row = call.words * call.channels;
        uint32_t* packed = call.packed + ((t * call.batch + b) * call.heads * call.words + word) * call.channels;
        for (long long head = 0; head < call.heads; ++head) std::fill_n(packed + head * row, call.channels, 0u);
        const long long begin = std::max(0LL, 32 * word - call.first);
        const long long end = std::min(call.tokens, 32 * (word + 1) - call.first);
        for (long long token = begin; token < end; ++token) {
            const uint32_t bit = 1u << (call.first + token) % 32;
            for (long long head = 0; head < call.heads; ++head) {
                const IO_T* from = token_at(call, t, b, token) + head * call.strides[3];
                uint32_t* to = packed + head * row;
                for_lanes(call.channels, [&](long j, auto count) {
                    const WordLanes before = bits_at<WordLanes>(to + j, count);
                    put(to + j, spikes_at(from + j, count) != 0 ? before | bit : before, count, 4, false);
                });
            }
        }
    });
    return 0;
}
