// linear_forward for 1 to 16 rows, for all three types: the kernels of `neon` and of `portable`.
//
// Formula: y = x W^T + u B^T + bias;  u = scaling * x A^T
//
// Layout:
//     x       [m][k] float32, in scratch unless it is float32 already
//     block   64 columns: a row's 16 vectors, decoded once for all rows of x
//     run     4 blocks, summed by themselves
//     part    some runs of K, for which all rows of x fit in the first-level cache
//     task    32 rows of W, or 4 of A
//
// Registers: a block of decoded weights in 16 of the 32, and four sums. A run's sums are in memory, one vector a row.
//
// Why: one source for both sets, so that sums have one order: a set brings only its Vec and its way to look
//     codes up, and the bits are the same on one machine. The order depends neither on the number of rows nor on that
//     of threads. docs/design/notes-cpu.md, "Few rows on ARM and in portable code".
#pragma once

#include <omp.h>

#include <type_traits>

#include "cpu/quantize/decode.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

constexpr int kMostFewRows = 16;
constexpr int kBlockVecs = kBlock / kWidth;
constexpr int64_t kRunBlocks = 4;
// x of a part takes at most 16 KB, or a run of it if that is more.
constexpr int64_t kPartFloats = 4096;
constexpr int64_t kPartBlocks = kPartFloats / kBlock;
static_assert(kPartFloats >= kMostFewRows * kRunBlocks * kBlock, "a run has to fit in a part");

// Rows of a quantized weight as blocks of vectors. T: what its values are rounded to.
template <class T>
class PackedRows {
  public:
    explicit PackedRows(const WeightView& weight) : w(weight) {}
    // Goes to blocks [first, first + count) of a row, at most kPartBlocks.
    QLK_INLINE void enter(int64_t row, int64_t first, int64_t count) {
        const int64_t block = row * (w.k / kBlock) + first;
        codes = w.packed + block * (kBlock / 2);
        decode_absmax(w, block, count, absmax);
    }
    QLK_INLINE void block(int64_t i, Vec (&values)[kBlockVecs]) const {
        alignas(16) float table[16];
        block_table<T>(w.levels, absmax[i], table);
#if defined(QLK_NEON)
        lookup_vectors<T>(codes + i * (kBlock / 2), table, values);
#else
        alignas(16) float line[kBlock];
        lookup_block(codes + i * (kBlock / 2), table, line);
        for (int v = 0; v < kBlockVecs; ++v) values[v] = vload(line + v * kWidth);
#endif
    }

  private:
    const WeightView& w;
    const uint8_t* codes = nullptr;
    float absmax[kPartBlocks];
};

// The same for rows of a dense matrix.
template <class T>
class DenseRows {
  public:
    DenseRows(const T* data, int64_t columns) : all(data), k(columns) {}
    QLK_INLINE void enter(int64_t row, int64_t first, int64_t) { here = all + row * k + first * kBlock; }
    QLK_INLINE void block(int64_t i, Vec (&values)[kBlockVecs]) const {
        alignas(16) float line[kBlock];
        to_float(here + i * kBlock, line, kBlock);
        for (int v = 0; v < kBlockVecs; ++v) values[v] = vload(line + v * kWidth);
    }

  private:
    const T* all;
    int64_t k;
    const T* here = nullptr;
};

// values . x over a block, by lanes.
QLK_INLINE Vec block_sum(const Vec (&values)[kBlockVecs], const float* x) {
    Vec sum[4];
    for (int v = 0; v < 4; ++v) sum[v] = values[v] * vload(x + v * kWidth);
    for (int v = 4; v < kBlockVecs; ++v) sum[v % 4] = vfma(values[v], vload(x + v * kWidth), sum[v % 4]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// What the functions below work on.
template <class T>
struct FewRows {
    const LinearForwardParams& p;
    const float* x;  // [m][k]
    float* u;        // [m][r], rounded to T
    int64_t m, k;

    // out[i][j] = row first + i times row j of x, for all m rows of x. out: [count][16].
    template <class Rows>
    void products(Rows rows, int64_t first, int64_t count, float* out) const {
        Vec total[kTaskRows][kMostFewRows];
        const int64_t blocks = k / kBlock, part = kPartBlocks / m / kRunBlocks * kRunBlocks;
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < m; ++j) total[i][j] = vset(0.0f);
        }
        for (int64_t b = 0; b < blocks; b += part) {
            const int64_t here = part < blocks - b ? part : blocks - b;
            for (int64_t i = 0; i < count; ++i) {
                rows.enter(first + i, b, here);
                for (int64_t run = 0; run < here; run += kRunBlocks) {
                    const int64_t end = run + kRunBlocks < here ? run + kRunBlocks : here;
                    add_run(rows, run, end, x + b * kBlock, total[i]);
                }
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < m; ++j) out[i * kMostFewRows + j] = vsum(total[i][j]);
        }
    }

    // total[j] += blocks [begin, end) times row j of x.
    template <class Rows>
    QLK_INLINE void add_run(const Rows& rows, int64_t begin, int64_t end, const float* from, Vec* total) const {
        Vec sum[kMostFewRows];
        for (int64_t i = begin; i < end; ++i) {
            Vec values[kBlockVecs];
            rows.block(i, values);
            for (int64_t j = 0; j < m; ++j) {
                const Vec more = block_sum(values, from + j * k + i * kBlock);
                sum[j] = i > begin ? sum[j] + more : more;
            }
        }
        for (int64_t j = 0; j < m; ++j) total[j] = total[j] + sum[j];
    }

    // Columns [first, first + count) of u, rounded to T, and back in float32.
    void low_rank(int64_t first, int64_t count) const {
        float sum[kTaskRows * kMostFewRows];
        products(DenseRows<T>(static_cast<const T*>(p.lora_a), k), first, count, sum);
        T* const to = static_cast<T*>(p.u);
        for (int64_t j = 0; j < m; ++j) {
            for (int64_t i = 0; i < count; ++i) {
                const float value = p.scaling * sum[i * kMostFewRows + j];
                from_float(&value, to + j * p.r + first + i, 1);
                to_float(to + j * p.r + first + i, u + j * p.r + first + i, 1);
            }
        }
    }

    // sum[i][j] += row first + i of B times row j of u.
    void add_low_rank(int64_t first, int64_t count, float* sum) const {
        for (int64_t i = 0; i < count; ++i) {
            const T* const b = static_cast<const T*>(p.lora_b) + (first + i) * p.r;
            for (int64_t r = 0; r < p.r; r += kBlock) {
                const int64_t ranks = kBlock < p.r - r ? kBlock : p.r - r;
                float line[kBlock];
                to_float(b + r, line, ranks);
                for (int64_t j = 0; j < m; ++j) {
                    float more = 0;
                    for (int64_t s = 0; s < ranks; ++s) more += u[j * p.r + r + s] * line[s];
                    sum[i * kMostFewRows + j] += more;
                }
            }
        }
    }

    // Columns [first, first + count) of y.
    void outputs(int64_t first, int64_t count) const {
        float sum[kTaskRows * kMostFewRows];
        products(PackedRows<T>(p.weight), first, count, sum);
        if (p.r > 0) add_low_rank(first, count, sum);
        for (int64_t j = 0; j < m; ++j) {
            float line[kTaskRows];
            for (int64_t i = 0; i < count; ++i) {
                line[i] = sum[i * kMostFewRows + j] + (p.bias ? p.bias[first + i] : 0.0f);
            }
            from_float(line, static_cast<T*>(p.y) + j * p.weight.n + first, count);
        }
    }

    static constexpr int64_t kTaskRows = 32;
    static constexpr int64_t kTaskRanks = 4;
};

// Returns false, without doing anything, if this path doesn't take the case.
template <class T>
inline bool few_rows_portable(const LinearForwardParams& p) {
    constexpr bool kConverts = !std::is_same_v<T, float>;
    const int64_t m = p.m, n = p.end(), k = p.weight.k;
    if (m > kMostFewRows || k % kBlock != 0 || (p.r > 0 && p.dropout > 0)) return false;
    Carver sizes(nullptr);
    sizes.take<float>(kConverts ? m * k : 0);
    sizes.take<float>(m * p.r);
    if (!scratch_suffices(sizes.used(), p.threads)) return false;
    Carver area(scratch(sizes.used(), p.threads));
    float* const converted = area.take<float>(kConverts ? m * k : 0);
    float* const u = area.take<float>(m * p.r);
    const T* const x = static_cast<const T*>(p.x);
    const FewRows<T> task{p, kConverts ? converted : static_cast<const float*>(p.x), u, m, k};

#pragma omp parallel num_threads(p.threads)
    {
        if constexpr (kConverts) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < m * k / kBlock; ++block) {
                to_float(x + block * kBlock, converted + block * kBlock, kBlock);
            }
        }
        constexpr int64_t kRanks = FewRows<T>::kTaskRanks, kRows = FewRows<T>::kTaskRows;
        if (p.r > 0) {
#pragma omp for schedule(dynamic)
            for (int64_t r = 0; r < p.r; r += kRanks) task.low_rank(r, kRanks < p.r - r ? kRanks : p.r - r);
        }
#pragma omp for schedule(dynamic)
        for (int64_t row = p.n_begin; row < n; row += kRows) task.outputs(row, kRows < n - row ? kRows : n - row);
    }
    return true;
}

}  // namespace qlk::cpu::QLK_ISA
