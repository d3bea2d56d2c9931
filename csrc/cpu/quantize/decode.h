// Decodes NF4 to float32, by blocks of 64.
//
// Formula: round_to_T(level * absmax), as float32
//
// Registers: the block's table of 16 values; AVX-512 and AVX2 look it up by permutes, NEON byte by byte.
//
// Why: a block has one constant, so at most 16 different values. They are computed and rounded once, and a weight is
//     one look-up.
#pragma once

#include "cpu/simd.h"
#if defined(QLK_NEON)
#include "cpu/quantize/lookup_neon.h"
#endif

namespace qlk::cpu::QLK_ISA {

// The constant of a block that doesn't exist: its weights decode to zeros.
constexpr float kNoBlock = 0.0f;

// Decodes the constants of blocks [first, first + count).
QLK_INLINE void decode_absmax(const WeightView& w, int64_t first, int64_t count, float* out) {
    if (w.absmax) {
        std::memcpy(out, w.absmax + first, count * sizeof(float));
        return;
    }
    const float offset = *w.nested_offset;
    int64_t i = 0;
    while (i < count) {
        const int64_t group = (first + i) / kNestedBlock;
        const int64_t left = (group + 1) * kNestedBlock - (first + i);
        const int64_t end = i + (left < count - i ? left : count - i);
        const float nested = w.nested_absmax[group];
#if defined(__AVX512F__)
        // A rounded multiply, then a rounded add: never fused.
        for (; i + 16 <= end; i += 16) {
            const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.absmax_code + first + i));
            const __m512 entry = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(code), w.nested_table, 4);
            const __m512 product = _mm512_mul_ps(entry, _mm512_set1_ps(nested));
            _mm512_storeu_ps(out + i, _mm512_add_ps(product, _mm512_set1_ps(offset)));
        }
#endif
        // Look-ups first, so that the compiler makes vectors of the rest.
        for (int64_t j = i; j < end; ++j) out[j] = w.nested_table[w.absmax_code[first + j]];
        for (; i < end; ++i) out[i] = out[i] * nested + offset;
    }
}

// The 16 values of a block, rounded through T. table: [16].
template <class T>
QLK_INLINE void block_table(const Levels& levels, float absmax, float* table) {
    float exact[16];
#if defined(QLK_NEON)
    // GCC would multiply one by one, as it had unrolled the loop before it looked for vectors.
    for (int i = 0; i < 16; i += kWidth) vstore(exact + i, vload(levels.value + i) * vset(absmax));
#else
    for (int i = 0; i < 16; ++i) exact[i] = levels.value[i] * absmax;
#endif
    T stored[16];
    from_float(exact, stored, 16);
    to_float(stored, table, 16);
}

// 64 weights from 32 bytes, in their natural order.
QLK_INLINE void lookup_block(const uint8_t* codes, const float* table, float* out) {
#if defined(__AVX512F__)
    const __m512 entries = _mm512_loadu_ps(table);
    const __m512i mask = _mm512_set1_epi64(0x0000000f0000000f);
    for (int i = 0; i < 4; ++i) {
        // A byte in each 64-bit lane; its high nibble goes to the low half, its low nibble to the high half.
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
        const __m512i both = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(_mm512_and_si512(both, mask), entries));
    }
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    for (int i = 0; i < 8; ++i) {
        int32_t four;
        std::memcpy(&four, codes + 4 * i, sizeof four);
        const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        const __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
        // permutevar8x32 reads bits 0-2; bit 3, moved to the sign, picks between the two halves of the table.
        const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        _mm256_storeu_ps(out + 8 * i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                       _mm256_permutevar8x32_ps(high, index), choose));
    }
#elif defined(QLK_NEON)
    Vec values[kBlock / kWidth];
    lookup_vectors<float>(codes, table, values);
    for (int i = 0; i < kBlock / kWidth; ++i) vstore(out + i * kWidth, values[i]);
#else
    for (int i = 0; i < 32; ++i) {
        out[2 * i] = table[codes[i] >> 4];
        out[2 * i + 1] = table[codes[i] & 15];
    }
#endif
}

// Elements [begin, end) of the flat weight, rounded through T, as float32. begin and end are arbitrary.
template <class T>
inline void decode_flat(const WeightView& w, int64_t begin, int64_t end, float* out) {
    constexpr int kBatch = 16;  // blocks whose constants are decoded together
    float absmax[kBatch];
    float table[16];
    while (begin < end) {
        const int64_t first = begin / kBlock;
        int64_t blocks = (end + kBlock - 1) / kBlock - first;
        if (blocks > kBatch) blocks = kBatch;
        decode_absmax(w, first, blocks, absmax);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t block_begin = (first + b) * kBlock;
            const int64_t stop = block_begin + kBlock < end ? block_begin + kBlock : end;
            block_table<T>(w.levels, absmax[b], table);
            if (begin == block_begin && stop == block_begin + kBlock) {
                lookup_block(w.packed + begin / 2, table, out);
            } else {
                for (int64_t i = begin; i < stop; ++i) out[i - begin] = table[code_at(w.packed, i)];
            }
            out += stop - begin;
            begin = stop;
        }
    }
}

}  // namespace qlk::cpu::QLK_ISA
