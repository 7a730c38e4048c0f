// SIMD lanes: what cuda/steps.cuh asks for, over a vector of STATE_T, and how they are loaded from and stored to memory.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define INLINE static inline __attribute__((always_inline))

struct half_t { uint16_t bits; };
struct bf16_t { uint16_t bits; };

// ---- lanes: what steps.cuh asks for

constexpr long LANES = VECTOR_BYTES / sizeof(STATE_T);
typedef std::conditional<sizeof(STATE_T) == 8, int64_t, int32_t>::type Integer;
typedef STATE_T Lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef Integer IntegerLanes __attribute__((vector_size(VECTOR_BYTES)));
// For 16-bit storage; the state is float then.
typedef float FloatLanes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t WordLanes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t ShortLanes __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int8_t ByteLanes __attribute__((vector_size(LANES)));

template <class R> INLINE R constant(double value) { return (STATE_T)value - R{}; }  // 0 - would change -0
constexpr Integer sign_bit = std::numeric_limits<Integer>::min();
INLINE Lanes absolute(Lanes x) { return (Lanes)((IntegerLanes)x & ~sign_bit); }
INLINE Lanes with_sign_of(Lanes magnitude, Lanes sign) {
    return (Lanes)((IntegerLanes)magnitude | ((IntegerLanes)sign & sign_bit));
}
INLINE Lanes truncate(Lanes x) { return __builtin_convertvector(__builtin_convertvector(x, IntegerLanes), Lanes); }

INLINE Lanes exponential(Lanes x) {
    if constexpr (sizeof(STATE_T) == 8) {
        for (long i = 0; i < LANES; ++i) x[i] = std::exp(x[i]);
        return x;
    } else {  // 2^n e^r, e^r by Cephes' polynomial: within 2 units of the last place
        x = x < (STATE_T)-87 ? constant<Lanes>(-87) : x;
        const Lanes n = truncate(x * (STATE_T)1.44269504088896341 - (STATE_T)0.5);
        const Lanes r = x - n * (STATE_T)0.693359375 - n * (STATE_T)-2.12194440e-4;
        Lanes y = constant<Lanes>(1.9875691500e-4);
        for (double c : {1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1})
            y = y * r + (STATE_T)c;
        y = y * r * r + r + (STATE_T)1;
        return y * (Lanes)((__builtin_convertvector(n, IntegerLanes) + 127) << 23);
    }
}

// ---- storage: `count` lanes at a pointer, all of them where count is the constant LANES

typedef std::integral_constant<long, LANES> All;

template <class V, class S> INLINE V bits_at(const S* at, All) {
    V value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
template <class V, class S> INLINE V bits_at(const S* at, long count) {
    V value{};
    std::memcpy(&value, at, count * sizeof(S));
    return value;
}

INLINE FloatLanes from_half(ShortLanes bits) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
    return (FloatLanes)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && VECTOR_BYTES == 32
    return (FloatLanes)_mm256_cvtph_ps((__m128i)bits);
#else
    FloatLanes value;
    for (unsigned long i = 0; i < sizeof bits / 2; ++i) {
        _Float16 half;
        const uint16_t word = bits[i];
        std::memcpy(&half, &word, 2);
        value[i] = (float)half;
    }
    return value;
#endif
}
INLINE ShortLanes to_half(FloatLanes value) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
    return (ShortLanes)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && VECTOR_BYTES == 32
    return (ShortLanes)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
    ShortLanes bits;
    for (unsigned long i = 0; i < sizeof bits / 2; ++i) {
        const _Float16 half = (_Float16)value[i];
        uint16_t word;
        std::memcpy(&word, &half, 2);
        bits[i] = word;
    }
    return bits;
#endif
}

template <class S, class Count> INLINE Lanes load(const S* at, Count count) {
    if constexpr (std::is_same<S, STATE_T>::value) {
        return bits_at<Lanes>(at, count);
    } else {  // 16 bits, the state is float
        const ShortLanes bits = bits_at<ShortLanes>(at, count);
        if constexpr (std::is_same<S, half_t>::value) return (Lanes)from_half(bits);
        return (Lanes)(__builtin_convertvector(bits, WordLanes) << 16);
    }
}

// All bytes of a vector past the cache, if `streams`: a line that is written whole need not be read before.
template <class V, class Count> INLINE void put(void* at, V value, Count count, long size, bool streams) {
    if constexpr (std::is_same<Count, All>::value) {
#if defined(__AVX512F__)
        if constexpr (sizeof value == 64)
            if (streams) return _mm512_stream_si512((__m512i*)at, (__m512i)value);
#endif
#if defined(__AVX__)
        if constexpr (sizeof value == 32)
            if (streams) return _mm256_stream_si256((__m256i*)at, (__m256i)value);
#endif
#if defined(__SSE2__)
        if constexpr (sizeof value == 16)
            if (streams) return _mm_stream_si128((__m128i*)at, (__m128i)value);
#endif
    }
    std::memcpy(at, &value, count * size);
}

template <class S, class Count> INLINE void store(S* at, Lanes value, Count count, bool streams = false) {
    if constexpr (std::is_same<S, STATE_T>::value) {
        put(at, value, count, sizeof(S), streams);
    } else if constexpr (std::is_same<S, signed char>::value) {
        const ByteLanes bytes = __builtin_convertvector(__builtin_convertvector(value, IntegerLanes), ByteLanes);
        put(at, bytes, count, 1, streams);
    } else if constexpr (std::is_same<S, half_t>::value) {
        put(at, to_half((FloatLanes)value), count, 2, streams);
    } else {  // to the nearest, ties to even; a NaN stays one
        const WordLanes bits = (WordLanes)value;
        const WordLanes nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const WordLanes words = (bits & 0x7fffffff) > 0x7f800000 ? (WordLanes{} + 0x7fc0) : nearest;
        put(at, __builtin_convertvector(words, ShortLanes), count, 2, streams);
    }
}

// The same for spikes, which are no NaN, and `normal`: one instruction rounds such numbers to bfloat16.
template <class S, class Count> INLINE void store_spikes(S* at, Lanes value, Count count, bool streams, bool normal) {
#if defined(__AVX512BF16__) && VECTOR_BYTES == 64
    if constexpr (std::is_same<S, bf16_t>::value)
        if (normal) return put(at, (ShortLanes)_mm512_cvtneps_pbh((__m512)value), count, 2, streams);
#endif
    (void)normal;
    store(at, value, count, streams);
}

template <class Body> INLINE void for_lanes(long n, Body body) {
    long j = 0;
    for (; j + LANES <= n; j += LANES) body(j, All{});
    if (j < n) body(j, n - j);
}

// Whether an output is too large to be found in a cache later, and may be streamed from `at` on.
INLINE bool streams_to(const void* at, long long bytes) {
    return bytes >= (4LL << 20) && (uintptr_t)at % 64 == 0;
}
INLINE void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
