// Work shared among threads, and memory that a thread keeps from call to call.

#include <algorithm>
#include <cstdlib>
#include <omp.h>

// body(thread, threads) in every thread. A single one does without OpenMP, whose start costs as much as a small kernel.
template <class Body> static void in_threads(long long threads, const Body& body) {
    if (threads <= 1) return body(0LL, 1LL);
#pragma omp parallel num_threads(threads)
    body((long long)omp_get_thread_num(), (long long)omp_get_num_threads());
}

// A thread's part of 0 .. count, whose ends are multiples of `unit`.
struct Share {
    long long from, to;

    Share(long long count, long long unit, long long thread, long long threads) {
        const long long units = (count + unit - 1) / unit;
        from = std::min(count, units * thread / threads * unit);
        to = std::min(count, units * (thread + 1) / threads * unit);
    }
};

// Memory of the calling thread, which grows and is kept: no call after the first of its size allocates.
struct Workspace {
    char* memory = nullptr;
    size_t size = 0, used = 0;

    // Makes sure of so many bytes, whose contents are lost; false where there is no memory.
    bool reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return true;
        std::free(memory);
        memory = (char*)std::aligned_alloc(64, bytes);
        size = memory ? bytes : 0;
        return memory;
    }
    template <class T> T* take(long long count) {
        T* found = (T*)(memory + used);
        used += bytes_of<T>(count);
        return found;
    }
    template <class T> static size_t bytes_of(long long count) { return (count * sizeof(T) + 63) / 64 * 64; }
    ~Workspace() { std::free(memory); }
};
