// Products of one row of W with up to kMostRows rows of x in float32 arithmetic, for few_rows.h.
//
// Formula: acc[m] += sum over a block (level * x[m]) * absmax; with many rows, sum of (level * absmax) * x[m]
//
// Layout: a unit is what one vector of codes holds. Its vector j of levels meets vector j of x, packed in that order.
//     AVX-512  128 weights, 64 bytes: dword l of vector j  <->  element 8 l + (j ^ 1)
//     AVX2      64 weights, 32 bytes: element() below
//
// Registers: the levels, as one table for all blocks; a vector of sums for each row of x.
//
// Why: a table for each block costs more than its look-ups. The levels are the same for all blocks, so they stay in
//     registers, and a block's constant multiplies the sum over the block. docs/design/notes-cpu.md, "Few rows".
#pragma once

#include "cpu/linear/nibbles.h"

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX2__)

template <class Type>
struct DotF32 {
    using T = Type;
    using X = float;
    static constexpr int64_t kMostRows = 8;
    struct Loss {};  // nothing is lost
    static QLK_INLINE bool acceptable(const Loss&) { return true; }
    static constexpr int kStep = kWidth;  // elements of x in a vector
    // From so many rows on, scaling the weights is cheaper than scaling the sums.
    static constexpr int kScaleWeights = kWidth == 16 ? 8 : 5;

#if defined(__AVX512F__)
    static constexpr int64_t kUnit = 128;
    using Table = __m512;
    static QLK_INLINE int element(int j, int l) { return 8 * l + (j ^ 1); }
    static QLK_INLINE Table table(const Levels& levels) { return _mm512_loadu_ps(levels.value); }

    // VPERMPS looks at the lowest four bits of an index and ignores the rest.
    struct Decoder {
        __m512i codes;
        QLK_INLINE Decoder(const uint8_t* at, bool whole, const Table&)
            : codes(whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(0xff, at)) {}
        QLK_INLINE Vec vector(int j, const Table& levels) const {
            return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), levels);
        }
    };
#else
    static constexpr int64_t kUnit = 64;
    struct Table {
        __m256i byte[4];
    };

    // Levels as bytes, for PSHUFB: byte[b] has byte b of each level, counted from its low end.
    static QLK_INLINE Table table(const Levels& levels) {
        const __m128i apart = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m128i four[4];  // dword b: byte b of four levels
        for (int i = 0; i < 4; ++i) {
            const __m128i* const at = reinterpret_cast<const __m128i*>(levels.value + 4 * i);
            four[i] = _mm_shuffle_epi8(_mm_loadu_si128(at), apart);
        }
        const __m128i low[] = {_mm_unpacklo_epi32(four[0], four[1]), _mm_unpacklo_epi32(four[2], four[3])};
        const __m128i high[] = {_mm_unpackhi_epi32(four[0], four[1]), _mm_unpackhi_epi32(four[2], four[3])};
        return {{
            _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low[0], low[1])),
            _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low[0], low[1])),
            _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high[0], high[1])),
            _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high[0], high[1])),
        }};
    }

    // PUNPCK works on 128 bits at a time.
    static QLK_INLINE int element(int j, int l) { return 2 * (l / 4 * 16 + j % 4 * 4 + l % 4) + j / 4; }

    struct Decoder {
        Nibbles nibbles;
        QLK_INLINE Decoder(const uint8_t* at, bool, const Table&) : nibbles(at) {}
        QLK_INLINE Vec vector(int j, const Table& levels) const {
            const __m256i low = nibbles.words(j / 2, levels.byte[0], levels.byte[1]);
            const __m256i high = nibbles.words(j / 2, levels.byte[2], levels.byte[3]);
            return _mm256_castsi256_ps(j % 2 ? _mm256_unpackhi_epi16(low, high) : _mm256_unpacklo_epi16(low, high));
        }
    };
#endif
    static constexpr int kVectors = kUnit / kWidth;

    // Up to kUnit elements of x, from their natural order to that of the levels; vectors are `stride` elements apart.
    // scale is not used: float32 needs none. Returns whether this path can take these elements.
    static QLK_INLINE bool pack(const T* src, int64_t count, X* dst, int64_t stride, float*, float, Loss&) {
        float values[kUnit] = {0};
        to_float(src, values, count < kUnit ? count : kUnit);
        bool fits = true;
        for (int i = 0; i < kUnit; ++i) fits &= (bits_of(values[i]) & 0x7fffffffu) <= bits_of(kLargestX);
        for (int j = 0; j < kVectors; ++j) {
            for (int l = 0; l < kWidth; ++l) dst[j * stride + l] = values[element(j, l)];
        }
        return fits;
    }

    // acc[m] += W's row . x[m] over `blocks` blocks, for kM rows. x: [unit][kVectors][kM][kWidth]. absmax: [blocks],
    // and a zero after them. codes: the row's first byte here.
    template <int kM>
    static QLK_INLINE void products(const Levels& weight_levels, const uint8_t* codes, float* absmax, int64_t blocks,
                                    const X* x, const float*, Vec* acc) {
        constexpr int64_t kUnitBlocks = kUnit / kBlock;
        // Short chains of additions: the next units' instructions wait in a queue of limited size meanwhile.
        constexpr int kSums = kM == 1 ? 4 : kM == 2 ? 2 : 1;
        const Table levels = table(weight_levels);
        Vec total[kM];
        for (int m = 0; m < kM; ++m) total[m] = vset(0.0f);
        for (int64_t b = 0; b < blocks; b += kUnitBlocks) {
            const uint8_t* const at = codes + b * (kBlock / 2);
            prefetch_codes(at);
            const Decoder decoder(at, kUnitBlocks == 1 || b + 1 < blocks, levels);
            const Vec scale = block_scales(absmax + b);
            const X* const right = x + b * kBlock * kM;
            Vec sum[kM][kSums];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                const Vec level = decoder.vector(j, levels);
                const Vec left = kM >= kScaleWeights ? level * scale : level;
#pragma GCC unroll 16
                for (int m = 0; m < kM; ++m) {
                    const Vec value = vload(right + (j * kM + m) * kWidth);
                    if constexpr (kM >= kScaleWeights) {
                        total[m] = vfma(left, value, total[m]);
                    } else {
                        sum[m][j % kSums] = j < kSums ? left * value : vfma(left, value, sum[m][j % kSums]);
                    }
                }
            }
            if constexpr (kM < kScaleWeights) {
                for (int m = 0; m < kM; ++m) {
                    for (int step = kSums / 2; step > 0; step /= 2) {
                        for (int s = 0; s < step; ++s) sum[m][s] = sum[m][s] + sum[m][s + step];
                    }
                    total[m] = vfma(sum[m][0], scale, total[m]);
                }
            }
        }
        for (int m = 0; m < kM; ++m) acc[m] = acc[m] + total[m];
    }
};

#endif

}  // namespace qlk::cpu::QLK_ISA
