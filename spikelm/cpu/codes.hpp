// Sums over packed codes of 1 or 2 bits, of the layout that spikelm/ops/weight_quantization.py describes. Behind gather.hpp.
//
// Active channels are grouped by their value, whose codes are counted in bytes, all outputs of a register at a time; a
// group's counts then are multiplied by the value once. No weight is multiplied or converted.

constexpr int LARGEST = 127;           // of a value's magnitude
constexpr int BLOCK = 16;              // bytes of a packed block
constexpr int CODES = CODE_BITS ? 8 / CODE_BITS : 1;  // of a byte
constexpr int AHEAD = 8;               // rows that are asked for before they are needed
constexpr int MOST_COUNTED = CODE_BITS == 1 ? 255 : 127;  // channels whose codes a byte can count
// Codes are first added two to a field, every other one at a time, which takes half the instructions.
constexpr int FIELD_BITS = 2 * CODE_BITS;
constexpr int MOST_IN_FIELD = CODE_BITS == 1 ? 3 : 7;
constexpr uint8_t EVERY_OTHER = CODE_BITS == 1 ? 0x55 : 0x33, LOWEST_FIELD = (1 << FIELD_BITS) - 1;

// The channels of one token, grouped by value.
struct Groups {
    int* channels;
    int first[2 * LARGEST + 2];  // the group of value v starts at first[v + LARGEST] and ends where the next one starts
};

static void group(const Active& active, int token, long long tokens, Groups& groups) {
    int counts[2 * LARGEST + 2] = {};
    for (long long k = 0; k < active.count; ++k) ++counts[(int)active.values[k * tokens + token] + LARGEST + 1];
    for (int v = 0; v <= 2 * LARGEST; ++v) counts[v + 1] += counts[v];
    std::memcpy(groups.first, counts, sizeof counts);
    for (long long k = 0; k < active.count; ++k)
        groups.channels[counts[(int)active.values[k * tokens + token] + LARGEST]++] = active.channels[k];
}

template <int bytes> struct Register {
    typedef uint8_t Bytes __attribute__((vector_size(bytes)));
    typedef uint16_t Shorts __attribute__((vector_size(bytes)));
};
typedef uint8_t BlockBytes __attribute__((vector_size(BLOCK)));
typedef int32_t BlockInts __attribute__((vector_size(BLOCK * 4)));

INLINE BlockInts widen_block(BlockBytes bytes) {
#if defined(__AVX512F__)
    return (BlockInts)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, BlockInts);
#endif
}

// Adds value times the codes of channels[0 .. count) to the sums of the outputs whose codes `registers` registers hold
// from byte `at` of every row on.
template <int bytes, int registers>
INLINE void add_codes(const Projection& p, const int* channels, long long count, int value, long long at, int32_t* sums) {
    typedef typename Register<bytes>::Bytes Bytes;
    typedef typename Register<bytes>::Shorts Shorts;
    const unsigned char* codes = (const unsigned char*)p.weights + at;
    Bytes counted[registers][CODES] = {};
    for (long long first = 0; first < count; first += MOST_IN_FIELD) {
        Bytes fields[registers][2] = {};
        for (long long k = first; k < std::min(count, first + MOST_IN_FIELD); ++k) {
            const unsigned char* row = codes + channels[k] * p.stride;
            const unsigned char* later = codes + channels[std::min(k + AHEAD, count - 1)] * p.stride;
            for (int line = 0; line < registers * bytes; line += 64) __builtin_prefetch(later + line);
            for (int r = 0; r < registers; ++r) {
                Shorts word;
                std::memcpy(&word, row + r * bytes, bytes);
                fields[r][0] += (Bytes)word & EVERY_OTHER;
                fields[r][1] += (Bytes)(word >> CODE_BITS) & EVERY_OTHER;
            }
        }
        for (int r = 0; r < registers; ++r)
            for (int c = 0; c < CODES; ++c)
                counted[r][c] += (Bytes)((Shorts)fields[r][c % 2] >> (c / 2 * FIELD_BITS)) & LOWEST_FIELD;
    }
    for (int r = 0; r < registers; ++r)
        for (int c = 0; c < CODES; ++c)
            for (int b = 0; b < bytes / BLOCK; ++b) {
                BlockBytes block;
                std::memcpy(&block, (const char*)&counted[r][c] + b * BLOCK, BLOCK);
                int32_t* to = sums + (r * bytes + b * BLOCK) * CODES + c * BLOCK;
                BlockInts sum;
                std::memcpy(&sum, to, sizeof sum);
                sum += widen_block(block) * value;
                std::memcpy(to, &sum, sizeof sum);
            }
}

template <int bytes, int registers>
static void sum_codes(const Projection& p, const Groups& groups, long long at, int32_t* sums) {
    std::fill(sums, sums + bytes * registers * CODES, 0);
    for (int v = -LARGEST; v <= LARGEST; ++v)
        for (long long k = groups.first[v + LARGEST]; k < groups.first[v + LARGEST + 1]; k += MOST_COUNTED) {
            const long long count = std::min<long long>(MOST_COUNTED, groups.first[v + LARGEST + 1] - k);
            add_codes<bytes, registers>(p, groups.channels + k, count, v, at, sums);
        }
}

// The outputs of a token whose codes are in bytes from .. to of a row, as sums.
static void sum_packed(const Projection& p, const Groups& groups, long long from, long long to, float* sums) {
    constexpr int most = CODE_BITS == 1 ? 2 : 4;  // registers that are counted at once
    alignas(64) int32_t counts[most * VECTOR_BYTES * CODES];
    const auto tiles = [&](auto bytes, auto registers) {
        constexpr int width = bytes() * registers();
        for (; from + width <= to; from += width) {
            sum_codes<bytes(), registers()>(p, groups, from, counts);
            const long long first = from * CODES, count = std::min<long long>(width * CODES, p.outputs - first);
            for (long long i = 0; i < count; ++i) sums[first + i] = (float)counts[i];
        }
    };
    tiles(std::integral_constant<int, VECTOR_BYTES>{}, std::integral_constant<int, most>{});
    tiles(std::integral_constant<int, VECTOR_BYTES>{}, std::integral_constant<int, 1>{});
    tiles(std::integral_constant<int, BLOCK>{}, std::integral_constant<int, 1>{});
}
