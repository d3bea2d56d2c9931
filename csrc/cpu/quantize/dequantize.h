// Dequantizes a range of rows, in one pass.
//
// Formula: out = round_to_T(level * absmax)
//
// Layout: a task takes 256 blocks, 16384 weights. Blocks that the range cuts are decoded element by element.
//
// Registers: a block's table; bf16 with AVX-512 BF16 looks up 32 weights at once by VPERMW.
#pragma once

#include "cpu/quantize/decode.h"

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX512BF16__)
// The bf16 table of a block. Also exact below 2^-126, where VCVTNEPS2BF16 would flush.
QLK_INLINE __m256i block_table_bf16(float absmax) {
    const float magnitude = absmax < 0 ? -absmax : absmax;
    if (__builtin_expect(magnitude < 0x1p-120f, 0)) {
        alignas(32) uint16_t exact[16];
        for (int i = 0; i < 16; ++i) exact[i] = bf16_bits(kLevels[i] * absmax);
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(exact));
    }
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(kLevels), _mm512_set1_ps(absmax)));
}

// Dequantizes whole blocks. Two blocks are one cache line of codes and four of output.
QLK_INLINE void dequantize_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, bf16* out) {
    const __m512i mask = _mm512_set1_epi32(0x000f000f);
    for (int64_t b = 0; b < blocks; ++b) {
        const __m512i table = _mm512_broadcast_i64x4(block_table_bf16(absmax[b]));
        for (int half = 0; half < 2; ++half) {
            // A byte in each 32-bit lane; its high nibble becomes the first word, its low nibble the second.
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 32 * b + 16 * half));
            const __m512i bytes = _mm512_cvtepu8_epi32(raw);
            const __m512i both = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
            const __m512i words = _mm512_permutexvar_epi16(_mm512_and_si512(both, mask), table);
            _mm512_storeu_si512(out + 64 * b + 32 * half, words);
        }
    }
}
#endif

template <class T>
QLK_INLINE void dequantize_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, T* out) {
    float table[16];
    float values[kBlock];
    for (int64_t b = 0; b < blocks; ++b) {
        block_table<T>(absmax[b], table);
        lookup_block(codes + 32 * b, table, values);
        from_float(values, out + kBlock * b, kBlock);
    }
}

template <class T>
inline void dequantize_impl(const DequantizeParams& p) {
    constexpr int64_t kBatch = 256;  // blocks in one piece of work: 16384 weights
    const int64_t begin = p.row_begin * p.weight.k;
    const int64_t end = p.row_end * p.weight.k;
    if (begin == end) return;
    T* const out = static_cast<T*>(p.out);
    const int64_t first = begin / kBlock;
    const int64_t batches = ((end + kBlock - 1) / kBlock - first + kBatch - 1) / kBatch;

#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t batch = 0; batch < batches; ++batch) {
        const int64_t block = first + batch * kBatch;
        int64_t from = block * kBlock, to = from + kBatch * kBlock;
        if (to > end) to = end;
        // A range may start or end inside a block: these two blocks are decoded element by element.
        int64_t whole = (from < begin ? from + kBlock : from);
        const int64_t whole_end = to / kBlock * kBlock;
        float values[kBlock];
        if (from < begin) {
            const int64_t stop = whole < to ? whole : to;
            decode_flat<T>(p.weight, begin, stop, values);
            from_float(values, out, stop - begin);
        }
        if (whole < whole_end) {
            float absmax[kBatch];
            const int64_t blocks = (whole_end - whole) / kBlock;
            decode_absmax(p.weight, whole / kBlock, blocks, absmax);
            dequantize_blocks(p.weight.packed + whole / 2, absmax, blocks, out + (whole - begin));
            whole = whole_end;
        }
        if (whole < to) {
            decode_flat<T>(p.weight, whole, to, values);
            from_float(values, out + (whole - begin), to - whole);
        }
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
