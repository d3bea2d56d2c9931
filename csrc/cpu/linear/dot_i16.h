// Products of one row of W with up to 16 rows of bf16 or fp16 in whole numbers of 16 bits, for few_rows.h, where there
// is no arithmetic on these types.
//
// Formula: x[m] ~ q[m] * scale[m][unit], |q| <= 32767;  level ~ L / word_scale
//     acc[m] += sum over a block (L * q[m]) * (absmax * scale[m] / word_scale)
//
// Layout: a unit is what one vector of codes holds: 64 weights (AVX2) or 128. Its four vectors of words: element().
//
// Registers: the levels; VPMADDWD adds up pairs of products in 32 bits. Eight of them fit.
//
// Why: making float32 of a level or of x costs as much as multiplying. q keeps 15 bits of the unit's largest element:
//     a bf16 of at least a 128th of it is exact, and the rest err by less than 2^-16 of it.
//     docs/design/notes-cpu.md, "Few rows".
#pragma once

#include "cpu/linear/nibbles.h"

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX2__)

// 8 products in a sum, with levels of 13 bits: 8 * 8191 * 32767 < 2^31.
constexpr float kLargestWord = 32767;

#if defined(__AVX512F__)
struct WordVectors {
    static constexpr int64_t kUnit = 128;
    using Integers = __m512i;
    using Table = __m512i;
    static QLK_INLINE int element(int j, int l) { return 4 * l + (j ^ 1); }
    // The levels twice, so that VPERMW ignores all but the lowest four bits of an index.
    static QLK_INLINE Table table(const Levels& levels) {
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels.word)));
    }
    static QLK_INLINE void look_up(const uint8_t* at, bool whole, const Table& table, Integers (&level)[4]) {
        const __m512i codes = whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(0xff, at);
        for (int j = 0; j < 4; ++j) level[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
    }
    // The sum of products over a unit; in each lane, over one block.
    static QLK_INLINE Vec sum(const Integers (&level)[4], const int16_t* x, int64_t stride) {
        Integers product[4];
        for (int j = 0; j < 4; ++j) product[j] = _mm512_madd_epi16(level[j], _mm512_load_si512(x + j * stride));
        return _mm512_cvtepi32_ps(
            _mm512_add_epi32(_mm512_add_epi32(product[0], product[1]), _mm512_add_epi32(product[2], product[3])));
    }
};
#else
struct WordVectors {
    static constexpr int64_t kUnit = 64;
    using Integers = __m256i;
    struct Table {
        __m256i low, high;
    };
    static QLK_INLINE int element(int j, int l) { return Nibbles::word_element(j, l); }
    static QLK_INLINE Table table(const Levels& levels) {
        const __m128i* const at = reinterpret_cast<const __m128i*>(levels.word);
        const __m128i first = _mm_loadu_si128(at), second = _mm_loadu_si128(at + 1), mask = _mm_set1_epi16(0xff);
        const __m128i low = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
        const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
    }
    static QLK_INLINE void look_up(const uint8_t* at, bool, const Table& table, Integers (&level)[4]) {
        const Nibbles nibbles(at);
        for (int j = 0; j < 4; ++j) level[j] = nibbles.words(j, table.low, table.high);
    }
    static QLK_INLINE Vec sum(const Integers (&level)[4], const int16_t* x, int64_t stride) {
        Integers product[4];
        for (int j = 0; j < 4; ++j) {
            product[j] =
                _mm256_madd_epi16(level[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(x + j * stride)));
        }
        return _mm256_cvtepi32_ps(
            _mm256_add_epi32(_mm256_add_epi32(product[0], product[1]), _mm256_add_epi32(product[2], product[3])));
    }
};
#endif

template <class Type>
struct DotI16 {
    using T = Type;
    using X = int16_t;
    static constexpr int64_t kMostRows = 16;
    static constexpr int64_t kUnit = WordVectors::kUnit;
    static constexpr int kStep = kUnit / 4;  // words in a vector

    // What packing a row adds up, to judge the whole row by.
    struct Loss {
        float error = 0, roots = 0;  // sum of squared errors, and of the square roots of the magnitudes
        int64_t count = 0;           // elements that are not zero
    };

    // Whether the row's error matters beside dense's, which in bf16 is 2.3e-3 of the result, in fp16 2.8e-4. An outlier
    // takes bits from its unit, and counts for nothing itself where its column of W has the level 0; so the row's size
    // is told by square roots, to which outliers add little.
    static QLK_INLINE bool acceptable(const Loss& loss) {
        constexpr float kMost = std::is_same_v<T, bf16> ? 1.2e-3f : 1.4e-4f;
        if (loss.count == 0) return true;
        const float mean = loss.roots / static_cast<float>(loss.count), size = mean * mean;
        return loss.error <= kMost * kMost * size * size * static_cast<float>(loss.count);
    }

    // Returns false for elements that have no such form: NaN, infinity, and units of very small or very large numbers.
    static QLK_INLINE bool pack(const T* src, int64_t count, X* dst, int64_t stride, float* scale, float word_scale,
                                Loss& loss) {
        alignas(64) float values[kUnit] = {0};
        to_float(src, values, count < kUnit ? count : kUnit);
        uint32_t most = 0;
        for (int i = 0; i < kUnit; ++i) {
            const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
            most = magnitude > most ? magnitude : most;
        }
        const float largest = float_of(most);
        if (most > bits_of(kLargestX) || (most > 0 && largest < 0x1p-60f)) return false;
        const float factor = most > 0 ? kLargestWord / largest : 0.0f, step = largest / kLargestWord;
        *scale = step / word_scale;
        X whole[kUnit];
        // Adding 1.5 * 2^23 rounds to a whole number, in the lowest bits.
        for (int i = 0; i < kUnit; ++i) whole[i] = static_cast<X>(bits_of(values[i] * factor + 0x1.8p23f));
        Vec error = vset(0.0f), roots = vset(0.0f);
        int zeros = 0;
        for (int i = 0; i < kUnit; ++i) zeros += values[i] == 0.0f;
        for (int i = 0; i < kUnit; i += kWidth) {
            alignas(64) float back[kWidth], root[kWidth];
            for (int l = 0; l < kWidth; ++l) back[l] = values[i + l] - static_cast<float>(whole[i + l]) * step;
            for (int l = 0; l < kWidth; ++l) root[l] = __builtin_sqrtf(__builtin_fabsf(values[i + l]));
            error = vfma(vload(back), vload(back), error);
            roots = roots + vload(root);
        }
        loss.error += vsum(error);
        loss.roots += vsum(roots);
        loss.count += kUnit - zeros;
        for (int j = 0; j < 4; ++j) {
            for (int l = 0; l < kStep; ++l) dst[j * stride + l] = whole[WordVectors::element(j, l)];
        }
        return true;
    }

    // acc[m] += W's row . x[m] over `blocks` blocks, for kM rows. x: [unit][4][kM][kStep]; scale: [unit][kM]. absmax:
    // [blocks] and a zero, changed.
    template <int kM>
    static QLK_INLINE void products(const Levels& levels, const uint8_t* codes, float* absmax, int64_t blocks,
                                    const X* x, const float* scale, Vec* acc) {
        constexpr int64_t kUnitBlocks = kUnit / kBlock;
        const WordVectors::Table table = WordVectors::table(levels);
        Vec total[kM];
        for (int m = 0; m < kM; ++m) total[m] = vset(0.0f);
        for (int64_t b = 0; b < blocks; b += kUnitBlocks) {
            const uint8_t* const at = codes + b * (kBlock / 2);
            prefetch_codes(at);
            WordVectors::Integers level[4];
            WordVectors::look_up(at, b + 1 < blocks, table, level);
            const Vec constant = block_scales(absmax + b);
            const X* const right = x + b * kBlock * kM;
#pragma GCC unroll 16
            for (int m = 0; m < kM; ++m) {
                // Not constant * scale, which may leave the range of float32 where the result does not.
                const Vec sum = WordVectors::sum(level, right + m * kStep, kM * kStep);
                total[m] = vfma(sum * vset(scale[b / kUnitBlocks * kM + m]), constant, total[m]);
            }
        }
        for (int m = 0; m < kM; ++m) acc[m] = acc[m] + total[m];
    }
};

#endif

}  // namespace qlk::cpu::QLK_ISA
