// The CPU's driver over the step functions of cuda/steps.cuh: tiles of a row that stay in the cache, SIMD lanes over a
// tile's elements. cpu/module.py puts the definitions before it and the two included files in.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <omp.h>

#include "lanes.hpp"
#include "steps.cuh"

// ---- tiles

constexpr long MOST = 1024;         // elements of a tile
constexpr long CACHED = 8 * MOST;   // elements of all steps of a tile that should stay in the cache

struct Tile {
    long long first;             // its first element's place in the frame
    long n;
    long long x, grad_spikes;    // offsets of that element, in elements
};

struct Tiling {
    const Arguments& a;
    long size;
    long long per_row, count;

    Tiling(const Arguments& arguments, long size) : a(arguments), size(size) {
        per_row = (a.length + size - 1) / size;
        count = per_row * a.rows;
    }
    Tile operator[](long long i) const {
        long long row = i / per_row;
        const long long offset = i % per_row * size;
        Tile tile{row * a.length + offset, (long)std::min<long long>(size, a.length - offset), offset, offset};
        for (int axis = 3; axis >= 0; --axis) {
            if (a.sizes[axis] == 0) continue;
            tile.x += row % a.sizes[axis] * a.x_strides[axis];
            tile.grad_spikes += row % a.sizes[axis] * a.grad_strides[axis];
            row /= a.sizes[axis];
        }
        return tile;
    }
};

// The size depends on the sizes of the call alone, so that no sum depends on the number of threads.
static long size_for(const Arguments& a) {
    const long cached = std::max<long>(64, std::min<long>(MOST, CACHED / a.T / 64 * 64));
    return std::min<long long>(cached, (a.length + 63) / 64 * 64);
}

// body(from, to) in every thread, over its share of 0 .. count. A single thread does without OpenMP, whose start costs
// as much as a small kernel.
template <class Body> static void in_parallel(long long count, long long threads, const Body& body) {
    if (threads <= 1) {
        body(0LL, count);
        return finish_streams();
    }
#pragma omp parallel num_threads(threads)
    {
        const long long i = omp_get_thread_num(), n = omp_get_num_threads();
        body(count * i / n, count * (i + 1) / n);
        finish_streams();
    }
}

// body(j, run, channel, row) for each run of a tile's elements, from j on: of one channel, or a `row` of successive ones.
template <class Body> INLINE void for_channels(const Arguments& a, const Tile& tile, const Body& body) {
    long long channel = tile.first / a.inner % a.channels, left = a.inner - tile.first % a.inner;
    if (a.channels == 1) return body(0L, tile.n, 0LL, false);
    const bool row = a.inner == 1;
    for (long j = 0; j < tile.n; left = a.inner) {
        const long run = std::min<long long>(tile.n - j, row ? a.channels - channel : left);
        body(j, run, channel, row);
        channel = row || channel + 1 == a.channels ? 0 : channel + 1;
        j += run;
    }
}

// Thresholds and their inverses of a tile's elements: of a single channel filled in once, else for every tile.
struct Thresholds {
    const Arguments& a;
    alignas(64) STATE_T values[MOST];
    alignas(64) STATE_T inverses[MOST];

    explicit Thresholds(const Arguments& arguments) : a(arguments) {
        const long n = std::min<long long>(MOST, (a.length + LANES - 1) / LANES * LANES);
        std::fill(values, values + n, a.threshold[0]);
        if (a.grad_x) invert(n);
    }
    void at(const Tile& tile) {
        if (a.channels == 1) return;
        for_channels(a, tile, [&](long j, long run, long long channel, bool row) {
            if (row)
                std::memcpy(values + j, a.threshold + channel, run * sizeof(STATE_T));
            else
                std::fill(values + j, values + j + run, a.threshold[channel]);
        });
        if (a.grad_x) invert(tile.n);
    }
    void invert(long n) {
        for (long j = 0; j < n; ++j) inverses[j] = 1 / values[j];
    }
};

// Numbers on the stack, or on the heap where they are more than `most`; null if there is no memory.
template <long most> struct Buffer {
    alignas(64) STATE_T few[most];
    STATE_T* values = few;

    explicit Buffer(long long count) {
        if (count > most) values = (STATE_T*)std::aligned_alloc(64, (count * sizeof(STATE_T) + 63) / 64 * 64);
    }
    ~Buffer() {
        if (values != few) std::free(values);
    }
};

// factor * base^t of every step.
struct Powers : Buffer<64> {
    Powers(long long T, double base, double factor = 1) : Buffer(T) {
        for (long long t = 0; values && t < T; ++t) values[t] = (STATE_T)(factor * std::pow(base, (double)t));
    }
};

// ---- forward

template <bool injects> INLINE void step_tile(
    const IO_T* x, SPIKE_T* spikes, bool streams, STATE_T* v, STATE_T* h, const STATE_T* threshold, long n,
    const Numbers<Lanes>& numbers) {
    for_lanes(n, [&](long j, auto count) {
        const Lanes input = injects ? load(x + j, count) : Lanes{};
        const Stepped<Lanes> at = step<injects>(input, load(v + j, All{}), load(threshold + j, All{}), numbers);
        if (spikes) store_spikes(spikes + j, at.spikes, count, streams, true);
        if (h) store(h + j, at.h, All{});
        store(v + j, at.v, All{});
    });
}

static void start_tile(const Arguments& a, const Tile& tile, STATE_T* v) {
    if (a.v)
        std::memcpy(v, a.v + tile.first, tile.n * sizeof(STATE_T));
    else
        std::fill(v, v + tile.n, (STATE_T)a.start);
}

// Takes a tile's membranes through all steps: to the spikes, in a forward; to h, `size` elements a step, in a backward.
template <bool once> INLINE void run_steps(
    const Arguments& a, const Tile& tile, const STATE_T* threshold, STATE_T* v, STATE_T* h, long size,
    const Numbers<Lanes>& numbers) {
    for (long long t = 0; t < a.T; ++t) {
        SPIKE_T* spikes = h ? nullptr : a.spikes + t * a.frame + tile.first;
        const bool streams = !h && streams_to(spikes, a.T * a.frame * sizeof(SPIKE_T));
        const IO_T* x = a.x + tile.x + (once ? 0 : t * a.x_step);
        STATE_T* kept = h ? h + t * size : nullptr;
        if (!once || (t == 0 && !a.started))
            step_tile<true>(x, spikes, streams, v, kept, threshold, tile.n, numbers);
        else
            step_tile<false>(x, spikes, streams, v, kept, threshold, tile.n, numbers);
    }
}

extern "C" int forward(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const Numbers<Lanes> numbers = numbers_of<Lanes>(a);
    const Tiling tiles(a, MOST);
    in_parallel(tiles.count, a.threads, [&](long long from, long long to) {
        Thresholds thresholds(a);
        alignas(64) STATE_T v[MOST];
        for (long long i = from; i < to; ++i) {
            const Tile tile = tiles[i];
            thresholds.at(tile);
            start_tile(a, tile, v);
            run_steps<INJECT_FIRST>(a, tile, thresholds.values, v, nullptr, 0, numbers);
            if (!a.v_last) continue;
            const bool streams = streams_to(a.v_last + tile.first, a.frame * sizeof(STATE_T));
            for_lanes(tile.n, [&](long j, auto count) {
                store(a.v_last + tile.first + j, load(v + j, All{}), count, streams);
            });
        }
    });
    return 0;
}

extern "C" int forward_sum(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const Numbers<Lanes> numbers = numbers_of<Lanes>(a);
    const Tiling tiles(a, MOST);
    const Powers weights(a.T, a.frame_weight);
    int exponent;  // of the decay; V / decay^t has to stay a normal number
    const bool scaled = a.channels == 1 && a.threshold[0] > 1e-30 && a.threshold[0] < 1e30 &&
                        std::frexp(a.decay, &exponent) == 0.5 && std::abs(exponent - 1) * a.T <= 24;
    const Powers quotients(scaled ? a.T : 1, 1 / a.decay, a.threshold[0]);
    if (!weights.values || !quotients.values) return 1;
    const bool normal = weights.values[a.T - 1] > 1e-30;  // then no sum but 0 is subnormal
    in_parallel(tiles.count, a.threads, [&](long long from, long long to) {
        Thresholds thresholds(a);
        for (long long i = from; i < to; ++i) {
            const Tile tile = tiles[i];
            const bool streams = streams_to(a.spikes + tile.first, a.frame * sizeof(SPIKE_T));
            thresholds.at(tile);
            const auto several = [&](long j, auto many, auto count) {
                Lanes x[many], V[many], total[many];
                for (int k = 0; k < many; ++k) {
                    x[k] = load(a.x + tile.x + j + k * LANES, count);
                    V[k] = load(thresholds.values + j + k * LANES, All{});
                }
                const auto quotient = [&](long long t, int) { return constant<Lanes>(quotients.values[t]); };
                const auto threshold = [&](long long, int k) { return V[k]; };
                if (scaled)
                    sums_of_spikes<true, many>(x, quotient, total, a.T, weights.values, numbers);
                else
                    sums_of_spikes<false, many>(x, threshold, total, a.T, weights.values, numbers);
                for (int k = 0; k < many; ++k) {
                    if (sizeof(SPIKE_T) == 1) total[k] = total[k] * (STATE_T)a.sum_scale;
                    store_spikes(a.spikes + tile.first + j + k * LANES, total[k], count, streams, normal);
                }
            };
            constexpr int many = 4;
            long j = 0;
            for (; j + many * LANES <= tile.n; j += many * LANES) several(j, std::integral_constant<int, many>{}, All{});
            for (; j + LANES <= tile.n; j += LANES) several(j, std::integral_constant<int, 1>{}, All{});
            if (j < tile.n) several(j, std::integral_constant<int, 1>{}, tile.n - j);
        }
    });
    return 0;
}

// ---- backward: h of every step is computed again and stays in the cache, then the steps are walked back

struct Carried {
    alignas(64) STATE_T gradient[MOST];
    alignas(64) STATE_T threshold[MOST];
};

// One step back: `grads` of its spikes times `weight`, or none; writes dL/dx to `grad_x` if there is one.
template <bool of_threshold> static void step_back(
    const STATE_T* h, const Thresholds& thresholds, const IO_T* grads, STATE_T weight, const STATE_T* grad_v_last,
    IO_T* grad_x, bool streams, Carried& carried, long n, const Numbers<Lanes>& numbers) {
    for_lanes(n, [&](long j, auto count) {
        const Lanes V = load(thresholds.values + j, All{}), inverse = load(thresholds.inverses + j, All{});
        const Lanes grad_spikes = grads ? load(grads + j, count) * weight : Lanes{};
        const Lanes extra = grad_v_last ? load(grad_v_last + j, count) : Lanes{};
        const Gradients<Lanes> g = gradient(
            load(h + j, All{}), V, inverse, grad_spikes, load(carried.gradient + j, All{}), extra, numbers);
        store(carried.gradient + j, g.carry, All{});
        if (of_threshold) store(carried.threshold + j, load(carried.threshold + j, All{}) + g.threshold, All{});
        if (grad_x) store(grad_x + j, g.h, count, streams);
    });
}

// Runs of one channel are summed over lanes first, rows of channels added lane by lane.
static void add_to_channels(const Arguments& a, const Tile& tile, const STATE_T* values, double* channels) {
    for_channels(a, tile, [&](long j, long run, long long channel, bool row) {
        if (row) {
            for (long k = 0; k < run; ++k) channels[channel + k] += values[j + k];
            return;
        }
        double lanes[8] = {};
        long k = 0;
        for (; k + 8 <= run; k += 8)
            for (long lane = 0; lane < 8; ++lane) lanes[lane] += values[j + k + lane];
        for (; k < run; ++k) lanes[0] += values[j + k];
        for (double sum : lanes) channels[channel] += sum;
    });
}

template <bool sum> static void back_tile(
    const Arguments& a, const Tile& tile, const Thresholds& thresholds, STATE_T* h, long size, const STATE_T* weights,
    Carried& carried, const Numbers<Lanes>& numbers) {
    constexpr bool delayed = reset_kind == SOFT_DELAYED, once = INJECT_FIRST || sum;
    alignas(64) STATE_T v[MOST];
    start_tile(a, tile, v);
    run_steps<once>(a, tile, thresholds.values, v, h, size, numbers);
    const long padded = std::min<long>(MOST, (tile.n + LANES - 1) / LANES * LANES);
    std::fill(carried.gradient, carried.gradient + padded, (STATE_T)0);
    std::fill(carried.threshold, carried.threshold + padded, (STATE_T)0);
    if (a.grad_v_last && !delayed) std::memcpy(carried.gradient, a.grad_v_last + tile.first, tile.n * sizeof(STATE_T));
    for (long long t = a.T - 1; t >= 0; --t) {
        const IO_T* grads = a.grad_spikes ? a.grad_spikes + tile.grad_spikes + (sum ? 0 : t * a.grad_step) : nullptr;
        const STATE_T* last = delayed && t == a.T - 1 && a.grad_v_last ? a.grad_v_last + tile.first : nullptr;
        IO_T* grad_x = once && (t > 0 || a.started) ? nullptr : a.grad_x + (once ? 0 : t * a.frame) + tile.first;
        const bool streams = streams_to(grad_x, (once ? 1 : a.T) * a.frame * sizeof(IO_T));
        const auto step = a.grad_threshold ? step_back<true> : step_back<false>;
        step(h + t * size, thresholds, grads, sum ? weights[t] : 1, last, grad_x, streams, carried, tile.n, numbers);
    }
    if (a.grad_v || (delayed && a.grad_threshold)) {
        start_tile(a, tile, v);
        for_lanes(tile.n, [&](long j, auto count) {
            const Lanes V = load(thresholds.values + j, All{}), inverse = load(thresholds.inverses + j, All{});
            const Gradients<Lanes> g =
                gradient_of_start(load(v + j, All{}), V, inverse, load(carried.gradient + j, All{}), numbers);
            if (a.grad_v) store(a.grad_v + tile.first + j, g.carry, count);
            store(carried.threshold + j, load(carried.threshold + j, All{}) + g.threshold, All{});
        });
    }
}

// Tiles are taken in chunks whose number depends on the sizes alone; each chunk sums its own thresholds' gradients.
template <bool sum> static int back(const Arguments& a) {
    const Numbers<Lanes> numbers = numbers_of<Lanes>(a);
    const long size = size_for(a);
    const Tiling tiles(a, size);
    long long chunks = tiles.count;
    if (a.grad_threshold) chunks = std::max(1LL, std::min({chunks, 64LL, a.frame / (4 * a.channels)}));
    double* sums = a.grad_threshold ? (double*)std::calloc(chunks * a.channels, sizeof(double)) : nullptr;
    const Powers weights(sum ? a.T : 1, a.frame_weight);
    std::atomic<bool> failed{!weights.values || (a.grad_threshold && !sums)};
    in_parallel(failed ? 0 : chunks, a.threads, [&](long long from, long long to) {
        Thresholds thresholds(a);
        Carried carried;
        Buffer<CACHED> h(a.T * size);
        if (!h.values) failed = true;
        for (long long chunk = from; chunk < to && !failed; ++chunk) {
            for (long long i = chunk * tiles.count / chunks; i < (chunk + 1) * tiles.count / chunks; ++i) {
                const Tile tile = tiles[i];
                thresholds.at(tile);
                back_tile<sum>(a, tile, thresholds, h.values, size, weights.values, carried, numbers);
                if (sums) add_to_channels(a, tile, carried.threshold, sums + chunk * a.channels);
            }
        }
    });
    for (long long channel = 0; sums && channel < a.channels; ++channel) {
        double total = 0;
        for (long long chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * a.channels + channel];
        a.grad_threshold[channel] = total;
    }
    std::free(sums);
    return failed;
}

extern "C" int backward(const Arguments* arguments) { return back<false>(*arguments); }
extern "C" int backward_sum(const Arguments* arguments) { return back<true>(*arguments); }
