// linear_forward over an engine (engine_f32.h, engine_bf16.h), for one instruction set.
//
// Formula: u = scaling / (1 - p) * mask(x) A^T;  y = x W^T + u B^T + bias
//
// Layout:
//     block of C  [32 n][32 m], float32: y transposed, summed over k and then over r
//     panel       [32 n] of W by kDepthForward of k, decoded; serves all rows of a superblock
//     superblock  up to 512 rows of x
//     task        n_block columns of y for a superblock
//
// Scratch: shared, packed x and u of a superblock; for each thread its blocks of C (at most 1 MiB), a panel and
//     constants.
//
// Why: panels stay in the core's cache, and results don't depend on which thread runs a task. Where packed x would not
//     fit, each task packs its own, "piecewise": docs/design/notes-cpu.md, "Panels and superblocks".
#pragma once

#include <omp.h>

#include "cpu/linear/store.h"
#include "cpu/linear/superblock.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

// E: the engine.
template <class E>
class Forward {
    using T = typename E::T;
    using Elem = typename E::Elem;

  public:
    explicit Forward(const LinearForwardParams& params) : p(params), w(params.weight) {
        k_pad = E::pad_weight(w.k);
        r_pad = p.r > 0 ? E::pad_plain(p.r) : 0;
        constexpr int64_t kSize = sizeof(Elem);
        const int64_t fit = rows_that_fit((k_pad + r_pad) * kSize, p.threads);
        piecewise = fit < lesser(round_up(p.m, kEdge), kMinSuperblock);
        rows_max = superblock_rows(p.m, piecewise ? rows_that_fit(r_pad * kSize, p.threads) : fit);
        // C of a task is at most 1 MiB.
        n_block =
            block_of_columns(p.end() - p.n_begin, lesser(piecewise ? 512 : 256, (1 << 18) / rows_max / kEdge * kEdge),
                             piecewise ? 512 : 32, p.threads);
        row_blocks = w.k % kBlock == 0 ? w.k / kBlock : 0;
        span_blocks = lesser(row_blocks, kSpan / kBlock);
    }

    void run() {
        if (p.m == 0 || w.n == 0) return;
        Carver shared(nullptr), each(nullptr);
        carve_shared(shared);
        carve_thread(each);
        shared_bytes = shared.used();
        thread_bytes = each.used();
        char* const base = scratch(shared_bytes + p.threads * thread_bytes, p.threads);
        Carver area(base);
        carve_shared(area);
        for (int64_t m0 = 0; m0 < p.m; m0 += rows_max) superblock(m0, lesser(rows_max, p.m - m0), base);
    }

  private:
    struct Thread {
        float* c;       // [n_block / 32][m blocks][32 n][32 m]
        Elem* panel;    // [32][depth]
        Elem* piece;    // [m blocks][depth][32], x packed piecewise; or one block of masked x
        T* line;        // [32][depth], masked x
        float* absmax;  // [n_block][span_blocks]
    };

    void carve_shared(Carver& area) {
        x_packed = area.take<Elem>(piecewise ? 0 : rows_max * k_pad);
        u_packed = area.take<Elem>(rows_max * r_pad);
    }

    Thread carve_thread(Carver& area) const {
        Thread mine;
        mine.c = area.take<float>(n_block * rows_max);
        mine.panel = area.take<Elem>(kEdge * depth);
        mine.piece = area.take<Elem>(piecewise ? rows_max * depth : p.dropout > 0 ? kEdge * depth : 0);
        mine.line = area.take<T>(p.dropout > 0 ? kEdge * depth : 0);
        mine.absmax = area.take<float>(n_block * span_blocks);
        return mine;
    }

    void superblock(int64_t m0, int64_t rows, char* base) {
        const int64_t m_blocks = (rows + kEdge - 1) / kEdge;
#pragma omp parallel num_threads(p.threads)
        {
            E::begin_thread();
            Carver area(base + shared_bytes + omp_get_thread_num() * thread_bytes);
            const Thread mine = carve_thread(area);
            const int64_t slices = piecewise ? 0 : (w.k + depth - 1) / depth;
#pragma omp for schedule(static)
            for (int64_t task = 0; task < m_blocks * slices; ++task) {
                const int64_t mb = task / slices, k = task % slices * depth;
                E::pack_b_rows(x_row(m0 + mb * kEdge) + k, w.k, rows_in(mb, rows), lesser(depth, w.k - k),
                               x_at(mb, k, m_blocks), true);
            }
            if (p.r > 0) low_rank(mine, m0, rows, m_blocks);
#pragma omp for schedule(dynamic)
            for (int64_t n0 = p.n_begin; n0 < p.end(); n0 += n_block)
                products(mine, n0, lesser(n_block, p.end() - n0), m0, rows, m_blocks);
            E::end_thread();
        }
    }

    // Packed x from step k on, a multiple of depth, for row block mb. All rows of a panel's steps are together: blocks
    // that are a power of two apart would share few sets of the second-level cache.
    Elem* x_at(int64_t mb, int64_t k, int64_t m_blocks) const {
        return x_packed + (k * m_blocks + mb * lesser(depth, k_pad - k)) * kEdge;
    }

    const T* x_row(int64_t m) const { return static_cast<const T*>(p.x) + m * w.k; }
    static int rows_in(int64_t block, int64_t rows) { return static_cast<int>(lesser(kEdge, rows - block * kEdge)); }

    // u = scaling / (1 - p) * mask(x) A^T, rounded to T, and packed as the last steps of the main sum.
    void low_rank(const Thread& mine, int64_t m0, int64_t rows, int64_t m_blocks) const {
        const int64_t r_blocks = (p.r + kEdge - 1) / kEdge;
        const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
        const uint32_t threshold = dropout_threshold(p.dropout);
        T* const u = static_cast<T*>(p.u);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < m_blocks * r_blocks; ++task) {
            const int64_t mb = task / r_blocks, r0 = task % r_blocks * kEdge;
            const int ranks = static_cast<int>(lesser(kEdge, p.r - r0));
            const int m_rows = rows_in(mb, rows);
            const T* const a = static_cast<const T*>(p.lora_a) + r0 * w.k;
            for (int64_t k = 0; k < w.k; k += depth) {
                const int64_t steps = lesser(depth, w.k - k);
                E::pack_a_rows(a + k, w.k, ranks, steps, mine.panel, true);
                const Elem* right = piecewise ? mine.piece : x_at(mb, k, m_blocks);
                if (p.dropout > 0) {
                    for (int i = 0; i < m_rows; ++i) {
                        const int64_t row = m0 + mb * kEdge + i;
                        masked_copy(x_row(row) + k, row * w.k + k, steps, p.seed, threshold, mine.line + i * steps);
                    }
                    E::pack_b_rows(mine.line, steps, m_rows, steps, mine.piece, true);
                    right = mine.piece;
                } else if (piecewise) {
                    E::pack_b_rows(x_row(m0 + mb * kEdge) + k, w.k, m_rows, steps, mine.piece, true);
                }
                E::multiply(mine.panel, right, E::pad_weight(steps), mine.c, tiles_of(ranks), tiles_of(m_rows), k > 0);
            }
            for (int i = 0; i < m_rows; ++i) {
                float line[kEdge];
                for (int j = 0; j < ranks; ++j) line[j] = scale * mine.c[j * kEdge + i];
                from_float(line, u + (m0 + mb * kEdge + i) * p.r + r0, ranks);
            }
        }
#pragma omp for schedule(static)
        for (int64_t mb = 0; mb < m_blocks; ++mb) {
            E::pack_b_rows(u + (m0 + mb * kEdge) * p.r, p.r, rows_in(mb, rows), p.r, u_packed + mb * r_pad * kEdge,
                           false);
        }
    }

    // Decodes the constants of rows [n0, n0 + count) of W, kSpan columns from column block `first`. Returns whether
    // they are special.
    bool decode_constants(const Thread& mine, int64_t n0, int64_t count, int64_t first) const {
        if (span_blocks == row_blocks) {
            decode_absmax(w, n0 * row_blocks, count * row_blocks, mine.absmax);
        } else {
            const int64_t blocks = lesser(span_blocks, row_blocks - first);
            for (int64_t i = 0; i < count; ++i) {
                float* const out = mine.absmax + i * span_blocks;
                decode_absmax(w, (n0 + i) * row_blocks + first, blocks, out);
                for (int64_t b = blocks; b < span_blocks; ++b) out[b] = kNoBlock;
            }
        }
        return E::special(mine.absmax, count * span_blocks);
    }

    // Columns [n0, n0 + count) of y for the whole superblock.
    void products(const Thread& mine, int64_t n0, int64_t count, int64_t m0, int64_t rows, int64_t m_blocks) const {
        const int64_t panels = (count + kEdge - 1) / kEdge;
        constexpr int64_t kBlockC = kEdge * kEdge;
        bool special = false;
        for (int64_t k = 0; k < w.k; k += depth) {
            const int64_t steps = lesser(depth, w.k - k);
            if (row_blocks > 0 && k % kSpan == 0) special = decode_constants(mine, n0, count, k / kBlock);
            if (piecewise) {
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    E::pack_b_rows(x_row(m0 + mb * kEdge) + k, w.k, rows_in(mb, rows), steps,
                                   mine.piece + mb * depth * kEdge, true);
                }
            }
            for (int64_t q = 0; q < panels; ++q) {
                const int n_rows = rows_in(q, count);
                E::decode_a(w, mine.absmax + q * kEdge * span_blocks + k % kSpan / kBlock, span_blocks, n0 + q * kEdge,
                            n_rows, k, steps, special, mine.panel);
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    E::multiply(mine.panel, piecewise ? mine.piece + mb * depth * kEdge : x_at(mb, k, m_blocks),
                                E::pad_weight(steps), mine.c + (q * m_blocks + mb) * kBlockC, tiles_of(n_rows),
                                tiles_of(rows_in(mb, rows)), k > 0);
                }
            }
        }
        const T* const b = static_cast<const T*>(p.lora_b);
        for (int64_t r0 = 0; r0 < p.r; r0 += depth) {
            const int64_t steps = lesser(depth, p.r - r0);
            for (int64_t q = 0; q < panels; ++q) {
                const int n_rows = rows_in(q, count);
                E::pack_a_rows(b + (n0 + q * kEdge) * p.r + r0, p.r, n_rows, steps, mine.panel, false);
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    E::multiply(mine.panel, u_packed + (mb * r_pad + r0) * kEdge, E::pad_plain(steps),
                                mine.c + (q * m_blocks + mb) * kBlockC, tiles_of(n_rows), tiles_of(rows_in(mb, rows)),
                                true);
                }
            }
        }
        T* const y = static_cast<T*>(p.y);
        for (int64_t mb = 0; mb < m_blocks; ++mb) {
            for (int64_t q = 0; q < panels; ++q) {
                const int64_t n = n0 + q * kEdge, m = m0 + mb * kEdge;
                store_transposed(mine.c + (q * m_blocks + mb) * kBlockC, p.bias ? p.bias + n : nullptr,
                                 rows_in(q, count), rows_in(mb, rows), y + m * w.n + n, w.n);
            }
        }
    }

    const LinearForwardParams& p;
    const WeightView& w;
    static constexpr int64_t depth = E::kDepthForward;
    // Columns of W whose constants are decoded together.
    static constexpr int64_t kSpan = 4096;
    static_assert(kSpan % depth == 0, "a panel's constants are decoded together");
    bool piecewise;
    int64_t k_pad, r_pad, rows_max, n_block, row_blocks, span_blocks;
    size_t shared_bytes = 0, thread_bytes = 0;
    Elem* x_packed = nullptr;  // [k_pad / depth][m blocks][depth][32], unless piecewise
    Elem* u_packed = nullptr;  // [m blocks][r_pad][32]
};

}  // namespace qlk::cpu::QLK_ISA
