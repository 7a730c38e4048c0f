// One token of every sequence through a block of a Llamba whose projections are all behind neurons: two norms, four banks,
// the mixer's convolution and scan, and the MLP, in one call. What is between two banks stays in float32.
//
// cpu/module.py puts the definitions before it and the included files in. IO_T is float; besides, HIDDEN_T is the type of
// the residual stream and of the convolution's state.

#include <initializer_list>

#include "parallel.hpp"
#include "lanes.hpp"
#include "bits.hpp"
#include "steps.cuh"
#include "projection.cuh"
#include "gather.hpp"
#include "codes.hpp"
#include "bank.hpp"

constexpr long long WORTH_THREADS_TO_SCAN = 1 << 16;  // numbers of the state

// Every member is 8 bytes; models/llamba/decoding.py packs it. Of a bank's Call, x and y are filled in here.
struct Block {
    HIDDEN_T* hidden;       // [tokens, d_model], in and out
    HIDDEN_T* conv_state;   // [tokens, conv_dim, d_conv], the newest input last
    float* state;           // [tokens, heads, head_dim, d_state]
    const float* input_norm;  // [d_model]
    const float* post_norm;   // [d_model]
    const float* taps;      // [conv_dim, d_conv]
    const float* conv_bias;  // [conv_dim]
    const float* z_bias;    // [d_inner]
    const float* D;         // [heads]
    long long tokens, d_model, d_inner, conv_dim, d_conv, heads, groups, head_dim, d_state;
    long long intermediate_size;
    long long activated;    // whether silu follows the convolution
    double epsilon;         // of both norms
    Call in_proj, out_proj, gate_up, down;
};

// ---- numbers

INLINE float widen(float value) { return value; }
INLINE float widen(bf16_t value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
INLINE float widen(half_t value) { return load(&value, 1L)[0]; }
template <class S> INLINE void narrow(float value, S& stored) { store(&stored, Lanes{} + value, 1L); }
INLINE void narrow(float value, float& stored) { stored = value; }

INLINE Lanes sigmoid(Lanes x) {
    const Lanes e = exponential(-absolute(x)), one = constant<Lanes>(1);
    return (x < constant<Lanes>(0) ? e : one) / (one + e);
}
INLINE Lanes silu(Lanes x) { return x * sigmoid(x); }
INLINE float sum_of(Lanes lanes) {
    float sum = 0;
    for (long i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

// ---- the parts of a block

static void normalise(const HIDDEN_T* x, const float* weight, double epsilon, long long size, float* out) {
    Lanes squares = {};
    for_lanes(size, [&](long j, auto count) {
        const Lanes value = load(x + j, count);
        squares = multiply_add(value, value, squares);
    });
    const Lanes factor = constant<Lanes>(1 / std::sqrt(sum_of(squares) / size + epsilon));
    for_lanes(size, [&](long j, auto count) {
        store(out + j, load(weight + j, count) * (load(x + j, count) * factor), count);
    });
}

static void add_to(HIDDEN_T* hidden, const float* more, long long size) {
    for_lanes(size, [&](long j, auto count) {
        store(hidden + j, load(hidden + j, count) + load(more + j, count), count);
    });
}

// Shifts the state by a token, and leaves the convolution's output in the place of its input.
static void convolve(const Block& block, long long token, float* xBC) {
    HIDDEN_T* state = block.conv_state + token * block.conv_dim * block.d_conv;
    for (long long c = 0; c < block.conv_dim; ++c) {
        HIDDEN_T* window = state + c * block.d_conv;
        for (long long k = 0; k + 1 < block.d_conv; ++k) window[k] = window[k + 1];
        narrow(xBC[c], window[block.d_conv - 1]);
        float sum = block.conv_bias ? block.conv_bias[c] : 0;
        for (long long k = 0; k < block.d_conv; ++k) sum += widen(window[k]) * block.taps[c * block.d_conv + k];
        xBC[c] = sum;
    }
    if (block.activated)
        for_lanes(block.conv_dim, [&](long j, auto count) { store(xBC + j, silu(load(xBC + j, count)), count); });
}

// S <- decay S + B x^T and y = C^T S + D x of one head.
static void scan_head(const Block& block, long long token, long long head, const float* projected, float* y) {
    const long long N = block.d_state, P = block.head_dim, group = head / (block.heads / block.groups);
    const float* x = projected + head * P;
    const float* B = projected + block.d_inner + group * N;
    const float* C = B + block.groups * N;
    const float A_log = projected[block.conv_dim + block.d_inner + head];
    const double softplus = A_log > 20 ? A_log : std::log1p(std::exp((double)A_log));
    const Lanes decay = constant<Lanes>(std::exp(-softplus));
    float* state = block.state + (token * block.heads + head) * P * N;
    for (long long p = 0; p < P; ++p, state += N) {
        const Lanes input = constant<Lanes>(x[p]);
        Lanes sums = {};
        for_lanes(N, [&](long j, auto count) {
            const Lanes S = multiply_add(input, load(B + j, count), load(state + j, count) * decay);
            store(state + j, S, count);
            sums = multiply_add(S, load(C + j, count), sums);
        });
        y[head * P + p] = sum_of(sums) + block.D[head] * x[p];
    }
}

static void mix(const Block& block, float* projected, long long row, float* y) {
    for (long long token = 0; token < block.tokens; ++token) convolve(block, token, projected + token * row);
    const long long scans = block.tokens * block.heads;
    const bool worth = scans * block.head_dim * block.d_state >= WORTH_THREADS_TO_SCAN;
    in_threads(worth ? block.in_proj.threads : 1, [&](long long thread, long long threads) {
        const Share share(scans, 1, thread, threads);
        for (long long i = share.from; i < share.to; ++i) {
            const long long token = i / block.heads;
            scan_head(block, token, i % block.heads, projected + token * row, y + token * block.d_inner);
        }
    });
    for (long long token = 0; token < block.tokens; ++token)
        for_lanes(block.d_inner, [&](long j, auto count) {
            Lanes z = load(projected + token * row + block.conv_dim + j, count);
            if (block.z_bias) z = z + load(block.z_bias + j, count);
            float* out = y + token * block.d_inner + j;
            store(out, load(out, count) * silu(z), count);
        });
}

static bool run_between(Call& call, const float* x, float* y, Workspace& workspace) {
    call.x = x;
    for (int i = 0; i < call.projections; ++i) {
        call.projection[i].y = y;
        y += call.tokens * call.projection[i].outputs;
    }
    return !run_bank(call, workspace);
}

extern "C" int step_block(Block* arguments) {
    static thread_local Workspace between, inside;
    Block& block = *arguments;
    const long long tokens = block.tokens, d_model = block.d_model, size = block.intermediate_size;
    const long long row = block.conv_dim + block.d_inner + block.heads;  // outputs of in_proj
    if (!between.reserve(between.bytes_of<float>(tokens * std::max(d_model, block.d_inner)) * 2 +
                         between.bytes_of<float>(tokens * std::max(row, 2 * size))))
        return 1;
    float* x = between.take<float>(tokens * std::max(d_model, block.d_inner));
    float* y = between.take<float>(tokens * std::max(d_model, block.d_inner));
    float* wide = between.take<float>(tokens * std::max(row, 2 * size));
    const auto normalised = [&](const float* weight) {
        for (long long t = 0; t < tokens; ++t)
            normalise(block.hidden + t * d_model, weight, block.epsilon, d_model, x + t * d_model);
    };

    normalised(block.input_norm);
    if (!run_between(block.in_proj, x, wide, inside)) return 1;
    mix(block, wide, row, y);
    if (!run_between(block.out_proj, y, x, inside)) return 1;
    add_to(block.hidden, x, tokens * d_model);

    normalised(block.post_norm);
    if (!run_between(block.gate_up, x, wide, inside)) return 1;
    for_lanes(tokens * size, [&](long j, auto count) {
        store(wide + j, silu(load(wide + j, count)) * load(wide + tokens * size + j, count), count);
    });
    if (!run_between(block.down, wide, y, inside)) return 1;
    add_to(block.hidden, y, tokens * d_model);
    return 0;
}
