// The search of quantize_absmax: the nearest of 256 table entries.
//
// Formula: code[number of midpoints * scale that are below the value], exactly (thresholds.h)
//
// Layout: eight halvings; AVX-512 searches for 16 values at once by gathers.
#pragma once

#include "cpu/isa.h"
#include "cpu/quantize/thresholds.h"
#include "cpu/simd.h"

namespace qlk::cpu::QLK_ISA {

// isa.h says what the arguments are.
static void nearest_codes(const double* midpoints, const uint8_t* code, float scale, const float* value, int count,
                          uint8_t* out) {
    alignas(64) float threshold[kNestedBlock];
#if defined(__AVX512F__)
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    for (int i = 0; i < kNestedBlock; i += 8) {
        const __m512d exact = _mm512_mul_pd(_mm512_loadu_pd(midpoints + i), _mm512_set1_pd(scale));
        _mm256_store_ps(threshold + i, _mm512_cvt_roundpd_ps(exact, kDown));
    }
    for (int i = 0; i < count; i += 16) {
        const __mmask16 valid = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(valid, value + i);
        __m512i position = _mm512_setzero_si512();
        for (int step = 128; step > 0; step /= 2) {
            const __m512i probe = _mm512_add_epi32(position, _mm512_set1_epi32(step - 1));
            const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_i32gather_ps(probe, threshold, 4), _CMP_GT_OQ);
            position = _mm512_mask_add_epi32(position, above, position, _mm512_set1_epi32(step));
        }
        alignas(64) int32_t positions[16];
        _mm512_store_si512(positions, position);
        for (int j = 0; j < 16 && i + j < count; ++j) out[i + j] = code[positions[j]];
    }
#else
    for (int i = 0; i < kNestedBlock; ++i) threshold[i] = round_down(midpoints[i] * static_cast<double>(scale));
    for (int i = 0; i < count; ++i) {
        int position = 0;
        for (int step = 128; step > 0; step /= 2) position += value[i] > threshold[position + step - 1] ? step : 0;
        out[i] = code[position];
    }
#endif
}

}  // namespace qlk::cpu::QLK_ISA
