// Projections of spikes on a GPU over the functions of projection.cuh, in three launches: `find_active` lists active
// channels, `gather` sums their rows of the weights in parts, `finish` adds the parts up. How many channels are active
// stays on the device, and no sum depends on which thread was first. cuda/spike_linear.py calls them.
//
// What a build defines before: what projection.cuh asks for (but INLINE), and
//   TOKENS  Call.tokens
//   BYTES   of a row that a thread loads at once, a power of 2 up to 16 (codes: up to 4): every row's address is a
//           multiple of it, and the length of rows of numbers
// Of a Call `threads` is how many parts the list is split into for blocks; `most` is not used.

#include "scalars.cuh"
#include "projection.cuh"

constexpr int WARP = 32;
constexpr int WARPS = 8;                              // of a block of gather, each with its part of the block's part
constexpr int AHEAD = BYTES * TOKENS > 32 ? 4 : 8;    // rows that a thread loads before it adds any
constexpr int CODES = CODE_BITS ? 8 / CODE_BITS : 1;  // of a byte
constexpr int CODE_BLOCK = 16;                        // bytes whose outputs lie side by side
constexpr int OWNED = CODE_BITS ? BYTES * CODES : BYTES / (int)sizeof(WEIGHT_T);  // outputs of a thread
constexpr int TILE = WARP * OWNED;                    // outputs of a block: neighbours

// Codes times integers are integers up to 254, of which int holds the sum of 8 million, whereas conversions to float
// take longer than products.
#if CODE_BITS
typedef int Value;
#else
typedef float Value;
#endif

INLINE float widen(signed char value) { return value; }
INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
INLINE int multiply_add(int a, int b, int c) { return a * b + c; }

// ---- places

// Memory between the launches, behind the count, which is Call.active.
struct Scratch {
    float* totals;    // [TOKENS], the sum of every token's values
    int* channels;    // [count], the active ones in order
    Value* values;    // [count, TOKENS]
    float* all;       // [TOKENS, channels], the values of every channel
    Value* partials;  // [parts, TOKENS, tiles of all projections, TILE]
};

INLINE Scratch scratch_of(const Call& call) {
    float* totals = static_cast<float*>(call.scratch) + 4;
    float* all = totals + 4;
    int* channels = reinterpret_cast<int*>(all + TOKENS * call.channels);
    Value* values = reinterpret_cast<Value*>(channels + call.channels);
    return {totals, channels, values, all, values + TOKENS * call.channels};
}

INLINE long long tiles_of(const Projection& p) { return (p.outputs + TILE - 1) / TILE; }
INLINE long long tiles_of(const Call& call) {
    long long tiles = 0;
    for (int i = 0; i < call.projections; ++i) tiles += tiles_of(call.projection[i]);
    return tiles;
}

// A tile of a bank: of which projection, and which one there.
struct Tile {
    int projection;
    long long number;
};

INLINE Tile tile_of(long long tile, const Call& call) {
    int i = 0;
    for (; tile >= tiles_of(call.projection[i]); ++i) tile -= tiles_of(call.projection[i]);
    return {i, tile};
}

// ---- the list of active channels, by one block

extern "C" __global__ void __launch_bounds__(1024) find_active(const __grid_constant__ Call call) {
    __shared__ float weights[MOST_STEPS], sums[TOKENS][WARP];
    __shared__ int counts[WARP];
    const Scratch scratch = scratch_of(call);
    const Numbers<float> numbers = numbers_of<float>(call);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (long long t = threadIdx.x; t < call.T; t += blockDim.x) weights[t] = (float)pow(call.frame_weight, (double)t);
    __syncthreads();

    // A warp has neighbouring channels, 32 at a time, and every warp as many times.
    const long long times = (call.channels + blockDim.x - 1) / blockDim.x, first = warp * times * WARP + lane;
    float totals[TOKENS] = {};
    int count = 0;
    for (long long i = 0; i < times; ++i) {
        const long long channel = first + i * WARP;
        bool active = false;
        if (channel < call.channels) {
            const float V = SPIKING ? call.threshold[call.thresholds > 1 ? channel : 0] : 1;
            UNROLL for (int token = 0; token < TOKENS; ++token) {
                const float x = widen(call.x[token * call.channels + channel]);
                const float value = value_of(x, V, call, weights, numbers);
                scratch.all[token * call.channels + channel] = value;
                totals[token] += value;
                active = active || value != 0;
            }
        }
        count += __popc(__ballot_sync(0xffffffff, active));
    }
    UNROLL for (int token = 0; token < TOKENS; ++token) {
        UNROLL for (int distance = WARP / 2; distance > 0; distance /= 2)
            totals[token] += __shfl_down_sync(0xffffffff, totals[token], distance);
        if (lane == 0) sums[token][warp] = totals[token];
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();

    long long place = 0;
    for (int before = 0; before < warp; ++before) place += counts[before];
    for (long long i = 0; i < times; ++i) {
        const long long channel = first + i * WARP;
        float values[TOKENS] = {};
        bool active = false;
        UNROLL for (int token = 0; token < TOKENS; ++token) {
            if (channel < call.channels) values[token] = scratch.all[token * call.channels + channel];
            active = active || values[token] != 0;
        }
        const unsigned votes = __ballot_sync(0xffffffff, active);
        const long long mine = place + __popc(votes & ((1u << lane) - 1));
        if (active) {
            scratch.channels[mine] = (int)channel;
            UNROLL for (int token = 0; token < TOKENS; ++token)
                scratch.values[mine * TOKENS + token] = (Value)values[token];
        }
        place += __popc(votes);
    }
    if (threadIdx.x == blockDim.x - 1) *call.active = place;
    if (threadIdx.x < TOKENS) {
        float total = 0;
        for (int i = 0; i < warps; ++i) total += sums[threadIdx.x][i];
        scratch.totals[threadIdx.x] = total;
    }
}

// ---- sums over parts of the list

// What a thread loads of a row.
#if CODE_BITS
template <int bytes> struct WordOf { typedef unsigned type; };
template <> struct WordOf<2> { typedef unsigned short type; };
template <> struct WordOf<1> { typedef unsigned char type; };
typedef WordOf<BYTES>::type Pack;
// Code i: BYTES neighbouring outputs have the lowest codes of the bytes, as many have the next ones.
INLINE int weight_of(Pack codes, int i) {
    return ((unsigned)codes >> (i % BYTES * 8 + i / BYTES * CODE_BITS)) & ((1 << CODE_BITS) - 1);
}
#else
struct alignas(BYTES) Pack {
    WEIGHT_T at[OWNED];
};
INLINE float weight_of(const Pack& weights, int i) { return widen(weights.at[i]); }
#endif

// Which lane's sum, and which of its sums, output `o` of a tile is.
struct Owner {
    int lane, place;
};

INLINE Owner owner_of(int o) {
    if constexpr (CODE_BITS == 0) return {o / OWNED, o % OWNED};
    const int byte = o / (CODE_BLOCK * CODES) * CODE_BLOCK + o % CODE_BLOCK;
    return {byte / BYTES, o / CODE_BLOCK % CODES * BYTES + byte % BYTES};
}

// Adds `rows` active channels, from place `k` of the list on, to the sums of a thread.
template <int rows>
INLINE void add_rows(
    const Scratch& scratch, const char* weights, long long stride, long long k, Value (&sums)[TOKENS][OWNED]) {
    Pack packs[rows];
    UNROLL for (int r = 0; r < rows; ++r)
        packs[r] = *reinterpret_cast<const Pack*>(weights + scratch.channels[k + r] * stride);
    UNROLL for (int r = 0; r < rows; ++r) {
        Value values[TOKENS];
        UNROLL for (int token = 0; token < TOKENS; ++token) values[token] = scratch.values[(k + r) * TOKENS + token];
        UNROLL for (int i = 0; i < OWNED; ++i) {
            const Value weight = weight_of(packs[r], i);
            UNROLL for (int token = 0; token < TOKENS; ++token)
                sums[token][i] = multiply_add(values[token], weight, sums[token][i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) gather(const __grid_constant__ Call call) {
    __shared__ Value shared[WARPS][OWNED][WARP + 1];  // of one token; one more lane: fewer conflicts of banks
    const Scratch scratch = scratch_of(call);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long tiles = tiles_of(call), part = blockIdx.x / tiles;
    const Tile tile = tile_of(blockIdx.x - part * tiles, call);
    const Projection& p = call.projection[tile.projection];
    const long long row = CODE_BITS ? (p.outputs + CODE_BLOCK * CODES - 1) / (CODE_BLOCK * CODES) * CODE_BLOCK
                                    : p.outputs * (long long)sizeof(WEIGHT_T);
    const long long at = (tile.number * WARP + lane) * BYTES;

    Value sums[TOKENS][OWNED] = {};
    if (at < row) {
        const long long count = *call.active, parts = call.threads * WARPS, mine = part * WARPS + warp;
        const char* weights = reinterpret_cast<const char*>(p.weights) + at;
        const long long end = count * (mine + 1) / parts;
        long long k = count * mine / parts;
        for (; k + AHEAD <= end; k += AHEAD) add_rows<AHEAD>(scratch, weights, p.stride, k, sums);
        for (; k < end; ++k) add_rows<1>(scratch, weights, p.stride, k, sums);
    }
    UNROLL for (int token = 0; token < TOKENS; ++token) {
        UNROLL for (int i = 0; i < OWNED; ++i) shared[warp][i][lane] = sums[token][i];
        __syncthreads();
        Value* partials = scratch.partials + ((part * TOKENS + token) * tiles + blockIdx.x - part * tiles) * TILE;
        for (int o = threadIdx.x; o < TILE; o += WARPS * WARP) {
            const Owner owner = owner_of(o);
            Value sum = 0;
            UNROLL for (int w = 0; w < WARPS; ++w) sum += shared[w][owner.place][owner.lane];
            partials[o] = sum;
        }
        __syncthreads();
    }
}

// A thread for every output of every token.
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ Call call) {
    const Scratch scratch = scratch_of(call);
    const long long outputs = tiles_of(call) * TILE, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long token = i / outputs;
    if (token >= TOKENS) return;
    const Tile tile = tile_of((i - token * outputs) / TILE, call);
    const Projection& p = call.projection[tile.projection];
    const long long output = tile.number * TILE + i % TILE;
    if (output >= p.outputs) return;
    Value sum = 0;
    for (long long part = 0; part < call.threads; ++part) sum += scratch.partials[part * TOKENS * outputs + i];
    const float scale = p.scale ? p.scale[p.scales > 1 ? output : 0] : 1, bias = p.bias ? p.bias[output] : 0;
    narrow(output_of((float)sum, scratch.totals[token], scale, bias, call), p.y[token * p.outputs + output]);
}
