// The end of the forward pass: adds the bias, rounds and transposes a block of C into y.
//
// Formula: y[m][n] = round_to_T(c[n][m] + bias[n])
//
// Layout: C [32 n][32 m], y [m][n].
//
// Registers: 16 x 16 floats, transposed in AVX-512 registers.
#pragma once

#include "cpu/linear/engine_f32.h"

namespace qlk::cpu::QLK_ISA {

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

// For up to 32 x 32 elements. c: [32 n][32 m]; bias: [n] or null; ld: elements in a row of y.
template <class T>
inline void store_transposed(const float* c, const float* bias, int n_rows, int m_rows, T* y, int64_t ld) {
#if defined(__AVX512F__)
    alignas(64) float line[16][kEdge];
    for (int m0 = 0; m0 < m_rows; m0 += 16) {
        for (int n0 = 0; n0 < n_rows; n0 += 16) {
            __m512 r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(c + (n0 + i) * kEdge + m0);
            transpose16(r);
            __m512 shift = _mm512_setzero_ps();
            if (bias) {
                const int left = n_rows - n0;
                shift = _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : (1u << left) - 1, bias + n0);
            }
            for (int i = 0; i < 16; ++i) _mm512_store_ps(line[i] + n0, _mm512_add_ps(r[i], shift));
        }
        const int rows = m_rows - m0 < 16 ? m_rows - m0 : 16;
        for (int i = 0; i < rows; ++i) from_float(line[i], y + (m0 + i) * ld, n_rows);
    }
#else
    for (int m = 0; m < m_rows; ++m) {
        float line[kEdge];
        for (int n = 0; n < n_rows; ++n) line[n] = c[n * kEdge + m] + (bias ? bias[n] : 0.0f);
        from_float(line, y + m * ld, n_rows);
    }
#endif
}

}  // namespace qlk::cpu::QLK_ISA
