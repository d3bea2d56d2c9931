// linear_forward for few rows of x, over a dot product: dot_bf16.h (up to 12 rows, 2 where there is AMX), dot_i16.h
// (16) or dot_f32.h (8).
//
// Formula: y = x W^T + u B^T + bias;  u = scaling * x A^T
//
// Layout: some rows of W walk K together, in parts for which all rows of x fit into the first-level cache. x is packed
//     in the order in which codes are looked up.
//
// Scratch: packed x and u, shared; block constants and a vector of sums for each row of W and x, for each thread.
//
// Why: every weight is used as soon as it is decoded, so the packed bytes of W are read once and nothing of W is
//     stored. docs/design/notes-cpu.md, "Few rows", has the figures.
#pragma once

#include <omp.h>
#include <unistd.h>

#include "cpu/linear/dot_f32.h"
#include "cpu/linear/dot_i16.h"
#if defined(__AVX512BF16__)
#include "cpu/linear/dot_bf16.h"
#endif
#include "cpu/pieces.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

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

// a . b over count elements.
template <class T>
QLK_INLINE float dense_dot(const T* a, const T* b, int64_t count) {
    constexpr int kRun = 64, kSums = kRun / kWidth < 4 ? kRun / kWidth : 4;
    Vec sum[kSums];
    for (int s = 0; s < kSums; ++s) sum[s] = vset(0.0f);
    for (int64_t i = 0; i < count; i += kRun) {
        float left[kRun], right[kRun];
        to_float(a + i, left, kRun);
        to_float(b + i, right, kRun);
        for (int v = 0; v < kRun / kWidth; ++v) {
            sum[v % kSums] = vfma(vload(left + v * kWidth), vload(right + v * kWidth), sum[v % kSums]);
        }
    }
    for (int s = 1; s < kSums; ++s) sum[0] = sum[0] + sum[s];
    return vsum(sum[0]);
}

#if defined(__AVX512BF16__)
template <>
QLK_INLINE float dense_dot(const bf16* a, const bf16* b, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 32) sum = dot_step(sum, load_words(a + i, 32), load_words(b + i, 32));
    return vsum(sum);
}
#endif

template <class Dot, int kM>
class FewRows {
    using T = typename Dot::T;
    using X = typename Dot::X;
    // Rows of W that walk K together: their sums stay in the first-level cache beside x.
    static constexpr int kTogether = kM * kWidth <= 128 ? 32 : 16;
    // Rows of W in a piece of work: their results fill whole cache lines of y.
    static constexpr int64_t kPiece = 32;

  public:
    explicit FewRows(const LinearForwardParams& params)
        : p(params), w(params.weight), rows(static_cast<int>(p.m)), row_blocks(w.k / kBlock) {
        r_pad = (p.r + kWidth - 1) / kWidth * kWidth;
        // Parts of about the same length, in whole units.
        constexpr int64_t kUnitBlocks = Dot::kUnit / kBlock;
        const int64_t units = (row_blocks + kUnitBlocks - 1) / kUnitBlocks;
        const int64_t fit = part_bytes() / (kM * Dot::kUnit * sizeof(X)), parts = (units + fit - 1) / fit;
        part_blocks = (units + parts - 1) / parts * kUnitBlocks;
        if (part_blocks > row_blocks) part_blocks = row_blocks;
    }

    // Returns false, without doing anything, if packed x is too large for scratch memory or has no form in X.
    bool run() {
        Carver shared(nullptr), each(nullptr);
        carve_shared(shared);
        carve_thread(each);
        const size_t bytes = shared.used() + p.threads * each.used();
        if (!scratch_suffices(bytes, p.threads)) return false;
        char* const base = scratch(bytes, p.threads);
        Carver area(base);
        carve_shared(area);
        if (!pack()) return false;
        std::memset(u_wide, 0, kM * r_pad * sizeof(float));
        Pieces ranks(p.r, p.threads), pieces((p.end() - p.n_begin + kPiece - 1) / kPiece, p.threads);
#pragma omp parallel num_threads(p.threads)
        {
            const int thread = omp_get_thread_num();
            Carver own(base + shared.used() + thread * each.used());
            const Thread mine = carve_thread(own);
            if (p.r > 0) {
                for (int64_t i; (i = ranks.take(thread)) >= 0;) low_rank(i);
#pragma omp barrier
            }
            for (int64_t i; (i = pieces.take(thread)) >= 0;) {
                const int64_t begin = p.n_begin + i * kPiece;
                const int64_t end = begin + kPiece < p.end() ? begin + kPiece : p.end();
                for (int64_t n = begin; n < end; n += kTogether) {
                    together(mine, n, static_cast<int>(end - n < kTogether ? end - n : kTogether));
                }
            }
        }
        return true;
    }

  private:
    struct Thread {
        float* absmax;  // [part_blocks + 1]
        float* sums;    // [kTogether][kM][kWidth]
        float* b;       // [r_pad], a row of lora_B
    };

    void carve_shared(Carver& area) {
        const int64_t units = (w.k + Dot::kUnit - 1) / Dot::kUnit;
        x_packed = area.take<X>(units * Dot::kUnit * kM);
        x_scale = area.take<float>(units * kM);
        u_wide = area.take<float>(kM * r_pad);
    }

    bool pack() {
        for (int m = 0; m < kM; ++m) {
            typename Dot::Loss loss;
            for (int64_t k = 0; k < w.k; k += Dot::kUnit) {
                const int64_t count = m < rows ? w.k - k : 0;
                if (!Dot::pack(static_cast<const T*>(p.x) + (m < rows ? m : 0) * w.k + k, count,
                               x_packed + k * kM + m * Dot::kStep, kM * Dot::kStep, x_scale + k / Dot::kUnit * kM + m,
                               w.levels.word_scale, loss))
                    return false;
            }
            if (!Dot::acceptable(loss)) return false;
        }
        return true;
    }

    Thread carve_thread(Carver& area) const {
        Thread mine;
        mine.absmax = area.take<float>(part_blocks + 1);
        mine.sums = area.take<float>(kTogether * kM * kWidth);
        mine.b = area.take<float>(r_pad);
        return mine;
    }

    // u[., i] = scaling * x A[i]^T, rounded to T
    void low_rank(int64_t i) const {
        const T* const a = static_cast<const T*>(p.lora_a) + i * w.k;
        for (int m = 0; m < rows; ++m) {
            const float sum = p.scaling * dense_dot(static_cast<const T*>(p.x) + m * w.k, a, w.k);
            T* const u = static_cast<T*>(p.u) + m * p.r + i;
            from_float(&sum, u, 1);
            to_float(u, u_wide + m * r_pad + i, 1);
        }
    }

    // sums[i][m] += B[n + i] * u[m], in parts that vsum will add up.
    void add_low_rank(const Thread& mine, int64_t n, int count) const {
        std::memset(mine.b, 0, r_pad * sizeof(float));
        for (int i = 0; i < count; ++i) {
            to_float(static_cast<const T*>(p.lora_b) + (n + i) * p.r, mine.b, p.r);
            for (int m = 0; m < rows; ++m) {
                float* const at = mine.sums + (i * kM + m) * kWidth;
                Vec sum = vload(at);
                for (int64_t r = 0; r < r_pad; r += kWidth) {
                    sum = vfma(vload(mine.b + r), vload(u_wide + m * r_pad + r), sum);
                }
                vstore(at, sum);
            }
        }
    }

    // Columns [n, n + count) of y: as many rows of W.
    void together(const Thread& mine, int64_t n, int count) const {
        for (int64_t first = 0; first < row_blocks; first += part_blocks) {
            const int64_t blocks = row_blocks - first < part_blocks ? row_blocks - first : part_blocks;
            for (int i = 0; i < count; ++i) {
                const int64_t row = n + i;
                decode_absmax(w, row * row_blocks + first, blocks, mine.absmax);
                mine.absmax[blocks] = kNoBlock;
                float* const sums = mine.sums + i * kM * kWidth;
                Vec acc[kM];
                for (int m = 0; m < kM; ++m) acc[m] = first > 0 ? vload(sums + m * kWidth) : vset(0.0f);
                Dot::template products<kM>(w.levels, w.packed + (row * w.k + first * kBlock) / 2, mine.absmax, blocks,
                                           x_packed + first * kBlock * kM, x_scale + first * kBlock / Dot::kUnit * kM,
                                           acc);
                for (int m = 0; m < kM; ++m) vstore(sums + m * kWidth, acc[m]);
            }
        }
        if (p.r > 0) add_low_rank(mine, n, count);
        for (int m = 0; m < rows; ++m) {
            float line[kTogether];
            for (int i = 0; i < count; ++i) line[i] = vsum(vload(mine.sums + (i * kM + m) * kWidth));
            for (int i = 0; i < count && p.bias; ++i) line[i] += p.bias[n + i];
            from_float(line, static_cast<T*>(p.y) + m * w.n + n, count);
        }
    }

    const LinearForwardParams& p;
    const WeightView& w;
    const int rows;  // kM, or one fewer
    const int64_t row_blocks;
    int64_t part_blocks, r_pad;
    X* x_packed = nullptr;     // [unit][vector][kM][kStep]
    float* x_scale = nullptr;  // [unit][kM]
    float* u_wide = nullptr;   // [kM][r_pad]
};

// Returns false, without doing anything, if this path doesn't take the case. Beyond eight rows they go in pairs.
template <class Dot>
inline bool few_rows_forward(const LinearForwardParams& p) {
    if (p.m > Dot::kMostRows || p.weight.k % kBlock != 0 || (p.r > 0 && p.dropout > 0)) return false;
    switch (p.m) {
        case 1: return FewRows<Dot, 1>(p).run();
        case 2: return FewRows<Dot, 2>(p).run();
        default: break;
    }
    if constexpr (Dot::kMostRows > 2) {
        switch (p.m) {
            case 3: return FewRows<Dot, 3>(p).run();
            case 4: return FewRows<Dot, 4>(p).run();
            case 5: return FewRows<Dot, 5>(p).run();
            case 6: return FewRows<Dot, 6>(p).run();
            case 7: return FewRows<Dot, 7>(p).run();
            case 8: return FewRows<Dot, 8>(p).run();
            default: break;
        }
    }
    if constexpr (Dot::kMostRows >= 12) {
        switch ((p.m + 1) / 2) {
            case 5: return FewRows<Dot, 10>(p).run();
            case 6: return FewRows<Dot, 12>(p).run();
            default: break;
        }
    }
    if constexpr (Dot::kMostRows >= 16) {
        switch ((p.m + 1) / 2) {
            case 7: return FewRows<Dot, 14>(p).run();
            case 8: return FewRows<Dot, 16>(p).run();
            default: break;
        }
    }
    return false;
}

}  // namespace qlk::cpu::QLK_ISA
