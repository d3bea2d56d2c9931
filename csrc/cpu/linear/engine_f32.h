// The float32 engine: panels are decoded and packed to float32, products are FMAs.
//
// Formula: C[32 i][32 j] += A[i][p] * B[p][j], row-major float32
//
// Layout: A [32][lda], B [p][ldb]. An engine is free to choose these; forward.h and backward.h drive it.
//
// Registers: 8 rows of C (AVX-512) or 4 by two vectors.
//
// Why: it serves float32 and float16 activations on every instruction set, and bfloat16 where there is no bf16
//     arithmetic.
#pragma once

#include "cpu/quantize/decode.h"

namespace qlk::cpu::QLK_ISA {

constexpr int kEdge = 32;    // rows and columns of a block of C
constexpr int kPanel = 128;  // columns of a panel of W in backward: one cache line of codes

// Type: the activations' type.
template <class Type>
struct EngineF32 {
    using T = Type;
    using Elem = float;
    // Whether these constants need the engine's careful path. Passed on to decode_a and decode_b.
    static bool special(const float*, int64_t) { return false; }
    // Steps between two visits to C: 32 rows of 256 floats are 32 KB.
    static constexpr int64_t kDepthForward = 256;
    static constexpr int64_t kDepthBackward = 64;

    // Called by each thread before and after its products.
    static void begin_thread() {}
    static void end_thread() {}

    // Padded length of a packed reduction dimension, in W's order or in plain order.
    static int64_t pad_weight(int64_t k) { return k; }
    static int64_t pad_plain(int64_t r) { return r; }

    // Start of step p in a packed A, and of column block jb in a backward panel.
    static const float* a_at(const float* a, int64_t p) { return a + p; }
    static const float* panel_block(const float* panel, int64_t, int jb) { return panel + jb * kEdge; }
    static constexpr int64_t kPanelLd = kPanel;

    // A from rows of a dense matrix: a[i][p] = src[i * ld + p].
    static void pack_a_rows(const T* src, int64_t ld, int rows, int64_t depth, float* dst, int64_t lda, bool) {
        for (int i = 0; i < kEdge; ++i) {
            if (i < rows) {
                to_float(src + i * ld, dst + i * lda, depth);
            } else {
                std::memset(dst + i * lda, 0, depth * sizeof(float));
            }
        }
    }

    // A from columns of a dense matrix: a[i][p] = src[p * ld + i].
    static void pack_a_columns(const T* src, int64_t ld, int columns, int64_t depth, float* dst, int64_t lda) {
        for (int i = 0; i < kEdge; ++i) {
            for (int64_t p = 0; p < depth; ++p) {
                dst[i * lda + p] = 0;
                if (i < columns) to_float(src + p * ld + i, dst + i * lda + p, 1);
            }
        }
    }

    // A from rows [row, row + rows) of W, columns [k, k + depth); absmax: [rows][absmax_ld], starting at k's block.
    static void decode_a(const WeightView& w, const float* absmax, int64_t absmax_ld, int64_t row, int rows, int64_t k,
                         int64_t depth, bool, float* dst, int64_t lda) {
        for (int i = 0; i < kEdge; ++i) {
            float* const out = dst + i * lda;
            if (i >= rows) {
                std::memset(out, 0, depth * sizeof(float));
            } else if (w.k % kBlock == 0) {
                decode_row(w, absmax + i * absmax_ld, row + i, k, depth, out);
            } else {
                const int64_t begin = (row + i) * w.k + k;
                decode_flat<T>(w, begin, begin + depth, out);
            }
        }
    }

    // B from rows of a dense matrix: b[p][j] = src[j * ld + p].
    static void pack_b_rows(const T* src, int64_t ld, int rows, int64_t depth, float* dst, bool) {
        float line[kEdge][16];
        for (int64_t p = 0; p < depth; p += 16) {
            const int64_t steps = depth - p < 16 ? depth - p : 16;
            for (int j = 0; j < kEdge; ++j) {
                if (j < rows) {
                    to_float(src + j * ld + p, line[j], steps);
                } else {
                    std::memset(line[j], 0, sizeof line[j]);
                }
            }
            for (int64_t s = 0; s < steps; ++s) {
                for (int j = 0; j < kEdge; ++j) dst[(p + s) * kEdge + j] = line[j][s];
            }
        }
    }

    // B from columns of a dense matrix: b[p][j] = src[p * ld + j], 128 columns.
    static void pack_b_columns(const T* src, int64_t ld, int64_t depth, int columns, float* dst) {
        for (int64_t p = 0; p < depth; ++p) {
            to_float(src + p * ld, dst + p * kPanel, columns);
            for (int j = columns; j < kPanel; ++j) dst[p * kPanel + j] = 0;
        }
    }

    // B from rows [row, row + depth) of W, columns [k, k + columns); absmax: [depth][absmax_ld], starting at k's block.
    static void decode_b(const WeightView& w, const float* absmax, int64_t absmax_ld, int64_t row, int64_t depth,
                         int64_t k, int columns, bool, float* dst) {
        for (int64_t p = 0; p < depth; ++p) {
            float* const out = dst + p * kPanel;
            if (w.k % kBlock == 0) {
                decode_row(w, absmax + p * absmax_ld, row + p, k, columns, out);
            } else {
                const int64_t begin = (row + p) * w.k + k;
                decode_flat<T>(w, begin, begin + columns, out);
            }
            for (int j = columns; j < kPanel; ++j) out[j] = 0;
        }
    }

    // One row of a backward panel's four blocks, in the order of W's columns. c: block 0; stride: to the next block.
    static void unpack_row(const float* c, int64_t stride, int row, float* out) {
        for (int jb = 0; jb < kPanel / kEdge; ++jb) {
            std::memcpy(out + jb * kEdge, c + jb * stride + row * kEdge, kEdge * sizeof(float));
        }
    }

    // The inverse of unpack_row.
    static void pack_row(const float* line, float* c, int64_t stride, int row) {
        for (int jb = 0; jb < kPanel / kEdge; ++jb) {
            std::memcpy(c + jb * stride + row * kEdge, line + jb * kEdge, kEdge * sizeof(float));
        }
    }

    // c = A B, or c += A B. Runs of 16 steps are summed by themselves, then the runs of a panel, then panels in C. The
    // first panel may be the only one: its runs have 8 steps, and 64 steps at a time go to C. docs/design/notes-cpu.md,
    // "Rounding in float32", has the errors.
    static void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int i_tiles,
                         int j_tiles, bool accumulate) {
        alignas(64) float sums[kEdge * kEdge];
        if (accumulate) {
            block<16>(a, lda, b, ldb, depth, sums, i_tiles, j_tiles);
            add(sums, c, i_tiles, j_tiles, true);
            return;
        }
        constexpr int64_t kFirst = 64;
        for (int64_t p = 0; p < depth; p += kFirst) {
            block<8>(a + p, lda, b + p * ldb, ldb, depth - p < kFirst ? depth - p : kFirst, sums, i_tiles, j_tiles);
            add(sums, c, i_tiles, j_tiles, p > 0);
        }
    }

  private:
    // c = sums, or c += sums.
    static QLK_INLINE void add(const float* sums, float* c, int i_tiles, int j_tiles, bool accumulate) {
        for (int i = 0; i < 16 * i_tiles; ++i) {
            for (int j = 0; j < 16 * j_tiles; j += kWidth) {
                const Vec sum = vload(sums + i * kEdge + j);
                vstore(c + i * kEdge + j, accumulate ? vload(c + i * kEdge + j) + sum : sum);
            }
        }
    }

    // c = A B over `depth` steps. Not inlined: inside deeper loops GCC no longer keeps the sums in registers, which is
    // 3 times as slow.
    template <int64_t kRun>
    static __attribute__((noinline)) void block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                                                float* c, int i_tiles, int j_tiles) {
        constexpr int kRows = kWidth == 16 ? 8 : 4;
        for (int i = 0; i < 16 * i_tiles; i += kRows) {
            int j = 0;
            for (; j + 2 * kWidth <= 16 * j_tiles; j += 2 * kWidth) {
                tile<kRun, kRows, 2>(a + i * lda, lda, b + j, ldb, depth, c + i * kEdge + j);
            }
            for (; j < 16 * j_tiles; j += kWidth) {
                tile<kRun, kRows, 1>(a + i * lda, lda, b + j, ldb, depth, c + i * kEdge + j);
            }
        }
    }

    // Decodes `count` columns of a row, from column k. absmax: starting at k's block.
    static QLK_INLINE void decode_row(const WeightView& w, const float* absmax, int64_t row, int64_t k, int64_t count,
                                      float* out) {
        float table[16];
        const uint8_t* const codes = w.packed + (row * w.k + k) / 2;
        for (int64_t b = 0; b < count / kBlock; ++b) {
            block_table<T>(absmax[b], table);
            lookup_block(codes + b * kBlock / 2, table, out + b * kBlock);
        }
    }

    // kRows x kVecs vectors of C. kRun: steps in a run.
    template <int64_t kRun, int kRows, int kVecs>
    static QLK_INLINE void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c) {
        for (int64_t first = 0; first < depth; first += kRun) {
            const int64_t last = first + kRun < depth ? first + kRun : depth;
            Vec sum[kRows][kVecs];
            for (int i = 0; i < kRows; ++i) {
                for (int v = 0; v < kVecs; ++v) sum[i][v] = vset(0.0f);
            }
            for (int64_t p = first; p < last; ++p) {
                Vec right[kVecs];
                for (int v = 0; v < kVecs; ++v) right[v] = vload(b + p * ldb + v * kWidth);
                for (int i = 0; i < kRows; ++i) {
                    const Vec left = vset(a[i * lda + p]);
                    for (int v = 0; v < kVecs; ++v) sum[i][v] = vfma(left, right[v], sum[i][v]);
                }
            }
            for (int i = 0; i < kRows; ++i) {
                for (int v = 0; v < kVecs; ++v) {
                    float* const out = c + i * kEdge + v * kWidth;
                    vstore(out, first > 0 ? vload(out) + sum[i][v] : sum[i][v]);
                }
            }
        }
    }
};

}  // namespace qlk::cpu::QLK_ISA
