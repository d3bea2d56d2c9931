// linear_backward over an engine (engine_f32.h, engine_bf16.h), for one instruction set.
//
// Formula: v = scaling / (1 - p) * dy B;  dx = mask(v A) + dy W;  da = v^T mask(x);  db = dy^T u
//
// Layout:
//     block of C  [32][32], float32, four of them for a panel: [32 m][32 k] of dx, summed over r and then over n
//     panel       kDepthBackward rows of W by 128 columns, decoded; serves all rows of a superblock
//     superblock  up to 512 rows of dy
//     task        some panels of dx, or 128 columns of da or db, for a superblock
//
// Scratch: shared, packed dy, v and a transpose; for each thread its blocks of C (at most 1 MiB), a panel and
//     constants.
//
// Why: as in forward.h. da and db add up over superblocks, in their order.
#pragma once

#include <omp.h>

#include "cpu/linear/superblock.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

// E: the engine.
template <class E>
class Backward {
    using T = typename E::T;
    using Elem = typename E::Elem;
    static constexpr int64_t kBlockC = kEdge * kEdge;
    static constexpr int64_t kPanelBlocks = kPanel / kEdge;

  public:
    explicit Backward(const LinearBackwardParams& params) : p(params), w(params.weight) {
        n_pad = E::pad_plain(w.n);
        r_pad = p.r > 0 ? E::pad_plain(p.r) : 0;
        constexpr int64_t kSize = sizeof(Elem);
        const int64_t fit = rows_that_fit((n_pad + r_pad + p.r) * kSize, p.threads);
        piecewise = fit < lesser(round_up(p.m, kEdge), kMinSuperblock);
        rows_max = superblock_rows(p.m, piecewise ? rows_that_fit((r_pad + p.r) * kSize, p.threads) : fit);
        // Columns of dx in a task: C at most 1 MiB, and enough tasks for all threads.
        const int64_t all = p.end() - p.k_begin;
        columns = lesser(round_up(all, kPanel), greater(kPanel, (1 << 18) / rows_max / kPanel * kPanel));
        while (columns > kPanel && all < 2 * p.threads * columns) columns -= kPanel;
        r_round = round_up(greater(p.r, 1), kPanel);
        m_pad = E::pad_plain(rows_max);
    }

    void run() {
        if (p.m == 0) {
            if (p.da) std::memset(p.da, 0, p.r * w.k * sizeof(float));
            if (p.db) std::memset(p.db, 0, p.r * w.n * sizeof(float));
            return;
        }
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
        float* c;       // [m blocks][columns / 32][32][32] for dx; [r blocks][4][32][32] for da and db
        Elem* panel;    // [depth][128]
        Elem* piece;    // [m blocks][32][depth], dy packed piecewise
        T* line;        // [depth][128], masked x
        float* absmax;  // [depth][columns / 64 + 1]
    };

    void carve_shared(Carver& area) {
        dy_packed = area.take<Elem>(!piecewise && (p.dx || p.da) ? rows_max * n_pad : 0);
        v_packed = area.take<Elem>(rows_max * r_pad);
        v = area.take<T>(rows_max * p.r);
        left_packed = area.take<Elem>(p.da || p.db ? round_up(p.r, kEdge) * m_pad : 0);
    }

    Thread carve_thread(Carver& area) const {
        Thread mine;
        mine.c = area.take<float>(greater(rows_max * columns, lesser(r_round, kRanks) * kPanel));
        mine.panel = area.take<Elem>(depth * kPanel);
        mine.piece = area.take<Elem>(piecewise ? rows_max * depth : 0);
        mine.line = area.take<T>(p.dropout > 0 ? depth * kPanel : 0);
        mine.absmax = area.take<float>(depth * (columns / kBlock + 1));
        return mine;
    }

    void superblock(int64_t m0, int64_t rows, char* base) {
        const int64_t m_blocks = (rows + kEdge - 1) / kEdge;
        const T* const dy = static_cast<const T*>(p.dy) + m0 * w.n;
        const bool low_rank = p.r > 0 && (p.dx || p.da);
#pragma omp parallel num_threads(p.threads)
        {
            E::begin_thread();
            Carver area(base + shared_bytes + omp_get_thread_num() * thread_bytes);
            const Thread mine = carve_thread(area);
            const int64_t slices = !piecewise && (p.dx || low_rank) ? (w.n + depth - 1) / depth : 0;
#pragma omp for schedule(static)
            for (int64_t task = 0; task < m_blocks * slices; ++task) {
                const int64_t mb = task / slices, n = task % slices * depth;
                E::pack_a_rows(dy + mb * kEdge * w.n + n, w.n, rows_in(mb, rows), lesser(depth, w.n - n),
                               dy_at(mb, n, m_blocks), false);
            }
            if (low_rank) {
#pragma omp for schedule(dynamic)
                for (int64_t mb = 0; mb < m_blocks; ++mb) through_b(mine, dy, mb, rows, m_blocks);
            }
            if (p.dx) {
#pragma omp for schedule(dynamic)
                for (int64_t k0 = p.k_begin; k0 < p.end(); k0 += columns) {
                    input_gradient(mine, dy, {k0, lesser(columns, p.end() - k0), m0, rows, m_blocks});
                }
            }
            if (p.da) {
                const T* const x = static_cast<const T*>(p.x);
                pack_left(v, rows);
#pragma omp for schedule(dynamic)
                for (int64_t k = 0; k < w.k; k += kPanel) {
                    adapter_gradient(mine, x, w.k, k, m0, rows, p.dropout > 0,
                                     [&](const float* line, int64_t i, int64_t count) {
                                         float* const out = p.da + i * w.k + k;
                                         for (int64_t j = 0; j < count; ++j)
                                             out[j] = m0 > 0 ? out[j] + line[j] : line[j];
                                     });
                }
            }
            if (p.db) {
                pack_left(static_cast<const T*>(p.u) + m0 * p.r, rows);
#pragma omp for schedule(dynamic)
                for (int64_t n = 0; n < w.n; n += kPanel) {
                    adapter_gradient(mine, static_cast<const T*>(p.dy), w.n, n, m0, rows, false,
                                     [&](const float* line, int64_t i, int64_t count) {
                                         float* const out = p.db + n * p.r + i;
                                         for (int64_t j = 0; j < count; ++j) {
                                             out[j * p.r] = m0 > 0 ? out[j * p.r] + line[j] : line[j];
                                         }
                                     });
                }
            }
            E::end_thread();
        }
    }

    static int rows_in(int64_t block, int64_t rows) { return static_cast<int>(lesser(kEdge, rows - block * kEdge)); }

    // Packed dy from step n on, a multiple of depth, for row block mb; in the order of forward.h's x_at.
    Elem* dy_at(int64_t mb, int64_t n, int64_t m_blocks) const {
        return dy_packed + (n * m_blocks + mb * lesser(depth, n_pad - n)) * kEdge;
    }

    // Its lines are 2 KB apart as they are needed, which the hardware does not foresee.
    static void prefetch_block(const Elem* block) {
        constexpr int64_t kLine = 64 / sizeof(Elem);
        for (int64_t i = 0; i < kEdge * depth; i += kLine) __builtin_prefetch(block + i, 0, 2);
    }

    // v for one block of rows, stored and packed for dx. dy: the superblock's.
    void through_b(const Thread& mine, const T* dy, int64_t mb, int64_t rows, int64_t m_blocks) const {
        const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
        const int m_rows = rows_in(mb, rows);
        const T* const b = static_cast<const T*>(p.lora_b);
        T* const out = v + mb * kEdge * p.r;
        for (int64_t r0 = 0; r0 < p.r; r0 += kPanel) {
            const int ranks = static_cast<int>(lesser(kPanel, p.r - r0));
            for (int64_t n = 0; n < w.n; n += depth) {
                const int64_t steps = lesser(depth, w.n - n);
                E::pack_b_columns(b + n * p.r + r0, p.r, steps, ranks, mine.panel);
                if (piecewise) {
                    E::pack_a_rows(dy + mb * kEdge * w.n + n, w.n, m_rows, steps, mine.piece, false);
                }
                panel_product(piecewise ? mine.piece : dy_at(mb, n, m_blocks), mine.panel, steps, m_rows, mine.c,
                              n > 0);
            }
            for (int i = 0; i < m_rows; ++i) {
                float line[kPanel];
                E::unpack_row(mine.c, kBlockC, i, line);
                for (int j = 0; j < ranks; ++j) line[j] *= scale;
                from_float(line, out + i * p.r + r0, ranks);
            }
        }
        E::pack_a_rows(out, p.r, m_rows, p.r, v_packed + mb * kEdge * r_pad, false);
    }

    // The four blocks of C for a panel of 128 columns.
    static void panel_product(const Elem* a, const Elem* panel, int64_t steps, int m_rows, float* c, bool accumulate) {
        for (int jb = 0; jb < kPanelBlocks; ++jb) {
            E::multiply(a, E::panel_block(panel, steps, jb), E::pad_plain(steps), c + jb * kBlockC, tiles_of(m_rows), 2,
                        accumulate);
        }
    }

    // Part of dx that a task computes: columns [k0, k0 + count), for rows [m0, m0 + rows), which are m_blocks blocks.
    struct Part {
        int64_t k0, count;
        int64_t m0, rows, m_blocks;

        int64_t panels() const { return (count + kPanel - 1) / kPanel; }
        // Columns of panel q that exist.
        int columns_in(int64_t q) const { return static_cast<int>(lesser(kPanel, count - q * kPanel)); }
        // C of row block mb and panel q.
        float* c_at(const Thread& mine, int64_t mb, int64_t q) const {
            return mine.c + (mb * panels() + q) * kPanelBlocks * kBlockC;
        }
    };

    // dx of one part. dy: the superblock's.
    void input_gradient(const Thread& mine, const T* dy, const Part& part) const {
        // The low-rank term comes first, so that its mask can be applied to C alone.
        if (p.r > 0) {
            add_low_rank(mine, part);
            if (p.dropout > 0) apply_dropout(mine, part);
        }
        add_weight(mine, dy, part);
        T* const dx = static_cast<T*>(p.dx);
        for (int64_t mb = 0; mb < part.m_blocks; ++mb) {
            for (int i = 0; i < rows_in(mb, part.rows); ++i) {
                T* const out = dx + (part.m0 + mb * kEdge + i) * w.k + part.k0;
                for (int64_t q = 0; q < part.panels(); ++q) {
                    float line[kPanel];
                    E::unpack_row(part.c_at(mine, mb, q), kBlockC, i, line);
                    from_float(line, out + q * kPanel, part.columns_in(q));
                }
            }
        }
    }

    // C = v A.
    void add_low_rank(const Thread& mine, const Part& part) const {
        for (int64_t r0 = 0; r0 < p.r; r0 += depth) {
            const int64_t steps = lesser(depth, p.r - r0);
            const T* const a = static_cast<const T*>(p.lora_a) + r0 * w.k + part.k0;
            for (int64_t q = 0; q < part.panels(); ++q) {
                E::pack_b_columns(a + q * kPanel, w.k, steps, part.columns_in(q), mine.panel);
                for (int64_t mb = 0; mb < part.m_blocks; ++mb) {
                    panel_product(E::a_at(v_packed + mb * kEdge * r_pad, r0), mine.panel, steps, rows_in(mb, part.rows),
                                  part.c_at(mine, mb, q), r0 > 0);
                }
            }
        }
    }

    // Dropout's mask on C.
    void apply_dropout(const Thread& mine, const Part& part) const {
        const uint32_t threshold = dropout_threshold(p.dropout);
        for (int64_t mb = 0; mb < part.m_blocks; ++mb) {
            for (int64_t q = 0; q < part.panels(); ++q) {
                for (int i = 0; i < rows_in(mb, part.rows); ++i) {
                    float line[kPanel];
                    E::unpack_row(part.c_at(mine, mb, q), kBlockC, i, line);
                    const int64_t first = (part.m0 + mb * kEdge + i) * w.k + part.k0 + q * kPanel;
                    masked_copy(line, first, part.columns_in(q), p.seed, threshold, line);
                    E::pack_row(line, part.c_at(mine, mb, q), kBlockC, i);
                }
            }
        }
    }

    // C += dy W, or C = dy W when there is no low-rank term.
    void add_weight(const Thread& mine, const T* dy, const Part& part) const {
        const int64_t row_blocks = w.k / kBlock, part_blocks = (part.count + kBlock - 1) / kBlock;
        for (int64_t n = 0; n < w.n; n += depth) {
            const int64_t steps = lesser(depth, w.n - n);
            bool special = false;
            if (w.k % kBlock == 0) {
                for (int64_t i = 0; i < steps; ++i) {
                    decode_absmax(w, (n + i) * row_blocks + part.k0 / kBlock, part_blocks,
                                  mine.absmax + i * part_blocks);
                }
                special = E::special(mine.absmax, steps * part_blocks);
            }
            for (int64_t mb = 0; piecewise && mb < part.m_blocks; ++mb) {
                E::pack_a_rows(dy + mb * kEdge * w.n + n, w.n, rows_in(mb, part.rows), steps,
                               mine.piece + mb * kEdge * depth, false);
            }
            for (int64_t q = 0; q < part.panels(); ++q) {
                E::decode_b(w, mine.absmax + q * kPanel / kBlock, part_blocks, n, steps, part.k0 + q * kPanel,
                            part.columns_in(q), special, mine.panel);
                for (int64_t mb = 0; mb < part.m_blocks; ++mb) {
                    if (E::kPrefetchLeft && !piecewise) prefetch_block(dy_at(mb + 1, n, part.m_blocks));
                    panel_product(piecewise ? mine.piece + mb * kEdge * depth : dy_at(mb, n, part.m_blocks), mine.panel,
                                  steps, rows_in(mb, part.rows), part.c_at(mine, mb, q), n > 0 || p.r > 0);
                }
            }
        }
    }

    // Packs the transpose of left [rows, r]. All threads share the work.
    void pack_left(const T* left, int64_t rows) const {
#pragma omp for collapse(2) schedule(static)
        for (int64_t rb = 0; rb < (p.r + kEdge - 1) / kEdge; ++rb) {
            for (int64_t m = 0; m < rows; m += depth) {
                E::pack_a_columns(left + m * p.r + rb * kEdge, p.r, rows_in(rb, p.r), lesser(depth, rows - m),
                                  const_cast<Elem*>(E::a_at(left_packed + rb * kEdge * m_pad, m)));
            }
        }
    }

    // left^T right over the superblock, for 128 columns of right from `column`. left is packed already; right [m, ld]
    // starts at row 0. mask: apply dropout to right. emit(line, i, count) receives row i.
    template <class Emit>
    void adapter_gradient(const Thread& mine, const T* right, int64_t ld, int64_t column, int64_t m0, int64_t rows,
                          bool mask, const Emit& emit) const {
        const int used = static_cast<int>(lesser(kPanel, ld - column));
        const uint32_t threshold = dropout_threshold(p.dropout);
        for (int64_t r0 = 0; r0 < p.r; r0 += kRanks) {
            const int64_t ranks = lesser(kRanks, p.r - r0);
            for (int64_t m = 0; m < rows; m += depth) {
                const int64_t steps = lesser(depth, rows - m);
                const T* source = right + (m0 + m) * ld + column;
                int64_t source_ld = ld;
                if (mask) {
                    for (int64_t i = 0; i < steps; ++i) {
                        const int64_t first = (m0 + m + i) * ld + column;
                        masked_copy(right + first, first, used, p.seed, threshold, mine.line + i * kPanel);
                    }
                    source = mine.line;
                    source_ld = kPanel;
                }
                E::pack_b_columns(source, source_ld, steps, used, mine.panel);
                for (int64_t rb = 0; rb < (ranks + kEdge - 1) / kEdge; ++rb) {
                    panel_product(E::a_at(left_packed + (r0 + rb * kEdge) * m_pad, m), mine.panel, steps,
                                  rows_in(rb, ranks), mine.c + rb * kPanelBlocks * kBlockC, m > 0);
                }
            }
            for (int64_t i = 0; i < ranks; ++i) {
                float line[kPanel];
                E::unpack_row(mine.c + i / kEdge * kPanelBlocks * kBlockC, kBlockC, static_cast<int>(i % kEdge), line);
                emit(line, r0 + i, used);
            }
        }
    }

    static constexpr int64_t depth = E::kDepthBackward;
    // Ranks of da or db at a time: 512 KB of C.
    static constexpr int64_t kRanks = 1024;
    const LinearBackwardParams& p;
    const WeightView& w;
    bool piecewise;
    int64_t n_pad, r_pad, rows_max, columns, r_round, m_pad;
    size_t shared_bytes = 0, thread_bytes = 0;
    Elem* dy_packed = nullptr;    // [n_pad / depth][m blocks][32][depth], unless piecewise
    Elem* v_packed = nullptr;     // [m blocks][32][r_pad]
    T* v = nullptr;               // [rows][r]
    Elem* left_packed = nullptr;  // [r blocks][32][m_pad], v or u transposed
};

}  // namespace qlk::cpu::QLK_ISA
