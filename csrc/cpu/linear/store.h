// The end of the forward pass: adds the bias, rounds and transposes a block of C into y.
//
// Formula: y[m][n] = round_to_T(c[n][m] + bias[n])
//
// Layout: C [32 n][32 m], y [m][n].
//
// Registers: 16 x 16 floats (AVX-512) or 8 x 8 (AVX2) are transposed together.
#pragma once

#include "cpu/linear/engine_f32.h"
#include "cpu/linear/transpose.h"

namespace qlk::cpu::QLK_ISA {

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
#elif defined(__AVX2__)
    alignas(32) float line[8][kEdge];
    for (int m0 = 0; m0 < m_rows; m0 += 8) {
        for (int n0 = 0; n0 < n_rows; n0 += 8) {
            __m256 r[8];
            for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(c + (n0 + i) * kEdge + m0);
            transpose8(r);
            for (int i = 0; i < 8; ++i) _mm256_store_ps(line[i] + n0, r[i]);
        }
        const int rows = m_rows - m0 < 8 ? m_rows - m0 : 8;
        for (int i = 0; i < rows; ++i) {
            if (bias) {
                for (int n = 0; n < n_rows; ++n) line[i][n] += bias[n];
            }
            from_float(line[i], y + (m0 + i) * ld, n_rows);
        }
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
