// Decodes NF4 to float32, a block of 64 at a time, in the order that is cheapest to look up.
//
// Formula: level * absmax, in float32
//
// Layout: position 8 t + l of a block holds element 8 l + t: 8 x 8, transposed. What meets W is packed in the same
//     order, by functions in this file.
//
// Registers: the block's 16 values, in one register (AVX-512) or two.
//
// Why: a 32-bit word has eight codes, and a lookup by lanes only looks at the lowest bits of each. So one shift yields
//     the indices for one lookup, with nothing to unpack or mask: docs/design/notes-cpu.md, "The order of a lookup".
#pragma once

#include "cpu/linear/transpose.h"
#include "cpu/quantize/decode.h"

namespace qlk::cpu::QLK_ISA {

// Where a block's four pieces of 16 positions are kept.
template <class Float>
struct BlockAt {
    Float* first;
    int64_t near, far;  // from piece 0 to 1, and from 0 to 2, in floats

    QLK_INLINE Float* at(int piece) const { return first + piece % 2 * near + piece / 2 * far; }
};

// 64 weights from 32 bytes.
QLK_INLINE void lookup_block(const Levels& levels, const uint8_t* codes, float absmax, const BlockAt<float>& out) {
    // Element t of a word is the high nibble of its byte t / 2, or the low one.
#if defined(__AVX512F__)
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels.value), _mm512_set1_ps(absmax));
    const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    __m512i shift = _mm512_inserti64x4(_mm512_set1_epi32(4), _mm256_setzero_si256(), 1);
    for (int v = 0; v < 4; ++v) {
        _mm512_storeu_ps(out.at(v), _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shift), table));
        shift = _mm512_add_epi32(shift, _mm512_set1_epi32(8));
    }
#elif defined(__AVX2__)
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(levels.value), scale);
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(levels.value + 8), scale);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) {
        const int shift = t / 2 * 8 + (t % 2 ? 0 : 4);
        const __m256i index = _mm256_srli_epi32(words, shift);
        // VPERMPS reads bits 0 to 2; bit 3, moved to the sign, picks between the two halves of the table.
        const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - shift));
        _mm256_storeu_ps(out.at(t / 2) + t % 2 * 8, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                                     _mm256_permutevar8x32_ps(high, index), choose));
    }
#else
    float table[16];
    for (int i = 0; i < 16; ++i) table[i] = levels.value[i] * absmax;
    for (int l = 0; l < 8; ++l) {
        for (int t = 0; t < 8; ++t) {
            const uint8_t byte = codes[4 * l + t / 2];
            out.at(t / 2)[t % 2 * 8 + l] = table[t % 2 ? byte & 15 : byte >> 4];
        }
    }
#endif
}

// 64 floats, from their natural order to that of lookup_block or back: it is its own inverse.
QLK_INLINE void weight_order(const BlockAt<const float>& src, const BlockAt<float>& dst) {
#if defined(__AVX2__)
    __m256 r[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src.at(i / 2) + i % 2 * 8);
    transpose8(r);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(dst.at(i / 2) + i % 2 * 8, r[i]);
#else
    for (int i = 0; i < kBlock; ++i) {
        const int from = i % 8 * 8 + i / 8;
        dst.at(i / 16)[i % 16] = src.at(from / 16)[from % 16];
    }
#endif
}

// The pieces of a plain array of 64.
template <class Float>
QLK_INLINE BlockAt<Float> plain(Float* line) {
    return {line, 16, 32};
}

// 64 steps of 8 rows of a matrix, transposed, in the order of lookup_block: dst[(8 t + l) * 32 + row] =
// src[row * ld + 8 l + t].
template <class T>
QLK_INLINE void pack_rows8(const T* src, int64_t ld, float* dst) {
    for (int l = 0; l < 8; ++l) {
#if defined(__AVX2__)
        __m256 r[8];
        for (int row = 0; row < 8; ++row) r[row] = load8(src + row * ld + 8 * l);
        transpose8(r);
        for (int t = 0; t < 8; ++t) _mm256_storeu_ps(dst + (8 * t + l) * 32, r[t]);
#else
        for (int row = 0; row < 8; ++row) {
            float line[8];
            to_float(src + row * ld + 8 * l, line, 8);
            for (int t = 0; t < 8; ++t) dst[(8 * t + l) * 32 + row] = line[t];
        }
#endif
    }
}

}  // namespace qlk::cpu::QLK_ISA
