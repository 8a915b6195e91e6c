/* Runs of quantizing and restoring for processors with AVX2 and F16C: the same results as the loops that they stand in
 * for. Each does as many elements as fit whole vectors, and returns how many these were. */

#include <immintrin.h>

INLINE __m256 f32_load(const uint32_t *at) { return _mm256_loadu_ps((const float *)at); }
INLINE __m256 f16_load(const uint16_t *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
INLINE __m256 bf16_load(const uint16_t *at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
}

INLINE void f32_store(uint32_t *at, __m256 first, __m256 second) {
    _mm256_storeu_ps((float *)at, first);
    _mm256_storeu_ps((float *)at + 8, second);
}
INLINE void f16_store(uint16_t *at, __m256 first, __m256 second) {
    _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)at + 1, _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256i bf16_rounded(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}
INLINE void bf16_store(uint16_t *at, __m256 first, __m256 second) {
    const __m256i both = _mm256_packus_epi32(bf16_rounded(first), bf16_rounded(second));
    _mm256_storeu_si256((__m256i *)at, _mm256_permute4x64_epi64(both, 0xd8));
}

/* 32 integers as bytes, in their order; none is beyond what a byte holds. */
INLINE void store_codes(uint8_t *at, const __m256i codes[4], int symmetric) {
    const __m256i low = _mm256_packs_epi32(codes[0], codes[1]), high = _mm256_packs_epi32(codes[2], codes[3]);
    const __m256i bytes = symmetric ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)at, _mm256_permutevar8x32_epi32(bytes, order));
}

INLINE __m256 load_codes(const uint8_t *at, int symmetric) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)at);
    return _mm256_cvtepi32_ps(symmetric ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}

INLINE int64_t to_half_run(const uint32_t *source, uint16_t *into, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) f16_store(into + i, f32_load(source + i), f32_load(source + i + 8));
    return i;
}

INLINE int64_t from_half_run(const uint16_t *source, uint32_t *into, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) f32_store(into + i, f16_load(source + i), f16_load(source + i + 8));
    return i;
}

/* `zero` and the other factor are of each column, or (stride 0) the same for all. */
INLINE __m256 factor(const float *at, int64_t i, int stride) {
    return stride ? _mm256_loadu_ps(at + i) : _mm256_broadcast_ss(at);
}

#define RUNS_OF(TYPE, BITS)                                                                                        \
    INLINE int64_t TYPE##_quantize_run(                                                                            \
        const BITS *restrict values, uint8_t *restrict codes, int64_t n, const float *restrict zero,               \
        const float *restrict inverse, int stride, int symmetric                                                   \
    ) {                                                                                                            \
        int64_t i = 0;                                                                                             \
        for (; i + 32 <= n; i += 32) {                                                                             \
            __m256i found[4];                                                                                      \
            for (int part = 0; part < 4; part++) {                                                                 \
                const int64_t at = i + 8 * part;                                                                   \
                const __m256 above = _mm256_sub_ps(TYPE##_load(values + at), factor(zero, at, stride));            \
                found[part] = _mm256_cvtps_epi32(_mm256_mul_ps(above, factor(inverse, at, stride)));               \
            }                                                                                                      \
            store_codes(codes + i, found, symmetric);                                                              \
        }                                                                                                          \
        return i;                                                                                                  \
    }                                                                                                              \
    INLINE int64_t TYPE##_restore_run(                                                                             \
        const uint8_t *restrict codes, BITS *restrict values, int64_t n, const float *restrict zero,               \
        const float *restrict step, int stride, int symmetric                                                      \
    ) {                                                                                                            \
        int64_t i = 0;                                                                                             \
        for (; i + 16 <= n; i += 16) {                                                                             \
            __m256 found[2];                                                                                       \
            for (int part = 0; part < 2; part++) {                                                                 \
                const int64_t at = i + 8 * part;                                                                   \
                const __m256 above = _mm256_mul_ps(load_codes(codes + at, symmetric), factor(step, at, stride));   \
                found[part] = _mm256_add_ps(above, factor(zero, at, stride));                                      \
            }                                                                                                      \
            TYPE##_store(values + i, found[0], found[1]);                                                          \
        }                                                                                                          \
        return i;                                                                                                  \
    }

RUNS_OF(f32, uint32_t)
RUNS_OF(f16, uint16_t)
RUNS_OF(bf16, uint16_t)
