// linear_forward for one to eight rows of bf16 (two, where there is AMX): every weight is used as soon as it is
// decoded, so that the packed bytes of W are read once, in order, and nothing of W is ever stored.
#pragma once

#include <omp.h>

#include "nf4_bf16.h"
#include "scratch.h"

namespace qlk::cpu::QLK_ISA {

// How far ahead of their use codes are fetched. From 1 KB on it makes one row 1.2 to 1.8 times as fast (weights in the
// last level of cache or in memory); a page is best, and what is fetched beyond a weight's end is ignored.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int kBatchBlocks = 128;  // block constants decoded at a time

QLK_INLINE __m512 dot_step(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// W[row] . x[m] for kM rows of x, which are in the order of lookup128: [kM][pad].
template <int kM>
QLK_INLINE void row_products(const WeightView& w, int64_t row, const uint16_t* x, int64_t pad, float* out) {
    constexpr int kSums = kM <= 2 ? 4 : 2;  // independent chains for each row of x
    __m512 sum[kM][kSums];
    for (int m = 0; m < kM; ++m) {
        for (int s = 0; s < kSums; ++s) sum[m][s] = _mm512_setzero_ps();
    }
    const __m512i half = half_by_block();
    const uint8_t* const codes = w.packed + row * (w.k / 2);
    const int64_t blocks = w.k / kBlock;
    float absmax[kBatchBlocks];
    for (int64_t first = 0; first < blocks; first += kBatchBlocks) {
        const int64_t count = blocks - first < kBatchBlocks ? blocks - first : kBatchBlocks;
        decode_absmax(w, row * blocks + first, count, absmax);
        const bool tiny = has_tiny(absmax, count);
        const auto step = [&](const Words4& words, int64_t k) {
            for (int j = 0; j < 4; ++j) {
                for (int m = 0; m < kM; ++m) {
                    const __m512i right = _mm512_load_si512(x + m * pad + k + 32 * j);
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
        out[m] = vsum(sum[m][0]);
    }
}

// a . b over count bf16 elements.
QLK_INLINE float dot_bf16(const bf16* a, const bf16* b, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 32)
        sum = dot_step(sum, load_words(a + i, count - i), load_words(b + i, count - i));
    return vsum(sum);
}

// Elements of a row of x as it is packed.
QLK_INLINE int64_t padded(int64_t k) { return (k + 127) / 128 * 128; }

template <int kM>
inline void few_rows_run(const LinearForwardParams& p) {
    const WeightView& w = p.weight;
    const int64_t pad = padded(w.k);
    uint16_t* const x = reinterpret_cast<uint16_t*>(scratch(kM * pad * sizeof(uint16_t), p.threads));
    const uint16_t* const source = static_cast<const uint16_t*>(p.x);
    for (int m = 0; m < kM; ++m) {
        for (int64_t k = 0; k < w.k; k += 128) {
            const Words4 words = weight_order(source + m * w.k + k, w.k - k);
            for (int j = 0; j < 4; ++j) _mm512_store_si512(x + m * pad + k + 32 * j, words.v[j]);
        }
    }
    const bf16* const a = static_cast<const bf16*>(p.lora_a);
    const bf16* const b = static_cast<const bf16*>(p.lora_b);
    bf16* const u = static_cast<bf16*>(p.u);
    bf16* const y = static_cast<bf16*>(p.y);
    // Rows in a piece of work: long runs, because the start of each is read cold, a page before prefetching has caught
    // up (runs of 32 cost a tenth at 4096 rows), but four for each thread. Multiples of 32 fill whole cache lines of y.
    const int64_t share = w.n / (4 * p.threads) / 32 * 32;
    const int64_t run = share < 32 ? 32 : (share > 512 ? 512 : share);

#pragma omp parallel num_threads(p.threads)
    {
        if (p.r > 0) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < p.r; ++i) {
                for (int m = 0; m < kM; ++m) {
                    u[m * p.r + i].bits =
                        bf16_bits(p.scaling * dot_bf16(static_cast<const bf16*>(p.x) + m * w.k, a + i * w.k, w.k));
                }
            }
        }
#pragma omp for schedule(dynamic, run)
        for (int64_t n = 0; n < w.n; ++n) {
            float out[kM];
            row_products<kM>(w, n, x, pad, out);
            for (int m = 0; m < kM; ++m) {
                if (p.r > 0) out[m] += dot_bf16(u + m * p.r, b + n * p.r, p.r);
                if (p.bias) out[m] += p.bias[n];
                y[m * w.n + n].bits = bf16_bits(out[m]);
            }
        }
    }
}

// False when the case is not for this path.
inline bool few_rows_forward(const LinearForwardParams& p) {
    if (p.weight.k % kBlock != 0 || (p.r > 0 && p.dropout > 0)) return false;
    if (!scratch_suffices(p.m * padded(p.weight.k) * sizeof(uint16_t), p.threads)) return false;
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
#endif
        default: return false;
    }
}

}  // namespace qlk::cpu::QLK_ISA
