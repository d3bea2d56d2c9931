// linear_forward for 1 to 4 rows by float32 arithmetic, on instruction sets for which few_rows.h has no dot product.
//
// Formula: y = x W^T + u B^T + bias;  u = scaling * x A^T
//
// Layout: a thread takes rows of W, and decodes a block of 64 weights at a time. x is float32 in scratch.
//
// Registers: up to four vectors of sums for each row of x.
//
// Why: every weight is used as soon as it is decoded. Several vectors of sums keep rounding errors as small as those of
//     a tuned library's dot product.
#pragma once

#include <omp.h>

#include "cpu/quantize/decode.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

constexpr int kFewRowsF32 = 4;
constexpr int kVecs = kBlock / kWidth < 4 ? kBlock / kWidth : 4;  // independent sums for each row of x

// sum[m] += values . x[m] over 64 elements, for kM rows.
template <int kM>
QLK_INLINE void block_products(const float* values, const float* x, int64_t ld, Vec (&sum)[kM][kVecs]) {
    for (int v = 0; v < kBlock / kWidth; ++v) {
        const Vec left = vload(values + v * kWidth);
        for (int m = 0; m < kM; ++m) {
            sum[m][v % kVecs] = vfma(left, vload(x + m * ld + v * kWidth), sum[m][v % kVecs]);
        }
    }
}

template <int kM>
QLK_INLINE void clear_sums(Vec (&sum)[kM][kVecs]) {
    for (int m = 0; m < kM; ++m) {
        for (int v = 0; v < kVecs; ++v) sum[m][v] = vset(0.0f);
    }
}

QLK_INLINE float total(const Vec (&sum)[kVecs]) {
    Vec all = sum[0];
    for (int v = 1; v < kVecs; ++v) all = all + sum[v];
    return vsum(all);
}

// out[m] = row . x[m] for a dense row of K elements of T.
template <class T, int kM>
inline void dense_products(const T* row, const float* x, int64_t k, float* out) {
    Vec sum[kM][kVecs];
    clear_sums(sum);
    float values[kBlock];
    for (int64_t i = 0; i < k; i += kBlock) {
        to_float(row + i, values, kBlock);
        block_products(values, x + i, k, sum);
    }
    for (int m = 0; m < kM; ++m) out[m] = total(sum[m]);
}

// kM: rows of x.
template <class T, int kM>
inline bool few_rows_f32_run(const LinearForwardParams& p) {
    const WeightView& w = p.weight;
    const int64_t row_blocks = w.k / kBlock;
    Carver shared(nullptr);
    shared.take<float>(kM * w.k);
    const int64_t own = (row_blocks + 15) / 16 * 16;
    const size_t bytes = shared.used() + p.threads * own * sizeof(float);
    if (!scratch_suffices(bytes, p.threads)) return false;
    float* const x = reinterpret_cast<float*>(scratch(bytes, p.threads));
    float* const constants = x + shared.used() / sizeof(float);
    to_float(static_cast<const T*>(p.x), x, kM * w.k);
    const T* const a = static_cast<const T*>(p.lora_a);
    const T* const b = static_cast<const T*>(p.lora_b);
    T* const u = static_cast<T*>(p.u);
    T* const y = static_cast<T*>(p.y);

#pragma omp parallel num_threads(p.threads)
    {
        float* const absmax = constants + omp_get_thread_num() * own;
        if (p.r > 0) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < p.r; ++i) {
                float out[kM];
                dense_products<T, kM>(a + i * w.k, x, w.k, out);
                for (int m = 0; m < kM; ++m) {
                    out[m] *= p.scaling;
                    from_float(out + m, u + m * p.r + i, 1);
                }
            }
        }
#pragma omp for schedule(dynamic, 32)
        for (int64_t n = 0; n < w.n; ++n) {
            Vec sum[kM][kVecs];
            clear_sums(sum);
            decode_absmax(w, n * row_blocks, row_blocks, absmax);
            const uint8_t* const codes = w.packed + n * w.k / 2;
            for (int64_t i = 0; i < row_blocks; ++i) {
                alignas(64) float table[16], values[kBlock];
                block_table<T>(absmax[i], table);
                lookup_block(codes + i * kBlock / 2, table, values);
                block_products(values, x + i * kBlock, w.k, sum);
            }
            for (int m = 0; m < kM; ++m) {
                float out = total(sum[m]);
                for (int64_t i = 0; i < p.r; ++i) {
                    float left, right;
                    to_float(u + m * p.r + i, &left, 1);
                    to_float(b + n * p.r + i, &right, 1);
                    out += left * right;
                }
                if (p.bias) out += p.bias[n];
                from_float(&out, y + m * w.n + n, 1);
            }
        }
    }
    return true;
}

// Returns false, without doing anything, if this path doesn't take the case.
template <class T>
inline bool few_rows_f32(const LinearForwardParams& p) {
    if (p.weight.k % kBlock != 0 || (p.r > 0 && p.dropout > 0)) return false;
    switch (p.m) {
        case 1: return few_rows_f32_run<T, 1>(p);
        case 2: return few_rows_f32_run<T, 2>(p);
        case 3: return few_rows_f32_run<T, 3>(p);
        case 4: return few_rows_f32_run<T, 4>(p);
        default: return false;
    }
}

}  // namespace qlk::cpu::QLK_ISA
