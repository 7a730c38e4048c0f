// Lanes and bits, behind lanes.hpp with STATE_T float: a bit for every lane, and how many bits a lane has.

// Bit i is set where lane i is not 0.
INLINE uint32_t bits_of(WordLanes lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)(lanes != 0));
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)(lanes != 0));
#else
    uint32_t bits = 0;
    for (long i = 0; i < LANES; ++i) bits |= (uint32_t)(lanes[i] != 0) << i;
    return bits;
#endif
}

// A bit for each of the first `count` lanes.
INLINE uint32_t lanes_below(long count) { return (1u << count) - 1; }

INLINE WordLanes population(WordLanes words) {
#if defined(__AVX512VPOPCNTDQ__)
    return (WordLanes)_mm512_popcnt_epi32((__m512i)words);
#elif defined(__AVX2__) && VECTOR_BYTES == 32  // by half bytes, from a table
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_shuffle_epi8(table, (__m256i)(words & 0x0f0f0f0fu));
    const __m256i high = _mm256_shuffle_epi8(table, (__m256i)((words >> 4) & 0x0f0f0f0fu));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_add_epi8(low, high), _mm256_set1_epi8(1));
    return (WordLanes)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    words = words - ((words >> 1) & 0x55555555u);
    words = (words & 0x33333333u) + ((words >> 2) & 0x33333333u);
    words = (words + (words >> 4)) & 0x0f0f0f0fu;
    words = words + (words >> 8);
    return (words + (words >> 16)) & 0x3fu;
#endif
}
