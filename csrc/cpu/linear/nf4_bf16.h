// Decodes NF4 straight to bf16 vectors, 128 weights from one 64-byte vector of codes.
//
// Formula: round_to_bf16(level * absmax)
//
// Layout: vector j, word l  <->  element 4 l + (j ^ 1). What meets W is packed in the same order, by functions in this
//     file.
//
// Registers: the tables of two blocks in one register; VPERMW looks up 32 weights at once.
//
// Why: 128 weights take 3 shifts, 2 VPTERNLOG, 4 VPERMW, 2 multiplications, 1 conversion and 2 broadcasts from memory.
//     docs/design/notes-cpu.md, "The order of a lookup", explains the order.
#pragma once

#include "cpu/quantize/dequantize.h"

namespace qlk::cpu::QLK_ISA {

struct Words4 {
    __m512i v[4];
};

// Whether any of these blocks may have subnormal bf16 values, which VCVTNE2PS2BF16 flushes: a constant below
// kSmallConstant, and not zero. Asked once for many blocks: asked for each, it cost a tenth of the decoding.
QLK_INLINE bool has_tiny(const float* absmax, int64_t count) {
    __mmask16 tiny = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 valid = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m512i bits = _mm512_maskz_loadu_epi32(valid, absmax + i);
        const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
        // Minus one, unsigned: zero becomes the largest.
        const __m512i less = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(1));
        tiny |=
            _mm512_mask_cmplt_epu32_mask(valid, less, _mm512_set1_epi32(static_cast<int>(bits_of(kSmallConstant)) - 1));
    }
    return tiny != 0;
}

// The tables of two blocks, in the low and the high half. tiny: has_tiny() of these blocks or more.
QLK_INLINE __m512i table_pair(const Levels& levels, const float* first, const float* second, bool tiny) {
    if (__builtin_expect(tiny, 0)) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(block_table_bf16(levels, *first)),
                                  block_table_bf16(levels, *second), 1);
    }
    const __m512 values = _mm512_loadu_ps(levels.value);
    const __m512 low = _mm512_mul_ps(values, _mm512_set1_ps(*first));
    const __m512 high = _mm512_mul_ps(values, _mm512_set1_ps(*second));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Looks 128 codes up, 32 words of four. half: 16 in both bytes of words that belong to the table's high half, else 0.
QLK_INLINE Words4 lookup128(__m512i codes, __m512i table, __m512i half) {
    const __m512i nibbles = _mm512_set1_epi16(0x0f0f);
    constexpr int kAndOr = 0xea;  // (a & b) | c
    // VPERMW only looks at a word's lowest five bits, so each word here holds two indices, one in each byte.
    Words4 out;
    out.v[0] = _mm512_ternarylogic_epi32(codes, nibbles, half, kAndOr);
    out.v[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), nibbles, half, kAndOr);
    out.v[2] = _mm512_srli_epi16(out.v[0], 8);
    out.v[3] = _mm512_srli_epi16(out.v[1], 8);
    for (int j = 0; j < 4; ++j) out.v[j] = _mm512_permutexvar_epi16(out.v[j], table);
    return out;
}

// half for lookup128 when words 16 to 31 belong to the second block.
QLK_INLINE __m512i half_by_block() { return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1); }

// half for lookup128 when odd words belong to the second row.
QLK_INLINE __m512i half_by_parity() { return _mm512_set1_epi32(0x10100000); }

// Loads up to 32 words, zeros past `count`.
QLK_INLINE __m512i load_words(const void* src, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(src);
    if (count <= 0) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16((1u << count) - 1, src);
}

// Up to 128 elements, from their natural order to the order of lookup128.
QLK_INLINE Words4 weight_order(const uint16_t* src, int64_t count) {
    const __m512i a = load_words(src, count), b = load_words(src + 32, count - 32);
    const __m512i c = load_words(src + 64, count - 64), d = load_words(src + 96, count - 96);
    const __m512i ramp = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0, 60, 56, 52, 48,
                                          44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    Words4 out;
    for (int j = 0; j < 4; ++j) {
        const __m512i index = _mm512_add_epi16(ramp, _mm512_set1_epi16(static_cast<short>(j ^ 1)));
        out.v[j] = _mm512_mask_blend_epi16(0xffff0000u, _mm512_permutex2var_epi16(a, index, b),
                                           _mm512_permutex2var_epi16(c, index, d));
    }
    return out;
}

}  // namespace qlk::cpu::QLK_ISA
