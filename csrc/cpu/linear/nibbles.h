// What the dot products of few rows share: prefetching of codes, and AVX2's look-up of nibbles.
//
// Registers: PSHUFB looks up a byte of 32 levels at once; two such bytes interleave to words.
//
// Why: docs/design/notes-cpu.md, "Few rows".
#pragma once

#include "cpu/quantize/decode.h"

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX2__)

// Into the second-level cache, which has room for more reads under way than the first: with two threads it makes one
// row 1.5 times as fast as prefetching the same bytes into the first (Zen 4). Past a weight's end it does nothing.
constexpr int64_t kPrefetchBytes = 8192;
QLK_INLINE void prefetch_codes(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes), _MM_HINT_T1);
}

// The largest |x| whose products with levels can be summed over a block before the block's constant makes them small.
// An x with more, or with NaN or infinity, goes to the panels.
constexpr float kLargestX = 0x1p118f;

#if defined(__AVX512F__)
// The constants of the two blocks in 64 bytes of codes, each in the lanes that its codes are in.
QLK_INLINE Vec block_scales(const float* absmax) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(absmax[0]), 0xff00, _mm_load_ss(absmax + 1));
}
#else
QLK_INLINE Vec block_scales(const float* absmax) { return vset(*absmax); }
#endif

// The 64 nibbles of a block.
struct Nibbles {
    __m256i high, low;
    explicit QLK_INLINE Nibbles(const uint8_t* at) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i mask = _mm256_set1_epi8(15);
        high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
        low = _mm256_and_si256(codes, mask);
    }
    // 16 words whose bytes are looked up in two tables. Word l of quarter q <-> element word_element(q, l).
    QLK_INLINE __m256i words(int quarter, __m256i low_bytes, __m256i high_bytes) const {
        const __m256i index = quarter / 2 ? low : high;
        const __m256i first = _mm256_shuffle_epi8(low_bytes, index), second = _mm256_shuffle_epi8(high_bytes, index);
        return quarter % 2 ? _mm256_unpackhi_epi8(first, second) : _mm256_unpacklo_epi8(first, second);
    }
    static QLK_INLINE int word_element(int quarter, int l) {
        return 2 * (l / 8 * 16 + quarter % 2 * 8 + l % 8) + quarter / 2;
    }
};

#endif

}  // namespace qlk::cpu::QLK_ISA
