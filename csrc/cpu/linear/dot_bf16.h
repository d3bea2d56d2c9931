// Products of one row of W with up to 12 rows of x by VDPBF16PS, for few_rows.h.
//
// Formula: acc[m] += sum over a block (L * x[m]) * absmax / scale, L = round_to_bf16(level * scale)
//
// Layout: a unit is 128 weights, 64 bytes of codes. Word l of vector j  <->  element 4 l + (j ^ 1), in W and in x.
//
// Registers: the levels, one vector of sums for each row of x, and for few rows one of sums within a unit.
//
// Why: VPERMW ignores all but the lowest five bits of an index, and the table of 16 levels is there twice, so a look-up
//     needs a shift and no mask. 128 weights take 3 shifts, 4 VPERMW, and for each row 4 VDPBF16PS and an FMA.
#pragma once

#include "cpu/linear/nf4_bf16.h"
#include "cpu/linear/nibbles.h"

namespace qlk::cpu::QLK_ISA {

QLK_INLINE __m512 dot_step(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

struct DotBf16 {
    using T = bf16;
    using X = uint16_t;
#if defined(__AMX_BF16__)
    // stream_amx.h is faster from three rows on.
    static constexpr int64_t kMostRows = 2;
#else
    // Two vectors of sums for each row have to fit into the registers; the panels take as long for 13 rows as for 16.
    static constexpr int64_t kMostRows = 12;
#endif
    struct Loss {};  // nothing is lost
    static QLK_INLINE bool acceptable(const Loss&) { return true; }
    static constexpr int64_t kUnit = 128;
    static constexpr int kStep = 32;
    static constexpr int kVectors = 4;

    static QLK_INLINE bool pack(const T* src, int64_t count, X* dst, int64_t stride, float*, float, Loss&) {
        const Words4 words = weight_order(reinterpret_cast<const uint16_t*>(src), count);
        for (int j = 0; j < kVectors; ++j) _mm512_store_si512(dst + j * stride, words.v[j]);
        const __m512i most = _mm512_set1_epi16(static_cast<short>(bits_of(kLargestX) >> 16));
        __mmask32 beyond = 0;
        for (int j = 0; j < kVectors; ++j) {
            const __m512i magnitude = _mm512_and_si512(words.v[j], _mm512_set1_epi16(0x7fff));
            beyond |= _mm512_cmpgt_epu16_mask(magnitude, most);
        }
        return beyond == 0;
    }

    // As DotF32's; x: [unit][kVectors][kM][32].
    template <int kM>
    static QLK_INLINE void products(const Levels& table, const uint8_t* codes, const float* absmax, int64_t blocks,
                                    const X* x, const float*, Vec* acc) {
        const __m256i sixteen = block_table_bf16(table, table.bf16_scale);
        constexpr int kSums = kM <= 2 ? 2 : 1;  // short chains of additions, as in dot_f32.h
        const __m512i levels = _mm512_inserti64x4(_mm512_castsi256_si512(sixteen), sixteen, 1);
        Vec total[kM];
        for (int m = 0; m < kM; ++m) total[m] = vset(0.0f);
        for (int64_t b = 0; b < blocks; b += 2) {
            const uint8_t* const at = codes + b * (kBlock / 2);
            prefetch_codes(at);
            const __m512i four = b + 1 < blocks ? _mm512_loadu_si512(at) : load_words(at, 16);
            const Vec scale = block_scales(absmax + b);
            Vec sum[kM][kSums];
            for (int m = 0; m < kM; ++m) {
                for (int s = 0; s < kSums; ++s) sum[m][s] = _mm512_setzero_ps();
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const __m512i left = _mm512_permutexvar_epi16(j ? _mm512_srli_epi16(four, 4 * j) : four, levels);
#pragma GCC unroll 12
                for (int m = 0; m < kM; ++m) {
                    const __m512i right = _mm512_load_si512(x + b * kBlock * kM + (j * kM + m) * 32);
                    sum[m][j % kSums] = dot_step(sum[m][j % kSums], left, right);
                }
            }
            for (int m = 0; m < kM; ++m) {
                total[m] = vfma(kSums == 2 ? sum[m][0] + sum[m][kSums - 1] : sum[m][0], scale, total[m]);
            }
        }
        for (int m = 0; m < kM; ++m) acc[m] = vfma(total[m], vset(1.0f / table.bf16_scale), acc[m]);
    }
};

}  // namespace qlk::cpu::QLK_ISA
