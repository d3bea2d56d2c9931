// The float32 engine: panels are decoded and packed to float32, products are FMAs.
//
// Formula: C[32 i][32 j] += A[i][p] * B[p][j], row-major float32
//
// Layout, with steps of the reduction in the order of nf4_f32.h where they are W's columns:
//     A   [step / 16][32 i][16 p]: rows of one cache line
//     B   [p][32 j]; a backward panel is four of them
// An engine is free to choose these; forward.h and backward.h drive it.
//
// Registers: 8 rows of C (AVX-512) or 6 by two vectors.
//
// Why: it serves float32 and float16 activations on every instruction set, and bfloat16 where there is no bf16
//     arithmetic.
#pragma once

#include "cpu/linear/nf4_f32.h"

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
    // Steps between two visits to C.
    static constexpr int64_t kDepthForward = 256;
    static constexpr int64_t kDepthBackward = 128;
    // Whether backward asks for the next rows of dy while it multiplies these.
    static constexpr bool kPrefetchLeft = true;

    // Called by each thread before and after its products.
    static void begin_thread() {}
    static void end_thread() {}

    // Padded length of a packed reduction dimension, in W's order or in plain order.
    static int64_t pad_weight(int64_t k) { return (k + kBlock - 1) / kBlock * kBlock; }
    static int64_t pad_plain(int64_t r) { return (r + kSteps - 1) / kSteps * kSteps; }

    // Start of step p in a packed A, and of column block jb in a backward panel.
    static const float* a_at(const float* a, int64_t p) { return a + p * kEdge; }
    static const float* panel_block(const float* panel, int64_t depth, int jb) {
        return panel + jb * pad_plain(depth) * kEdge;
    }

    // A from rows of a dense matrix: a[i][p] = src[i * ld + p]. as_weight: in W's order.
    static void pack_a_rows(const T* src, int64_t ld, int rows, int64_t depth, float* dst, bool as_weight) {
        // Rows inside, so that all of a unit is written while it is in the cache. Of 16 rows the other half isn't read.
        const int padded = rows > 16 ? kEdge : 16;
        for (int64_t p = 0; p < depth; p += kBlock) {
            const int64_t count = depth - p < kBlock ? depth - p : kBlock;
            const int64_t units = as_weight ? kBlock / kSteps : pad_plain(count) / kSteps;
            for (int i = 0; i < padded; ++i) {
                alignas(64) float line[kBlock] = {};
                if (i < rows) to_float(src + i * ld + p, line, count);
                float* const out = dst + p * kEdge + i * kSteps;
                if (as_weight) {
                    weight_order(plain<const float>(line), {out, kUnit, 2 * kUnit});
                } else {
                    for (int64_t u = 0; u < units; ++u) std::memcpy(out + u * kUnit, line + u * kSteps, 64);
                }
            }
        }
    }

    // A from columns of a dense matrix: a[i][p] = src[p * ld + i].
    static void pack_a_columns(const T* src, int64_t ld, int columns, int64_t depth, float* dst) {
        for (int64_t p = 0; p < pad_plain(depth); ++p) {
            float line[kEdge] = {};
            if (p < depth) to_float(src + p * ld, line, columns);
            float* const out = dst + p / kSteps * kUnit + p % kSteps;
            for (int i = 0; i < kEdge; ++i) out[i * kSteps] = line[i];
        }
    }

    // A from rows [row, row + rows) of W, columns [k, k + depth); absmax: [rows][absmax_ld], starting at k's block.
    static void decode_a(const WeightView& w, const float* absmax, int64_t absmax_ld, int64_t row, int rows, int64_t k,
                         int64_t depth, bool, float* dst) {
        for (int i = 0; i < kEdge; ++i) {
            const int64_t begin = (row + i) * w.k + k;
            const uint8_t* const codes = w.packed + begin / 2;
            for (int64_t p = 0; p < depth; p += kBlock) {
                const BlockAt<float> out{dst + p * kEdge + i * kSteps, kUnit, 2 * kUnit};
                if (i < rows && w.k % kBlock == 0) {
                    // The panel that follows in this row.
                    __builtin_prefetch(codes + p / 2 + kDepthForward / 2);
                    lookup_block(w.levels, codes + p / 2, absmax[i * absmax_ld + p / kBlock], out);
                } else {
                    decode_slowly(w, begin + p, i < rows ? depth - p : 0, out);
                }
            }
        }
    }

    // B from rows of a dense matrix: b[p][j] = src[j * ld + p]. as_weight: in W's order.
    static void pack_b_rows(const T* src, int64_t ld, int rows, int64_t depth, float* dst, bool as_weight) {
        if (as_weight) {
            for (int64_t p = 0; p < depth; p += kBlock) {
                for (int j = 0; j < kEdge; j += 8) {
                    pack_block(src + j * ld + p, ld, rows - j, depth - p, dst + p * kEdge + j);
                }
            }
            return;
        }
        for (int64_t p = 0; p < pad_plain(depth); ++p) {
            for (int j = 0; j < kEdge; ++j) {
                dst[p * kEdge + j] = 0;
                if (j < rows && p < depth) to_float(src + j * ld + p, dst + p * kEdge + j, 1);
            }
        }
    }

    // A backward panel from a dense matrix: b[p][j] = src[p * ld + j], 128 columns, in W's order.
    static void pack_b_columns(const T* src, int64_t ld, int64_t depth, int columns, float* dst) {
        const int64_t pad = pad_plain(depth);
        for (int64_t p = 0; p < pad; ++p) {
            float line[kPanel] = {};
            if (p < depth) to_float(src + p * ld, line, columns);
            pack_row(line, dst + p * kEdge, pad * kEdge, 0);
        }
    }

    // A backward panel from rows [row, row + depth) of W, columns [k, k + columns); absmax: [depth][absmax_ld],
    // starting at k's block.
    static void decode_b(const WeightView& w, const float* absmax, int64_t absmax_ld, int64_t row, int64_t depth,
                         int64_t k, int columns, bool, float* dst) {
        const int64_t pad = pad_plain(depth);
        for (int64_t p = 0; p < pad; ++p) {
            const int64_t begin = (row + p) * w.k + k;
            const uint8_t* const codes = w.packed + begin / 2;
            // The same columns in the panel below: its lines are too far apart for the hardware to see a pattern.
            __builtin_prefetch(codes + kDepthBackward * (w.k / 2), 0, 2);
            for (int g = 0; g < kPanel / kBlock; ++g) {
                const int left = p < depth ? columns - g * kBlock : 0;
                const BlockAt<float> out{dst + (2 * g * pad + p) * kEdge, 16, pad * kEdge};
                if (left > 0 && w.k % kBlock == 0) {
                    lookup_block(w.levels, codes + 32 * g, absmax[p * absmax_ld + g], out);
                } else {
                    decode_slowly(w, begin + g * kBlock, left, out);
                }
            }
        }
    }

    // One row of a backward panel's four blocks, from W's order to the natural one. c: block 0; stride: to the next.
    static void unpack_row(const float* c, int64_t stride, int row, float* out) {
        for (int g = 0; g < kPanel; g += kBlock) {
            weight_order({c + g / kEdge * stride + row * kEdge, 16, stride}, plain(out + g));
        }
    }

    // The inverse of unpack_row.
    static void pack_row(const float* line, float* c, int64_t stride, int row) {
        for (int g = 0; g < kPanel; g += kBlock) {
            weight_order(plain(line + g), {c + g / kEdge * stride + row * kEdge, 16, stride});
        }
    }

    // c = A B, or c += A B; depth: a multiple of 16. 16-bit results hide the rounding of float32 sums, so for these a
    // panel's steps are one run. For float32 runs of 64 steps are summed by themselves, or of 32 in the first panel,
    // which may be the only one; then the runs of a panel, then panels, in C. docs/design/notes-cpu.md, "Rounding in
    // float32", has the errors.
    static void multiply(const float* a, const float* b, int64_t depth, float* c, int i_tiles, int j_tiles,
                         bool accumulate) {
        if (sizeof(T) < sizeof(float)) {
            block(a, b, depth, depth, c, i_tiles, j_tiles, accumulate);
        } else if (accumulate && depth > 64) {
            alignas(64) float sums[kEdge * kEdge];
            block(a, b, depth, 64, sums, i_tiles, j_tiles, false);
            for (int i = 0; i < 16 * i_tiles; ++i) {
                for (int j = 0; j < 16 * j_tiles; j += kWidth) {
                    vstore(c + i * kEdge + j, vload(c + i * kEdge + j) + vload(sums + i * kEdge + j));
                }
            }
        } else {
            block(a, b, depth, accumulate ? 64 : 32, c, i_tiles, j_tiles, accumulate);
        }
    }

  private:
    static constexpr int64_t kSteps = 16;             // one cache line of a row of A
    static constexpr int64_t kUnit = kSteps * kEdge;  // elements in 16 steps of A

    // 64 steps of up to 8 rows for B, zeros beyond them.
    static QLK_INLINE void pack_block(const T* src, int64_t ld, int64_t rows, int64_t steps, float* dst) {
        if (rows >= 8 && steps >= kBlock) return pack_rows8(src, ld, dst);
        T line[8 * kBlock] = {};
        for (int64_t i = 0; i < rows && i < 8; ++i) {
            std::memcpy(line + i * kBlock, src + i * ld, (steps < kBlock ? steps : kBlock) * sizeof(T));
        }
        pack_rows8(line, kBlock, dst);
    }

    // Up to 64 elements of the flat weight, from anywhere, then zeros, in W's order.
    static void decode_slowly(const WeightView& w, int64_t begin, int64_t count, const BlockAt<float>& out) {
        float line[kBlock] = {};
        if (count > 0) decode_flat<float>(w, begin, begin + (count < kBlock ? count : kBlock), line);
        weight_order(plain<const float>(line), out);
    }

    // C = A B or C += A B, by tiles that fill the registers: of 32, 8 rows by two vectors leave enough; of 16 registers
    // 6 rows by two, and the last 8 (or 4) of 32 (16) rows go by 4. Not inlined: inside deeper loops GCC no longer
    // keeps the sums in registers, which is 3 times as slow.
    static __attribute__((noinline)) void block(const float* a, const float* b, int64_t depth, int64_t run, float* c,
                                                int i_tiles, int j_tiles, bool accumulate) {
        constexpr int kRows = kWidth == 16 ? 8 : 6;
        const int rows = 16 * i_tiles;
        int i = 0;
        for (; kRows == 8 ? i < rows : (rows - i) % 4 != 0 || rows - i > 8; i += kRows) {
            row_tiles<kRows>(a + i * kSteps, b, depth, run, c + i * kEdge, j_tiles, accumulate);
        }
        for (; i < rows; i += 4) {
            row_tiles<4>(a + i * kSteps, b, depth, run, c + i * kEdge, j_tiles, accumulate);
        }
    }

    template <int kRows>
    static QLK_INLINE void row_tiles(const float* a, const float* b, int64_t depth, int64_t run, float* c, int j_tiles,
                                     bool accumulate) {
        int j = 0;
        for (; j + 2 * kWidth <= 16 * j_tiles; j += 2 * kWidth) {
            tile<kRows, 2>(a, b + j, depth, run, c + j, accumulate);
        }
        for (; j < 16 * j_tiles; j += kWidth) tile<kRows, 1>(a, b + j, depth, run, c + j, accumulate);
    }

    // kRows x kVecs vectors of C. run: steps that are summed before they go to C.
    template <int kRows, int kVecs>
    static QLK_INLINE void tile(const float* a, const float* b, int64_t depth, int64_t run, float* c, bool accumulate) {
        for (int64_t first = 0; first < depth; first += run) {
            const int64_t last = first + run < depth ? first + run : depth;
            Vec sum[kRows][kVecs];
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                for (int v = 0; v < kVecs; ++v) sum[i][v] = vset(0.0f);
            }
            for (int64_t unit = first; unit < last; unit += kSteps) {
                for (int64_t p = 0; p < kSteps; ++p) {
                    Vec right[kVecs];
                    for (int v = 0; v < kVecs; ++v) right[v] = vload(b + (unit + p) * kEdge + v * kWidth);
#pragma GCC unroll 8
                    for (int i = 0; i < kRows; ++i) {
                        const Vec left = vset(a[unit * kEdge + i * kSteps + p]);
                        for (int v = 0; v < kVecs; ++v) sum[i][v] = vfma(left, right[v], sum[i][v]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                for (int v = 0; v < kVecs; ++v) {
                    float* const out = c + i * kEdge + v * kWidth;
                    vstore(out, accumulate || first > 0 ? vload(out) + sum[i][v] : sum[i][v]);
                }
            }
        }
    }
};

}  // namespace qlk::cpu::QLK_ISA
