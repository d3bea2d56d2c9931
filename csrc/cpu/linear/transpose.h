// Transposes of small squares of float32 in registers.
#pragma once

#include "cpu/simd.h"

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX2__)
// 8 x 8: row i of the result is column i of the input.
QLK_INLINE void transpose8(__m256 r[8]) {
    __m256d t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_castps_pd(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]));
        t[2 * i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    }
    // Columns c and c + 4, in the two 128-bit lanes, of rows 0 to 3 and of rows 4 to 7.
    __m256 low[4], high[4];
    for (int i = 0; i < 2; ++i) {
        low[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(t[i], t[2 + i]));
        low[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(t[i], t[2 + i]));
        high[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(t[4 + i], t[6 + i]));
        high[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(t[4 + i], t[6 + i]));
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(low[i], high[i], 0x20);
        r[4 + i] = _mm256_permute2f128_ps(low[i], high[i], 0x31);
    }
}
#endif

#if defined(__AVX512F__)
// Transposes 16 x 16 floats: row i of the result is column i of the input.
QLK_INLINE void transpose16(__m512 r[16]) {
    __m512 t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
        const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // r[4g + s] now holds, in 128-bit lane l, rows 4g..4g+3 of column 4l + s.
    for (int s = 0; s < 4; ++s) {
        const __m512 a = _mm512_shuffle_f32x4(r[s], r[4 + s], 0x88),
                     b = _mm512_shuffle_f32x4(r[8 + s], r[12 + s], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(r[s], r[4 + s], 0xdd),
                     d = _mm512_shuffle_f32x4(r[8 + s], r[12 + s], 0xdd);
        t[s] = _mm512_shuffle_f32x4(a, b, 0x88);
        t[8 + s] = _mm512_shuffle_f32x4(a, b, 0xdd);
        t[4 + s] = _mm512_shuffle_f32x4(c, d, 0x88);
        t[12 + s] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

}  // namespace qlk::cpu::QLK_ISA
