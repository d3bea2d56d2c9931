// Quantizes a weight to NF4.
//
// Formula: absmax[b] = max |w| over block b of 64;  code = the level nearest to w / absmax, a tie to the lower
//
// Layout: a task takes a block. AVX-512 searches among the levels in four steps, for 16 weights at once.
//
// Why: loops over 64 elements vectorize well. Thresholds are exact (thresholds.h), so all instruction sets give the
//     same codes.
#pragma once

#include "cpu/quantize/thresholds.h"
#include "cpu/simd.h"

namespace qlk::cpu::QLK_ISA {

// Midpoints between neighbouring levels, exact in float64. The last is never reached.
struct Midpoints {
    double value[16];
    constexpr Midpoints() : value() {
        for (int i = 0; i < 15; ++i)
            value[i] = (static_cast<double>(kLevels[i]) + static_cast<double>(kLevels[i + 1])) / 2;
        value[15] = 2.0;
    }
};
constexpr Midpoints kMidpoints;

// The codes of a block of 64: for each weight, how many of the 15 thresholds (thresholds.h) lie below it.
QLK_INLINE void block_codes(const float* w, float absmax, uint8_t* code) {
    if (absmax == 0) {
        std::memset(code, kZeroCode, kBlock);
        return;
    }
#if defined(__AVX512F__)
    const __m512d scale = _mm512_set1_pd(absmax);
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m256 low = _mm512_cvt_roundpd_ps(_mm512_mul_pd(_mm512_loadu_pd(kMidpoints.value), scale), kDown);
    const __m256 high = _mm512_cvt_roundpd_ps(_mm512_mul_pd(_mm512_loadu_pd(kMidpoints.value + 8), scale), kDown);
    const __m512 threshold = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    // Four steps: is w above threshold [7], then [codes + 3], [codes + 1], [codes]?
    const __m512 middle = _mm512_permutexvar_ps(_mm512_set1_epi32(7), threshold);
    const __m512i ramp = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 by3 = _mm512_permutexvar_ps(_mm512_add_epi32(ramp, _mm512_set1_epi32(3)), threshold);
    const __m512 by1 = _mm512_permutexvar_ps(_mm512_add_epi32(ramp, _mm512_set1_epi32(1)), threshold);
    for (int i = 0; i < kBlock; i += 16) {
        const __m512 x = _mm512_loadu_ps(w + i);
        __m512i codes = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ), 8);
        __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(codes, by3), _CMP_GT_OQ);
        codes = _mm512_mask_add_epi32(codes, above, codes, _mm512_set1_epi32(4));
        above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(codes, by1), _CMP_GT_OQ);
        codes = _mm512_mask_add_epi32(codes, above, codes, _mm512_set1_epi32(2));
        above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(codes, threshold), _CMP_GT_OQ);
        codes = _mm512_mask_add_epi32(codes, above, codes, _mm512_set1_epi32(1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(code + i), _mm512_cvtepi32_epi8(codes));
    }
#else
    int32_t count[kBlock] = {0};
    for (int t = 0; t < 15; ++t) {
        const float threshold = round_down(kMidpoints.value[t] * static_cast<double>(absmax));
        for (int i = 0; i < kBlock; ++i) count[i] += w[i] > threshold ? 1 : 0;
    }
    for (int i = 0; i < kBlock; ++i) code[i] = static_cast<uint8_t>(count[i]);
#endif
}

// Returns the index of the first weight that is not finite, or -1.
template <class T>
inline int64_t quantize_impl(const QuantizeParams& p) {
    const T* const weight = static_cast<const T*>(p.weight);
    const int64_t blocks = (p.count + kBlock - 1) / kBlock;
    int64_t bad = p.count;

#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 256) reduction(min : bad)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * kBlock;
        const int count = static_cast<int>(p.count - begin < kBlock ? p.count - begin : kBlock);
        alignas(64) float w[kBlock] = {0};
        to_float(weight + begin, w, count);

        // Non-negative floats have the order of their bits; infinity and NaN come last.
        uint32_t largest = 0;
        for (int i = 0; i < kBlock; ++i) {
            const uint32_t bits = bits_of(w[i]) & 0x7fffffffu;
            largest = largest > bits ? largest : bits;
        }
        if (largest >= 0x7f800000u) {
            for (int i = 0; i < count; ++i) {
                if ((bits_of(w[i]) & 0x7fffffffu) >= 0x7f800000u && begin + i < bad) bad = begin + i;
            }
            continue;
        }
        p.absmax[b] = float_of(largest);
        uint8_t* const packed = p.packed + begin / 2;
        alignas(64) uint8_t code[kBlock];
        block_codes(w, float_of(largest), code);
        if (count == kBlock) {
            for (int i = 0; i < kBlock / 2; ++i) packed[i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
        } else {
            // If the count is odd, the last byte's second half is the code of zero.
            for (int i = 0; i < (count + 1) / 2; ++i) {
                const int second = 2 * i + 1 < count ? code[2 * i + 1] : kZeroCode;
                packed[i] = static_cast<uint8_t>(code[2 * i] << 4 | second);
            }
        }
    }
    return bad == p.count ? -1 : bad;
}

inline int64_t quantize(const QuantizeParams& p) {
    switch (p.dtype) {
        case DType::kBFloat16: return quantize_impl<bf16>(p);
        case DType::kFloat16: return quantize_impl<fp16>(p);
        default: return quantize_impl<float>(p);
    }
}

}  // namespace qlk::cpu::QLK_ISA
