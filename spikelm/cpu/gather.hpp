// Projections of spikes on the CPU: the list of active channels, and sums over their rows of the weights. Behind
// lanes.hpp, bits.hpp, steps.cuh and projection.cuh.

// One rounding instead of two where the processor can: the order of a sum over channels is nobody's definition.
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && VECTOR_BYTES == 32
    return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// The active channels of a bank, in order, and what its tokens have there.
struct Active {
    int* channels;
    float* values;              // [count, tokens]
    float totals[MOST_TOKENS];  // the sum of every token's values
    long long count;
};

template <int tokens> static void find_active(const Call& call, Active& active) {
    const Numbers<Lanes> numbers = numbers_of<Lanes>(call);
    float weights[MOST_STEPS];
    for (long long t = 0; t < call.T; ++t) weights[t] = (float)std::pow(call.frame_weight, (double)t);
    Lanes totals[tokens] = {};
    active.count = 0;
    for_lanes(call.channels, [&](long long first, auto some) {
        alignas(64) float values[tokens][LANES];
        const Lanes shared = constant<Lanes>(SPIKING ? call.threshold[0] : 1);
        const Lanes V = call.thresholds > 1 ? load(call.threshold + first, some) : shared;
        WordLanes fired = {};
        for (int token = 0; token < tokens; ++token) {
            const Lanes x = load(call.x + token * call.channels + first, some);
            const Lanes value = value_of(x, V, call, weights, numbers);
            fired |= (WordLanes)(value != constant<Lanes>(0));
            store(values[token], value, All{});
            totals[token] += load(values[token], some);  // a lane behind the last channel has no threshold and may fire
        }
        for (uint32_t bits = bits_of(fired) & lanes_below(some); bits; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            active.channels[active.count] = (int)first + lane;
            for (int token = 0; token < tokens; ++token)
                active.values[active.count * tokens + token] = values[token][lane];
            ++active.count;
        }
    });
    for (int token = 0; token < tokens; ++token) {
        active.totals[token] = 0;
        for (long i = 0; i < LANES; ++i) active.totals[token] += totals[token][i];
    }
}

// ---- weights that are numbers

// GCC's own conversion goes byte by byte.
INLINE IntegerLanes widen_bytes(ByteLanes bytes) {
#if defined(__AVX512F__)
    return (IntegerLanes)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    int64_t word;
    std::memcpy(&word, &bytes, sizeof word);
    return (IntegerLanes)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(word));
#else
    return __builtin_convertvector(bytes, IntegerLanes);
#endif
}

template <class W, class Count> INLINE Lanes weights_at(const W* at, Count count) {
    if constexpr (std::is_same<W, signed char>::value)
        return __builtin_convertvector(widen_bytes(bits_at<ByteLanes>(at, count)), Lanes);
    else
        return load(at, count);
}

// Adds `rows` active channels, from place `k` of the list on, to the sums of outputs from .. to.
template <int tokens, int rows>
INLINE void add_rows(
    const Active& active, long long k, const Projection& p, long long from, long long to, float* sums) {
    const WEIGHT_T* row[rows];
    for (int r = 0; r < rows; ++r)
        row[r] = (const WEIGHT_T*)((const char*)p.weights + active.channels[k + r] * p.stride) + from;
    Lanes values[rows][tokens];  // here, because a store to the sums might change what is in memory
    for (int r = 0; r < rows; ++r)
        for (int token = 0; token < tokens; ++token)
            values[r][token] = constant<Lanes>(active.values[(k + r) * tokens + token]);
    for_lanes(to - from, [&](long long j, auto count) {
        Lanes even[tokens], odd[tokens];  // two chains of additions that do not wait for each other
        for (int token = 0; token < tokens; ++token) {
            even[token] = k ? load(sums + token * p.outputs + from + j, count) : Lanes{};
            odd[token] = Lanes{};
        }
        for (int r = 0; r < rows; ++r) {
            const Lanes w = weights_at(row[r] + j, count);
            for (int token = 0; token < tokens; ++token) {
                Lanes& sum = r % 2 ? odd[token] : even[token];
                sum = multiply_add(values[r][token], w, sum);
            }
        }
        for (int token = 0; token < tokens; ++token)
            store(sums + token * p.outputs + from + j, even[token] + odd[token], count);
    });
}

template <int tokens>
static void sum_rows(const Active& active, const Projection& p, long long from, long long to, float* sums) {
    constexpr int rows = 8;  // whose values are in registers
    constexpr long long tile = 8192;  // outputs whose sums stay in a cache; shorter pieces of rows are read more slowly
    for (long long first = from; first < to; first += tile) {
        const long long last = std::min(to, first + tile);
        long long k = 0;
        for (; k + rows <= active.count; k += rows) add_rows<tokens, rows>(active, k, p, first, last, sums);
        for (; k < active.count; ++k) add_rows<tokens, 1>(active, k, p, first, last, sums);
    }
    for (int token = 0; active.count == 0 && token < tokens; ++token)
        std::fill(sums + token * p.outputs + from, sums + token * p.outputs + to, 0.f);
}

// From sums to y, of outputs from .. to.
template <int tokens>
static void finish_outputs(
    const Call& call, const Active& active, const Projection& p, long long from, long long to, const float* sums) {
    for (int token = 0; token < tokens; ++token)
        for_lanes(to - from, [&](long long offset, auto count) {
            const long long j = from + offset;
            const Lanes one = constant<Lanes>(p.scale ? p.scale[0] : 1);
            const Lanes scale = p.scales > 1 ? load(p.scale + j, count) : one;
            const Lanes bias = p.bias ? load(p.bias + j, count) : Lanes{};
            const Lanes sum = load(sums + token * p.outputs + j, count);
            store(p.y + token * p.outputs + j, output_of(sum, active.totals[token], scale, bias, call), count);
        });
}
