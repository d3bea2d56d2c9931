// linear_forward for 1 to 16 rows of bf16 (1 and 2 where there is AMX).
//
// Formula: y = x W^T + u B^T + bias;  u = scaling * x A^T
//
// Layout: 32 rows of W walk K together, in parts for which all rows of x fit into the first-level cache. x is packed in
//     the order of lookup128.
//
// Registers: one to four vectors of sums for each row of x.
//
// Why: every weight is used as soon as it is decoded, so the packed bytes of W are read once and nothing of W is
//     stored. docs/design/notes-cpu.md, "Few rows", has the figures.
#pragma once

#include <omp.h>
#include <unistd.h>

#include "cpu/linear/nf4_bf16.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

// How far ahead codes are prefetched. From 1 KB on it makes one row 1.2 to 1.8 times as fast (weights in the last-level
// cache or in memory); a page is best. Prefetching past a weight's end does nothing.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kBatchBlocks = 128;  // block constants decoded at a time
constexpr int kTogether = 32;      // rows of W that walk K together

// Bytes of x in a part of K: two thirds of the first-level cache, if the system reports its size. With 48 KiB (Zen 5),
// 32 are 7% to 10% faster than 24 at 8 to 12 rows.
inline int64_t part_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    static const int64_t reported = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
    constexpr int64_t reported = 0;
#endif
    return (reported >= 16 * 1024 ? reported : 32 * 1024) * 2 / 3;
}

QLK_INLINE __m512 dot_step(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// The sums of the lanes of 16 vectors.
QLK_INLINE __m512 sums16(const __m512 (&v)[16]) {
    __m512 two[8], four[4];
    for (int i = 0; i < 8; ++i) {
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    // Now lane i of four[j], 128 bits, has the i-th parts of the sums 4j to 4j + 3.
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 low = halves(four[0], four[1]), high = halves(four[2], four[3]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// out[m] += W[row] . x[m] for kM rows of x, over blocks begin to end of K: an even number of them, or up to the last. x
// is in the order of lookup128, [K / 32][kM][32], so that all rows are a fixed distance away.
template <int kM>
QLK_INLINE void row_products(const WeightView& w, int64_t row, const uint16_t* x, int64_t begin, int64_t end,
                             float* out) {
    constexpr int kSums = kM <= 2 ? 4 : kM <= 8 ? 2 : 1;  // independent chains for each row of x
    __m512 sum[kM][kSums];
    for (int m = 0; m < kM; ++m) {
        for (int s = 0; s < kSums; ++s) sum[m][s] = _mm512_setzero_ps();
    }
    const __m512i half = half_by_block();
    const uint8_t* const codes = w.packed + row * (w.k / 2);
    const int64_t blocks = w.k / kBlock;
    float absmax[kBatchBlocks];
    for (int64_t first = begin; first < end; first += kBatchBlocks) {
        const int64_t count = end - first < kBatchBlocks ? end - first : kBatchBlocks;
        decode_absmax(w, row * blocks + first, count, absmax);
        const bool tiny = has_tiny(absmax, count);
        const auto step = [&](const Words4& words, int64_t k) {
        // The sums stay in registers only if all is unrolled, which GCC does not do by itself for 16 rows.
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 16
                for (int m = 0; m < kM; ++m) {
                    const __m512i right = _mm512_load_si512(x + k * kM + (j * kM + m) * 32);
                    sum[m][j % kSums] = dot_step(sum[m][j % kSums], words.v[j], right);
                }
            }
        };
        int64_t b = 0;
        for (; b + 1 < count; b += 2) {
            const int64_t k = (first + b) * kBlock;
            _mm_prefetch(reinterpret_cast<const char*>(codes + k / 2 + kPrefetchBytes), _MM_HINT_T0);
            step(lookup128(_mm512_loadu_si512(codes + k / 2), table_pair(absmax + b, absmax + b + 1, tiny), half), k);
        }
        if (b < count) {
            const int64_t k = (first + b) * kBlock;
            step(lookup128(load_words(codes + k / 2, 16), table_pair(absmax + b, &kNoBlock, tiny), half), k);
        }
    }
    for (int m = 0; m < kM; ++m) {
        for (int s = 1; s < kSums; ++s) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][s]);
    }
    if constexpr (kM <= 4) {
        for (int m = 0; m < kM; ++m) out[m] += vsum(sum[m][0]);
    } else {
        __m512 all[16];
        for (int m = 0; m < 16; ++m) all[m] = m < kM ? sum[m < kM ? m : 0][0] : _mm512_setzero_ps();
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sums16(all)));
    }
}

// a . b over count bf16 elements.
QLK_INLINE float dot_bf16(const bf16* a, const bf16* b, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 32)
        sum = dot_step(sum, load_words(a + i, count - i), load_words(b + i, count - i));
    return vsum(sum);
}

// Elements of a packed row of x.
QLK_INLINE int64_t padded(int64_t k) { return (k + 127) / 128 * 128; }

// kM: rows of x, p.m or one more, which is zeros.
template <int kM>
inline void few_rows_run(const LinearForwardParams& p) {
    const WeightView& w = p.weight;
    const int rows = static_cast<int>(p.m);
    const int64_t pad = padded(w.k);
    uint16_t* const x = reinterpret_cast<uint16_t*>(scratch(kM * pad * sizeof(uint16_t), p.threads));
    const uint16_t* const source = static_cast<const uint16_t*>(p.x);
    for (int m = 0; m < kM; ++m) {
        for (int64_t k = 0; k < w.k; k += 128) {
            const Words4 words = weight_order(source + (m < rows ? m : 0) * w.k + k, m < rows ? w.k - k : 0);
            for (int j = 0; j < 4; ++j) _mm512_store_si512(x + k * kM + (j * kM + m) * 32, words.v[j]);
        }
    }
    const bf16* const a = static_cast<const bf16*>(p.lora_a);
    const bf16* const b = static_cast<const bf16*>(p.lora_b);
    bf16* const u = static_cast<bf16*>(p.u);
    bf16* const y = static_cast<bf16*>(p.y);
    // Rows in a piece of work. Long runs, because each starts cold, a page before prefetching has caught up (runs of 32
    // cost a tenth at 4096 rows), but four for each thread. Multiples of 32 fill whole cache lines of y.
    const int64_t share = w.n / (4 * p.threads) / 32 * 32;
    const int64_t run = share < 32 ? 32 : (share > 512 ? 512 : share);
    const int64_t blocks = w.k / kBlock;
    const int64_t part_blocks = part_bytes() / (kM * 2 * kBlock * 2) * 2;

#pragma omp parallel num_threads(p.threads)
    {
        if (p.r > 0) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < p.r; ++i) {
                for (int m = 0; m < rows; ++m) {
                    u[m * p.r + i].bits =
                        bf16_bits(p.scaling * dot_bf16(static_cast<const bf16*>(p.x) + m * w.k, a + i * w.k, w.k));
                }
            }
        }
#pragma omp for schedule(dynamic, run / kTogether)
        for (int64_t group = 0; group < (w.n + kTogether - 1) / kTogether; ++group) {
            const int64_t begin = group * kTogether;
            const int count = static_cast<int>(w.n - begin < kTogether ? w.n - begin : kTogether);
            float out[kTogether][16] = {};
            for (int64_t k = 0; k < blocks; k += part_blocks) {
                const int64_t end = blocks - k < part_blocks ? blocks : k + part_blocks;
                for (int i = 0; i < count; ++i) row_products<kM>(w, begin + i, x, k, end, out[i]);
            }
            for (int i = 0; i < count; ++i) {
                const int64_t n = begin + i;
                for (int m = 0; m < rows; ++m) {
                    float sum = out[i][m];
                    if (p.r > 0) sum += dot_bf16(u + m * p.r, b + n * p.r, p.r);
                    if (p.bias) sum += p.bias[n];
                    y[m * w.n + n].bits = bf16_bits(sum);
                }
            }
        }
    }
}

// Returns false, without doing anything, if this path doesn't take the case.
inline bool few_rows_forward(const LinearForwardParams& p) {
    if (p.weight.k % kBlock != 0 || (p.r > 0 && p.dropout > 0)) return false;
    if (!scratch_suffices((p.m + p.m % 2) * padded(p.weight.k) * sizeof(uint16_t), p.threads)) return false;
    switch (p.m) {
        case 1: few_rows_run<1>(p); return true;
        case 2: few_rows_run<2>(p); return true;
#if !defined(__AMX_BF16__)
        // With AMX, stream_amx.h is faster from three rows on.
        case 3: few_rows_run<3>(p); return true;
        case 4: few_rows_run<4>(p); return true;
        case 5: few_rows_run<5>(p); return true;
        case 6: few_rows_run<6>(p); return true;
        case 7: few_rows_run<7>(p); return true;
        case 8: few_rows_run<8>(p); return true;
        case 9:
        case 10: few_rows_run<10>(p); return true;
        case 11:
        case 12: few_rows_run<12>(p); return true;
        case 13:
        case 14: few_rows_run<14>(p); return true;
        case 15:
        case 16: few_rows_run<16>(p); return true;
#endif
        default: return false;
    }
}

}  // namespace qlk::cpu::QLK_ISA
