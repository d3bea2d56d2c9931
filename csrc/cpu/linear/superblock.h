// What forward.h and backward.h share: how many rows go together, and dropout's mask on a run of elements.
#pragma once

#include "cpu/linear/engine_f32.h"
#include "cpu/simd.h"
#include "philox.h"

namespace qlk::cpu::QLK_ISA {

QLK_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
QLK_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
QLK_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
QLK_INLINE int tiles_of(int64_t rows) { return rows > 16 ? 2 : 1; }

// Rows of a superblock at most. More rows serve a decoded panel longer, but their blocks of C and packed x leave the
// second-level cache: at 2048 rows, 1024 were 10% slower than 512 (AMX, two cores, 2 MiB each).
constexpr int64_t kMaxSuperblock = 512;
// Bytes that a thread may spend on packed activations; the rest of kScratchPerThread is for blocks of C and panels.
constexpr int64_t kPackedBytesPerThread = 4 << 20;

// If fewer rows than this fit (and there are more), a decoded panel doesn't pay: pack piecewise instead.
constexpr int64_t kMinSuperblock = 64;

// How many rows fit, in whole blocks, when each takes `bytes_per_row` of packed scratch.
QLK_INLINE int64_t rows_that_fit(int64_t bytes_per_row, int threads) {
    return kPackedBytesPerThread * threads / greater(bytes_per_row, 1) / kEdge * kEdge;
}

// Rows in a superblock when `fit` rows fit.
QLK_INLINE int64_t superblock_rows(int64_t m, int64_t fit) {
    return lesser(round_up(greater(m, 1), kEdge), greater(kEdge, lesser(fit, kMaxSuperblock)));
}

// Columns of y in a task, in whole panels and at most `most` of `count`, so that the thread with the most tasks ends
// soonest. Reading x again costs a task as much as `cost` columns.
QLK_INLINE int64_t block_of_columns(int64_t count, int64_t most, int64_t cost, int threads) {
    int64_t best = most, least = INT64_MAX;
    for (int64_t block = most; block >= kEdge; block -= kEdge) {
        const int64_t tasks = (count + block - 1) / block, rounds = (tasks + threads - 1) / threads;
        if (rounds * (block + cost) < least) least = rounds * (block + cost), best = block;
    }
    return best;
}

// dst[i] = src[i] where dropout keeps element first + i of the tensor, else 0.
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

}  // namespace qlk::cpu::QLK_ISA
