// Dequantizes a range of rows, in one pass.
//
// Formula: out = round_to_T(level * absmax)
//
// Layout: a task takes the blocks of a huge page of the result, or 256 blocks. Blocks that the range cuts are decoded
//     element by element.
//
// Registers: a block's table; 16-bit types look up 32 weights at once: AVX-512 by VPERMW, AVX2 by two PSHUFB, one for
//     the low and one for the high bytes.
//
// Why: the first write to a huge page clears all of it. A thread that has a page to itself finds it in its cache, and
//     two threads never wait for one page.
#pragma once

#include "cpu/quantize/decode.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX2__)
// A block's 16 values in T, one word each.
template <class T>
QLK_INLINE __m256i exact_words(const Levels& levels, float absmax) {
    float values[16];
    alignas(32) T words[16];
    for (int i = 0; i < 16; ++i) values[i] = levels.value[i] * absmax;
    from_float(values, words, 16);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
}

QLK_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

#if defined(__AVX512F__)
#if defined(__AVX512BF16__)
// Any level that is not 0 times this is a normal number, for NF4 and for FP4, whose smallest is 1 / 192.
constexpr float kSmallConstant = 0x1p-118f;

// The bf16 table of a block. Also exact below 2^-126, where VCVTNEPS2BF16 would flush.
QLK_INLINE __m256i block_table_bf16(const Levels& levels, float absmax) {
    const float magnitude = absmax < 0 ? -absmax : absmax;
    if (__builtin_expect(magnitude < kSmallConstant, 0)) return exact_words<bf16>(levels, absmax);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(levels.value), _mm512_set1_ps(absmax)));
}
QLK_INLINE __m256i block_words(const Levels& levels, float absmax, const bf16*) {
    return block_table_bf16(levels, absmax);
}
#else
QLK_INLINE __m256i block_words(const Levels& levels, float absmax, const bf16*) {
    if (__builtin_expect(!is_finite(absmax), 0))
        return exact_words<bf16>(levels, absmax);  // NaN is not rounded like a number
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(levels.value), _mm512_set1_ps(absmax)));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif

QLK_INLINE __m256i block_words(const Levels& levels, float absmax, const fp16*) {
    return _mm512_cvtps_ph(_mm512_mul_ps(_mm512_loadu_ps(levels.value), _mm512_set1_ps(absmax)),
                           _MM_FROUND_TO_NEAREST_INT);
}

// A block into T of 16 bits.
template <class T>
QLK_INLINE void dequantize_block(const Levels& levels, const uint8_t* codes, float absmax, T* out) {
    const __m512i table = _mm512_broadcast_i64x4(block_words(levels, absmax, out)),
                  mask = _mm512_set1_epi32(0x000f000f);
    for (int half = 0; half < 2; ++half) {
        // A byte in each 32-bit lane; its high nibble becomes the first word, its low nibble the second.
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half));
        const __m512i bytes = _mm512_cvtepu8_epi32(raw);
        const __m512i both = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        const __m512i words = _mm512_permutexvar_epi16(_mm512_and_si512(both, mask), table);
        __m512i* const to = reinterpret_cast<__m512i*>(out + 32 * half);
        _mm512_storeu_si512(to, words);
    }
}
#else
// In the order that dequantize_block's PSHUFBs are made from: entries 0-3, 8-11, 4-7, 12-15.
QLK_INLINE __m256i block_words(const Levels& levels, float absmax, const bf16*) {
    const __m256 scale = _mm256_set1_ps(absmax);
    __m256i half[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(levels.value + 8 * i), scale));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        half[i] = _mm256_srli_epi32(rounded, 16);
    }
    if (__builtin_expect(!is_finite(absmax), 0)) {  // NaN is not rounded like a number
        return _mm256_permute4x64_epi64(exact_words<bf16>(levels, absmax), 0xd8);
    }
    return _mm256_packus_epi32(half[0], half[1]);
}

QLK_INLINE __m256i block_words(const Levels& levels, float absmax, const fp16*) {
    return _mm256_permute4x64_epi64(exact_words<fp16>(levels, absmax), 0xd8);
}

// A block into T of 16 bits.
template <class T>
QLK_INLINE void dequantize_block(const Levels& levels, const uint8_t* codes, float absmax, T* out) {
    // In each half of a register the low bytes of its eight words, then the high bytes.
    const __m256i apart =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i bytes = _mm256_shuffle_epi8(block_words(levels, absmax, out), apart);
    const __m128i first = _mm256_castsi256_si128(bytes), second = _mm256_extracti128_si256(bytes, 1);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_unpacklo_epi32(first, second));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_unpackhi_epi32(first, second));
    for (int half = 0; half < 2; ++half) {
        // Bytes 0-3, 8-11, 4-7, 12-15, one in each word: interleaving within halves then gives the natural order.
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half));
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_shuffle_epi32(raw, 0xd8));
        const __m256i both = _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8));
        const __m256i index = _mm256_and_si256(both, _mm256_set1_epi8(15));
        const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
        __m256i* const to = reinterpret_cast<__m256i*>(out + 32 * half);
        const __m256i words[] = {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
        for (int i = 0; i < 2; ++i) _mm256_storeu_si256(to + i, words[i]);
    }
}
#endif
#else
template <class T>
QLK_INLINE void dequantize_block(const Levels& levels, const uint8_t* codes, float absmax, T* out) {
    float table[16];
    float values[kBlock];
    block_table<T>(levels, absmax, table);
    lookup_block(codes, table, values);
    from_float(values, out, kBlock);
}
#endif

QLK_INLINE void dequantize_block(const Levels& levels, const uint8_t* codes, float absmax, float* out) {
    float table[16];
    block_table<float>(levels, absmax, table);
    lookup_block(codes, table, out);
}

constexpr int64_t kPiece = 256;  // blocks whose constants are decoded together: 16384 weights

// Whole blocks, [first, first + blocks) of the weight.
template <class T>
inline void dequantize_blocks(const WeightView& w, int64_t first, int64_t blocks, T* out) {
    float absmax[kPiece];
    for (int64_t at = 0; at < blocks; at += kPiece) {
        const int64_t count = blocks - at < kPiece ? blocks - at : kPiece;
        decode_absmax(w, first + at, count, absmax);
        for (int64_t b = 0; b < count; ++b) {
            dequantize_block(w.levels, w.packed + (first + at + b) * (kBlock / 2), absmax[b], out + (at + b) * kBlock);
        }
    }
}

// Elements [from, to) of the flat weight into out. The blocks at the two ends may be parts.
template <class T>
inline void dequantize_part(const WeightView& w, int64_t from, int64_t to, T* out) {
    int64_t at = from;
    float values[kBlock];
    const auto element_wise = [&](int64_t stop) {
        decode_flat<T>(w, at, stop, values);
        from_float(values, out + (at - from), stop - at);
        at = stop;
    };
    if (at % kBlock != 0) {
        const int64_t whole = (at / kBlock + 1) * kBlock;
        element_wise(whole < to ? whole : to);
    }
    const int64_t blocks = (to - at) / kBlock;
    if (blocks > 0) {
        dequantize_blocks(w, at / kBlock, blocks, out + (at - from));
        at += blocks * kBlock;
    }
    if (at < to) element_wise(to);
}

template <class T>
inline void dequantize_impl(const DequantizeParams& p) {
    const int64_t begin = p.row_begin * p.weight.k;
    const int64_t end = p.row_end * p.weight.k;
    if (begin == end) return;
    T* const out = static_cast<T*>(p.out);
    // Pieces end at whole blocks of the weight, close to where huge pages of the result end.
    constexpr int64_t kPage = static_cast<int64_t>(kHugePage / sizeof(T));
    const int64_t size = end - begin >= 2 * p.threads * kPage ? kPage : kPiece * kBlock;
    const int64_t used = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(T)) % size;
    const int64_t start = begin - used;  // where the first piece would start
    const int64_t pieces = (end - start + size - 1) / size;
    const auto edge = [&](int64_t piece) {
        const int64_t at = start + piece * size;
        return at <= begin ? begin : at >= end ? end : at / kBlock * kBlock > begin ? at / kBlock * kBlock : begin;
    };
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = edge(piece), to = edge(piece + 1);
        if (from < to) dequantize_part(p.weight, from, to, out + (from - begin));
    }
}

inline void dequantize(const DequantizeParams& p) {
    switch (p.dtype) {
        case DType::kBFloat16: return dequantize_impl<bf16>(p);
        case DType::kFloat16: return dequantize_impl<fp16>(p);
        default: return dequantize_impl<float>(p);
    }
}

}  // namespace qlk::cpu::QLK_ISA
