// What benchmarks/spike_linear.py measures beside the kernels: reading memory alone, and a dense product with 2-bit weights
// that need not be gathered (a row per output, AVX-512 VNNI). Built by spikelm.cpu.module.build.

#include <algorithm>
#include <cstdint>
#include <immintrin.h>

// Reads `bytes`, a multiple of 64 from an aligned address, on all threads.
extern "C" int read_all(const char* memory, long long bytes, long long threads) {
    long long total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (long long i = 0; i < bytes; i += 4096) {
        __m512i all = _mm512_setzero_si512();
        for (long long j = i; j < std::min(bytes, i + 4096); j += 64)
            all = _mm512_xor_si512(all, _mm512_loadu_si512(memory + j));
        total += _mm512_reduce_add_epi64(all);
    }
    return (int)total;
}

// y = W s, weights [outputs, inputs / 4]: of 256 weights, byte j has weight 64 k + j, plus 1, in its bits 2k and 2k + 1.
extern "C" int dense_ternary(
    const uint8_t* weights, const int8_t* spikes, float* y, long long outputs, long long inputs, long long threads) {
    int sum = 0;
    for (long long i = 0; i < inputs; ++i) sum += spikes[i];
    const __m512i lowest = _mm512_set1_epi8(3);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long long o = 0; o < outputs; ++o) {
        const uint8_t* row = weights + o * (inputs / 4);
        __m512i sums[4] = {};
        for (long long block = 0; block < inputs / 256; ++block) {
            const __m512i codes = _mm512_loadu_si512(row + block * 64);
            for (int k = 0; k < 4; ++k)
                sums[k] = _mm512_dpbusd_epi32(
                    sums[k], _mm512_and_si512(_mm512_srli_epi16(codes, 2 * k), lowest),
                    _mm512_loadu_si512(spikes + block * 256 + k * 64));
        }
        const __m512i all = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
        y[o] = (float)(_mm512_reduce_add_epi32(all) - sum);
    }
    return 0;
}
