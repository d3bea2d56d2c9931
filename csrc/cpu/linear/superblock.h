// linear_forward and linear_backward over an engine (engine_f32.h, engine_bf16.h), for one instruction set.
//
// Forward:  y^T block [32 n][32 m] = sum over k of W[n][k] x[m][k], and then over r of B[n][r] u[m][r].
// Backward: dx block [32 m][32 k] = sum over n of dy[m][n] W[n][k], and over r of v[m][r] A[r][k].
//
// W is decoded panel by panel into a few tens of KB that stay in the core's cache, and each panel serves all rows of
// a superblock of x (up to 512 rows). The low-rank term is r more steps of the same sum. Work is cut into tasks whose
// results don't depend on which thread runs them, so that the same inputs give the same bits.
//
// Activations are packed once for all tasks. Where the sum is so long that few of their rows would fit in scratch
// memory, each task packs them for itself instead, as many steps at a time as one panel of W has ("piecewise"). The
// steps and their order are the same either way.
#pragma once

#include <omp.h>

#include "cpu/linear/store.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "philox.h"

namespace qlk::cpu::QLK_ISA {

QLK_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
QLK_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
QLK_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
QLK_INLINE int tiles_of(int64_t rows) { return rows > 16 ? 2 : 1; }

// More rows serve a decoded panel longer, but their blocks of C and packed x leave the second level of cache: at 2048
// rows, 1024 were 10% slower than 512 (AMX, two cores, 2 MiB each).
constexpr int64_t kMaxSuperblock = 512;
// Bytes a thread may spend on packed activations; the rest of kScratchPerThread is for blocks of C and panels.
constexpr int64_t kPackedBytesPerThread = 4 << 20;

// Fewer rows than this (of more) are not worth a decoded panel: they are packed piecewise instead.
constexpr int64_t kMinSuperblock = 64;

// Whole blocks of rows that fit when each row takes `bytes_per_row` of packed scratch.
QLK_INLINE int64_t rows_that_fit(int64_t bytes_per_row, int threads) {
    return kPackedBytesPerThread * threads / greater(bytes_per_row, 1) / kEdge * kEdge;
}

// Rows of x in a superblock when `fit` do.
QLK_INLINE int64_t superblock_rows(int64_t m, int64_t fit) {
    return lesser(round_up(greater(m, 1), kEdge), greater(kEdge, lesser(fit, kMaxSuperblock)));
}

// How many of `count` columns of y a task has, whole panels and no more than `most`: so many that the thread with the
// most tasks ends soonest. To read x again costs a task as much as `cost` columns.
QLK_INLINE int64_t block_of_columns(int64_t count, int64_t most, int64_t cost, int threads) {
    int64_t best = most, least = INT64_MAX;
    for (int64_t block = most; block >= kEdge; block -= kEdge) {
        const int64_t tasks = (count + block - 1) / block, rounds = (tasks + threads - 1) / threads;
        if (rounds * (block + cost) < least) least = rounds * (block + cost), best = block;
    }
    return best;
}

// dst[i] = src[i] where the mask keeps element first + i of x, else 0.
template <class T>
inline void masked_copy(const T* src, int64_t first, int64_t count, uint64_t seed, uint32_t threshold, T* dst) {
    constexpr int kBlocks = 16;
    uint32_t words[4 * kBlocks];
    int64_t i = 0;
    while (i < count) {
        const int64_t block = (first + i) / 4;
        philox_blocks(seed, static_cast<uint64_t>(block), kBlocks, words);
        const int64_t skip = first + i - 4 * block;
        const int64_t n = lesser(4 * kBlocks - skip, count - i);
        for (int64_t j = 0; j < n; ++j) dst[i + j] = words[skip + j] >= threshold ? src[i + j] : T{};
        i += n;
    }
}

// ---------------------------------------------------------------------------------------------------- forward

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
        n_block = block_of_columns(w.n, lesser(piecewise ? 512 : 256, (1 << 18) / rows_max / kEdge * kEdge),
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
        Elem* piece;    // [m blocks][depth][32], piecewise packed x; of one block of rows, x with its mask
        T* line;        // [32][depth], x with its mask
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
                               x_packed + (mb * k_pad + k) * kEdge, true);
            }
            if (p.r > 0) low_rank(mine, m0, rows, m_blocks);
#pragma omp for schedule(dynamic)
            for (int64_t n0 = 0; n0 < w.n; n0 += n_block)
                products(mine, n0, lesser(n_block, w.n - n0), m0, rows, m_blocks);
            E::end_thread();
        }
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
                E::pack_a_rows(a + k, w.k, ranks, steps, mine.panel, steps, true);
                const Elem* right = piecewise ? mine.piece : x_packed + (mb * k_pad + k) * kEdge;
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
                E::multiply(mine.panel, steps, right, kEdge, E::pad_weight(steps), mine.c, tiles_of(ranks),
                            tiles_of(m_rows), k > 0);
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

    // The constants of kSpan columns of rows [n0, n0 + count) of W, from column block `first` on; whether they are
    // special.
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

    // Rows [n0, n0 + count) of W against the whole superblock.
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
            const Elem* const x = piecewise ? mine.piece : x_packed + k * kEdge;
            const int64_t x_ld = (piecewise ? depth : k_pad) * kEdge;
            for (int64_t q = 0; q < panels; ++q) {
                const int n_rows = rows_in(q, count);
                E::decode_a(w, mine.absmax + q * kEdge * span_blocks + k % kSpan / kBlock, span_blocks, n0 + q * kEdge,
                            n_rows, k, steps, special, mine.panel, steps);
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    E::multiply(mine.panel, steps, x + mb * x_ld, kEdge, E::pad_weight(steps),
                                mine.c + (q * m_blocks + mb) * kBlockC, tiles_of(n_rows), tiles_of(rows_in(mb, rows)),
                                k > 0);
                }
            }
        }
        const T* const b = static_cast<const T*>(p.lora_b);
        for (int64_t r0 = 0; r0 < p.r; r0 += depth) {
            const int64_t steps = lesser(depth, p.r - r0);
            for (int64_t q = 0; q < panels; ++q) {
                const int n_rows = rows_in(q, count);
                E::pack_a_rows(b + (n0 + q * kEdge) * p.r + r0, p.r, n_rows, steps, mine.panel, steps, false);
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    E::multiply(mine.panel, steps, u_packed + (mb * r_pad + r0) * kEdge, kEdge, E::pad_plain(steps),
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
    // Columns of W whose constants are decoded at a time.
    static constexpr int64_t kSpan = 4096;
    static_assert(kSpan % depth == 0, "a panel's constants are decoded together");
    bool piecewise;
    int64_t k_pad, r_pad, rows_max, n_block, row_blocks, span_blocks;
    size_t shared_bytes = 0, thread_bytes = 0;
    Elem* x_packed = nullptr;  // [m blocks][k_pad][32], unless piecewise
    Elem* u_packed = nullptr;  // [m blocks][r_pad][32]
};

// --------------------------------------------------------------------------------------------------- backward

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
        columns = lesser(round_up(w.k, kPanel), greater(kPanel, (1 << 18) / rows_max / kPanel * kPanel));
        while (columns > kPanel && w.k < 2 * p.threads * columns) columns -= kPanel;
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
        Elem* piece;    // [m blocks][32][depth], piecewise packed dy
        T* line;        // [depth][128], with its mask
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
            if (!piecewise && (p.dx || low_rank)) {
#pragma omp for schedule(static)
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    E::pack_a_rows(dy + mb * kEdge * w.n, w.n, rows_in(mb, rows), w.n, dy_packed + mb * kEdge * n_pad,
                                   n_pad, false);
                }
            }
            if (low_rank) {
#pragma omp for schedule(dynamic)
                for (int64_t mb = 0; mb < m_blocks; ++mb) through_b(mine, dy, mb, rows);
            }
            if (p.dx) {
#pragma omp for schedule(dynamic)
                for (int64_t k0 = 0; k0 < w.k; k0 += columns) {
                    input_gradient(mine, dy, k0, lesser(columns, w.k - k0), m0, rows, m_blocks);
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

    // Steps [n, n + steps) of dy, packed: block mb of its rows, and how far the rows in it lie from each other.
    struct Left {
        const Elem* data;
        int64_t ld;
    };
    Left dy_at(const Thread& mine, int64_t mb, int64_t n, int64_t piece_block) const {
        if (piecewise) return {mine.piece + piece_block * kEdge * depth, depth};
        return {E::a_at(dy_packed + mb * kEdge * n_pad, n), n_pad};
    }

    // v = scaling / (1 - p) * dy B for one block of rows, and packed for the last steps of dx. dy: of the superblock.
    void through_b(const Thread& mine, const T* dy, int64_t mb, int64_t rows) const {
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
                    E::pack_a_rows(dy + mb * kEdge * w.n + n, w.n, m_rows, steps, mine.piece, depth, false);
                }
                const Left left = dy_at(mine, mb, n, 0);
                panel_product(left.data, left.ld, mine.panel, steps, m_rows, mine.c, n > 0);
            }
            for (int i = 0; i < m_rows; ++i) {
                float line[kPanel];
                E::unpack_row(mine.c, kBlockC, i, line);
                for (int j = 0; j < ranks; ++j) line[j] *= scale;
                from_float(line, out + i * p.r + r0, ranks);
            }
        }
        E::pack_a_rows(out, p.r, m_rows, p.r, v_packed + mb * kEdge * r_pad, r_pad, false);
    }

    // The four blocks of C of a panel of 128 columns.
    static void panel_product(const Elem* a, int64_t lda, const Elem* panel, int64_t steps, int m_rows, float* c,
                              bool accumulate) {
        for (int jb = 0; jb < kPanelBlocks; ++jb) {
            E::multiply(a, lda, E::panel_block(panel, steps, jb), E::kPanelLd, E::pad_plain(steps), c + jb * kBlockC,
                        tiles_of(m_rows), 2, accumulate);
        }
    }

    // Columns [k0, k0 + count) of dx for the whole superblock.
    void input_gradient(const Thread& mine, const T* dy, int64_t k0, int64_t count, int64_t m0, int64_t rows,
                        int64_t m_blocks) const {
        const int64_t panels = (count + kPanel - 1) / kPanel;
        const auto c_at = [&](int64_t mb, int64_t q) { return mine.c + (mb * panels + q) * kPanelBlocks * kBlockC; };
        const uint32_t threshold = dropout_threshold(p.dropout);
        bool started = false;
        // The low-rank term comes first, so that its mask can be applied to C alone.
        for (int64_t r0 = 0; r0 < p.r; r0 += depth) {
            const int64_t steps = lesser(depth, p.r - r0);
            const T* const a = static_cast<const T*>(p.lora_a) + r0 * w.k + k0;
            for (int64_t q = 0; q < panels; ++q) {
                const int used = static_cast<int>(lesser(kPanel, count - q * kPanel));
                E::pack_b_columns(a + q * kPanel, w.k, steps, used, mine.panel);
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    panel_product(E::a_at(v_packed + mb * kEdge * r_pad, r0), r_pad, mine.panel, steps,
                                  rows_in(mb, rows), c_at(mb, q), started);
                }
            }
            started = true;
        }
        if (started && p.dropout > 0) {
            for (int64_t mb = 0; mb < m_blocks; ++mb) {
                for (int64_t q = 0; q < panels; ++q) {
                    const int used = static_cast<int>(lesser(kPanel, count - q * kPanel));
                    for (int i = 0; i < rows_in(mb, rows); ++i) {
                        float line[kPanel];
                        E::unpack_row(c_at(mb, q), kBlockC, i, line);
                        masked_copy(line, (m0 + mb * kEdge + i) * w.k + k0 + q * kPanel, used, p.seed, threshold, line);
                        E::pack_row(line, c_at(mb, q), kBlockC, i);
                    }
                }
            }
        }
        const int64_t row_blocks = w.k / kBlock, task_blocks = (count + kBlock - 1) / kBlock;
        for (int64_t n = 0; n < w.n; n += depth) {
            const int64_t steps = lesser(depth, w.n - n);
            bool special = false;
            if (w.k % kBlock == 0) {
                for (int64_t i = 0; i < steps; ++i) {
                    decode_absmax(w, (n + i) * row_blocks + k0 / kBlock, task_blocks, mine.absmax + i * task_blocks);
                }
                special = E::special(mine.absmax, steps * task_blocks);
            }
            for (int64_t mb = 0; piecewise && mb < m_blocks; ++mb) {
                E::pack_a_rows(dy + mb * kEdge * w.n + n, w.n, rows_in(mb, rows), steps,
                               mine.piece + mb * kEdge * depth, depth, false);
            }
            for (int64_t q = 0; q < panels; ++q) {
                const int used = static_cast<int>(lesser(kPanel, count - q * kPanel));
                E::decode_b(w, mine.absmax + q * kPanel / kBlock, task_blocks, n, steps, k0 + q * kPanel, used, special,
                            mine.panel);
                for (int64_t mb = 0; mb < m_blocks; ++mb) {
                    const Left left = dy_at(mine, mb, n, mb);
                    panel_product(left.data, left.ld, mine.panel, steps, rows_in(mb, rows), c_at(mb, q), started);
                }
            }
            started = true;
        }
        T* const dx = static_cast<T*>(p.dx);
        for (int64_t mb = 0; mb < m_blocks; ++mb) {
            for (int i = 0; i < rows_in(mb, rows); ++i) {
                T* const out = dx + (m0 + mb * kEdge + i) * w.k + k0;
                for (int64_t q = 0; q < panels; ++q) {
                    float line[kPanel];
                    E::unpack_row(c_at(mb, q), kBlockC, i, line);
                    from_float(line, out + q * kPanel, lesser(kPanel, count - q * kPanel));
                }
            }
        }
    }

    // The transpose of left [rows, r], packed; by all threads.
    void pack_left(const T* left, int64_t rows) const {
#pragma omp for collapse(2) schedule(static)
        for (int64_t rb = 0; rb < (p.r + kEdge - 1) / kEdge; ++rb) {
            for (int64_t m = 0; m < rows; m += depth) {
                E::pack_a_columns(left + m * p.r + rb * kEdge, p.r, rows_in(rb, p.r), lesser(depth, rows - m),
                                  const_cast<Elem*>(E::a_at(left_packed + rb * kEdge * m_pad, m)), m_pad);
            }
        }
    }

    // Rows of left^T right over the superblock, for 128 columns of right from `column` on; left has been packed, right
    // [m, ld] begins at row 0. emit(line, i, count) takes row i.
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
                    panel_product(E::a_at(left_packed + (r0 + rb * kEdge) * m_pad, m), m_pad, mine.panel, steps,
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
    Elem* dy_packed = nullptr;    // [m blocks][32][n_pad], unless piecewise
    Elem* v_packed = nullptr;     // [m blocks][32][r_pad]
    T* v = nullptr;               // [rows][r]
    Elem* left_packed = nullptr;  // [r blocks][32][m_pad], v or u transposed
};

}  // namespace qlk::cpu::QLK_ISA
