// The words of CUDA for a host compiler: SOURCE, one of those in cuda/module.py's KERNELS, runs thread by thread on the
// CPU, in an order of choice.
//
// A kernel with barriers has a fiber for every thread of a block, which stops at every barrier, shuffle and vote until
// all have come there; any other kernel is called once for every thread.

#include <math.h>  // C's headers alone: a build takes half the time
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__

struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim;

static float float_of_bits(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned bits_of_float(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float float_of_half(unsigned short bits) { _Float16 half; memcpy(&half, &bits, 2); return half; }
static unsigned short half_of_float(float value) {
    const _Float16 half = value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

struct Call;

namespace shim {

enum Schedule { FORWARD, REVERSE, SHUFFLED };

// 0 .. count - 1 in the order of a schedule.
struct Order {
    unsigned* indices;

    Order(unsigned count, int schedule) : indices((unsigned*)malloc(count * sizeof(unsigned))) {
        static unsigned random = 1;
        for (unsigned i = 0; i < count; ++i) indices[i] = schedule == REVERSE ? count - 1 - i : i;
        for (unsigned i = count; schedule == SHUFFLED && i > 1; --i) {
            random = random * 1664525 + 1013904223;
            const unsigned other = (random >> 8) % i, kept = indices[other];
            indices[other] = indices[i - 1];
            indices[i - 1] = kept;
        }
    }
    ~Order() { free(indices); }
    unsigned operator[](unsigned i) const { return indices[i]; }
};

constexpr unsigned most_threads = 1024;
constexpr size_t stack_size = 32 << 10;

struct Fiber {
    ucontext_t context;
    char* stack;
    bool done;
};

static Fiber fibers[most_threads];
static bool with_fibers;
static ucontext_t scheduler;
static double exchanged[most_threads];
static void (*body)(const Call&);
static const Call* argument;

static void fail(const char* message) {
    fprintf(stderr, "shim: %s\n", message);
    abort();
}

static void wait() {
    if (!with_fibers) fail("a barrier in a kernel that is run without fibers");
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

static void enter() {
    body(*argument);
    fibers[threadIdx.x].done = true;
}

// `together` threads, of a warp or a block, meet the same barriers.
static void run_fibers(unsigned threads, unsigned together, int schedule) {
    with_fibers = true;
    for (Fiber* fiber = fibers; fiber < fibers + threads; ++fiber) {
        if (!fiber->stack) fiber->stack = (char*)malloc(stack_size);
        fiber->done = false;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = stack_size;
        fiber->context.uc_link = &scheduler;
        makecontext(&fiber->context, enter, 0);
    }
    for (bool all_done = false; !all_done;) {
        const Order order(threads, schedule);
        for (unsigned i = 0; i < threads; ++i) {
            threadIdx.x = order[i];
            if (!fibers[threadIdx.x].done) swapcontext(&scheduler, &fibers[threadIdx.x].context);
        }
        all_done = true;
        for (unsigned first = 0; first < threads; first += together) {
            unsigned finished = 0;
            for (unsigned i = first; i < first + together; ++i) finished += fibers[i].done;
            if (finished != 0 && finished != together) fail("a barrier that not all threads reach that have to");
            all_done = all_done && finished;
        }
    }
    with_fibers = false;
}

}  // namespace shim

static void __syncthreads() { shim::wait(); }

static double __shfl_down_sync(unsigned, double value, int distance) {
    const unsigned thread = threadIdx.x;
    shim::exchanged[thread] = value;
    shim::wait();
    const double found = thread % 32 + distance < 32 ? shim::exchanged[thread + distance] : value;
    shim::wait();
    return found;
}

static unsigned __ballot_sync(unsigned, int vote) {
    const unsigned first = threadIdx.x / 32 * 32;
    shim::exchanged[threadIdx.x] = vote;
    shim::wait();
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= (unsigned)(shim::exchanged[first + lane] != 0) << lane;
    shim::wait();
    return votes;
}

static unsigned __popc(unsigned bits) { return __builtin_popcount(bits); }

#define QUOTED(text) #text
#define INCLUDED(name) QUOTED(name)
#include INCLUDED(SOURCE)

struct Body {
    void (*call)(const Call&);
    unsigned together;  // how many threads meet the same barriers: a warp, a block, or 0: there are none
};

#ifdef CHANNELS  // attention.cuh
static const Body bodies[] = {{[](const Call& c) { attend(c); }, 32}};
#elif defined CODE_BITS  // spike_linear.cuh
static const Body bodies[] = {
    {[](const Call& c) { find_active(c); }, shim::most_threads},
    {[](const Call& c) { gather(c); }, shim::most_threads},
    {[](const Call& c) { finish(c); }, 0}};
#else
static const Body bodies[] = {
    {[](const Call& c) { run(c); }, 0},
    {[](const Call& c) { prepare(c); }, 0},
    {[](const Call& c) { add_partials(c); }, shim::most_threads}};
#endif

// kernel: its place in spikelm.cuda.module.KERNELS.
extern "C" void launch(const Call* call, int kernel, unsigned blocks, unsigned threads, int schedule) {
    const unsigned together = bodies[kernel].together;
    shim::body = bodies[kernel].call;
    shim::argument = call;
    blockDim.x = threads;
    const shim::Order order(blocks, schedule);
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = order[i];
        if (together) {
            shim::run_fibers(threads, together < threads ? together : threads, schedule);
            continue;
        }
        const shim::Order of_threads(threads, schedule);
        for (unsigned j = 0; j < threads; ++j) {
            threadIdx.x = of_threads[j];
            shim::body(*call);
        }
    }
}

#if !defined CHANNELS && !defined CODE_BITS
// For the test of index arithmetic, which allocates nothing: where element i of x lies, and its threshold.
extern "C" long long element_of(unsigned block, unsigned thread) {
    blockIdx.x = block, threadIdx.x = thread, blockDim.x = 128;
    return thread_number();
}
extern "C" long long place_of(const Call* call, long long i) { return offset_of(i, call->a, call->a.x_strides); }
extern "C" double threshold_of(const Call* call, long long i) {
    STATE_T V[VECTOR];
    thresholds_of(i, call->a, V);
    return V[VECTOR - 1];
}
#endif
