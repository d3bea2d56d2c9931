// The layer's low-rank products on tensor cores, for 16-bit types.
//
// Formula:
//     down        u = scale * mask(x) A^T     v = scale * dy B       [m, r]
//     gradients   dA = v^T mask(x)            dB = dy^T u            [r, k] and [n, r]
//     x and dy are `big` here, [m, c]
//
// Layout:
//     tile      128 rows x 64 columns of big, kStages of them under way by cp.async
//     ranks     kRank a block; further ranks go to neighbouring blocks, which find big in L2
//     down      a warp makes 16 rows of u or v
//     gradient  a warp makes 16 columns, by half of the ranks
//
// Kernels:
//     adapter_down_kernel       u or v alone. A block takes 128 rows and a part of the columns; the last block to
//                               finish some rows adds up their parts
//     adapter_gradient_kernel   a gradient, and v with it when big is dy. A block takes a part of the rows and up to
//                               512 columns. Its part of the gradient stays in registers; its part of v goes to scratch
//                               after each tile of rows
//     adapter_sum_kernel        (parts.cuh) adds these parts, in their order
//
// Shared memory: kStages * (16384 + 128 * kRank) + 512 * kRank bytes; less without a down product or a gradient.
//     16-byte pieces are swizzled by row: neither ldmatrix nor any store has a bank conflict.
//
// Why: reading big is what costs, so a tile serves both products; the adapters come from L2. For dropout each thread
//     clears what it copied itself, before the barrier that shows it to the others: random numbers are computed once
//     for each element, whatever the fragments look like.
#pragma once

#include "cuda/common/compiled.cuh"
#include "cuda/common/parts.cuh"
#include "cuda/common/splits.cuh"
#include "cuda/linear/adapters_tile.cuh"

namespace qlk::cuda {

// Computes u or v. Grid: tiles of rows, splits of the columns, slices of ranks, the last the fastest.
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    adapter_down_kernel(const __grid_constant__ AdapterArguments<T> a) {
    if constexpr (!kRuns<T, sizeof(typename Traits::Shared)>) return trap();
    griddep_launch();
    constexpr int kRank = Traits::kRank, kColumns = Traits::kColumns, kStages = Traits::kStages;
    auto& shared = shared_memory<typename Traits::Shared>();
    const int rank_tile = static_cast<int>(blockIdx.x % a.rank_tiles);
    const int split = static_cast<int>(blockIdx.x / a.rank_tiles % a.splits.count);
    const int64_t row_tile = blockIdx.x / a.rank_tiles / a.splits.count, first_row = row_tile * Traits::kRows;
    auto adapter = adapter_of<T, Traits>(a, shared.loop, rank_tile);
    const int self = adapter.self, lane = adapter.lane;

    const int64_t steps = (a.c + kColumns - 1) / kColumns;
    const int64_t begin = steps * split / a.splits.count, end = steps * (split + 1) / a.splits.count;
    const auto copy = [&](int64_t step, int stage) {
        if (step < end) {
            adapter.copy_big(stage, first_row, step * kColumns);
            adapter.copy_adapter(stage, step * kColumns);
        }
        cp_async_commit();
    };
    typename Adapter<T, Traits>::Down sum;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) adapter.clear(sum[j]);
    for (int i = 0; i < kStages - 1; ++i) copy(begin + i, i);
    int stage = 0;
    for (int64_t step = begin; step < end; ++step) {
        cp_async_wait<kStages - 2>();
        adapter.mask(stage, first_row, step * kColumns);
        __syncthreads();
        copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
        adapter.multiply_down(stage, sum);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // From fragments to rows, four neighbours a thread.
    __syncthreads();  // all reads of the operands are done; the sums take their place
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
        const int quad = j * 2 + lane % 4 / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = adapter.warp * 16 + half * 8 + lane / 4;
            store_shared(reinterpret_cast<float2*>(&shared.sums[sums_at<kRank>(row, quad) + lane % 2 * 2]),
                         make_float2(sum[j][half * 2], sum[j][half * 2 + 1]));
        }
    }
    __syncthreads();
    constexpr int kQuads = Traits::kRows * kRank / 4;
    const auto each_quad = [&](auto f) {
#pragma unroll
        for (int i = 0; i < kQuads / Traits::kThreads; ++i) {
            const int at = self + i * Traits::kThreads, row = at / (kRank / 4), quad = at % (kRank / 4);
            if (first_row + row < a.m) f(at, first_row + row, quad, &shared.sums[sums_at<kRank>(row, quad)]);
        }
    };
    if (a.splits.count > 1) {
        const int64_t tile = row_tile * a.rank_tiles + rank_tile;
        float4* const parts = a.splits.partial + tile * a.splits.count * kQuads;
        each_quad([&](int at, int64_t, int, const float* mine) {
            store_exchanged(parts + split * kQuads + at, load_shared(reinterpret_cast<const float4*>(mine)));
        });
        if (!comes_last(a.splits, tile, a.splits.count, &shared.word)) return;
        each_quad([&](int at, int64_t, int, float* mine) {
            float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            add_parts(all, parts + at, a.splits.count, kQuads);
            store_shared(reinterpret_cast<float4*>(mine), all);
        });
    }
    each_quad([&](int, int64_t row, int quad, const float* mine) {
        const float4 all = load_shared(reinterpret_cast<const float4*>(mine));
        const int64_t rank = adapter.first_rank + quad * 4;
        store_four(a.down + row * a.r + rank, all, a.scale, a.r - rank, a.down_aligned);
    });
}

// Computes dA or dB, and v too with kDown. Grid: splits of the columns, splits of the rows, slices of ranks, the last
// the fastest.
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    adapter_gradient_kernel(const __grid_constant__ AdapterArguments<T> a) {
    if constexpr (!kRuns<T, sizeof(typename Traits::Shared)>) return trap();
    constexpr int kRank = Traits::kRank, kRows = Traits::kRows, kColumns = Traits::kColumns;
    constexpr int kStages = Traits::kStages;
    auto& shared = shared_memory<typename Traits::Shared>();
    const int rank_tile = static_cast<int>(blockIdx.x % a.rank_tiles);
    const int row_split = static_cast<int>(blockIdx.x / a.rank_tiles % a.row_splits);
    const int64_t column_split = blockIdx.x / a.rank_tiles / a.row_splits;
    const int64_t first_column = column_split * a.across * kColumns;
    auto adapter = adapter_of<T, Traits>(a, shared.loop, rank_tile);
    const int lane = adapter.lane, warp = adapter.warp;

    const int64_t tiles = (a.m + kRows - 1) / kRows;
    const int begin = static_cast<int>(tiles * row_split / a.row_splits);
    const int end = static_cast<int>(tiles * (row_split + 1) / a.row_splits);
    const auto row_of = [](int tile) { return static_cast<int64_t>(tile) * kRows; };
    // The tile that is copied next. u or v comes with the first tile of its rows. It takes the place of the tile of
    // rows before the last, which has been read if a block has at least kStages - 1 tiles across.
    int copied_tile = begin, copied_across = 0;
    const auto copy = [&](int stage) {
        if (copied_tile < end) {
            adapter.copy_big(stage, row_of(copied_tile), first_column + copied_across * kColumns);
            if constexpr (Traits::kDown) adapter.copy_adapter(stage, first_column + copied_across * kColumns);
            if (copied_across == 0) adapter.copy_low(copied_tile % 2, row_of(copied_tile));
            if (++copied_across == a.across) copied_across = 0, ++copied_tile;
        }
        cp_async_commit();
    };
    typename Adapter<T, Traits>::Gradient gradient[Traits::kAcross];
#pragma unroll
    for (int column_tile = 0; column_tile < Traits::kAcross; ++column_tile) {
#pragma unroll
        for (int j = 0; j < kRank / 16; ++j) adapter.clear(gradient[column_tile][j]);
    }
    typename Adapter<T, Traits>::Down down;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) adapter.clear(down[j]);
    for (int i = 0; i < kStages - 1; ++i) copy(i);
    int stage = 0, tile = begin, across = 0;
#pragma unroll 1
    while (tile < end) {
        cp_async_wait<kStages - 2>();
        adapter.mask(stage, row_of(tile), first_column + across * kColumns);
        __syncthreads();
        copy(stage == 0 ? kStages - 1 : stage - 1);
        if constexpr (Traits::kDown) adapter.multiply_down(stage, down);
        // Each tile across has its own registers and so its own code. The rest of the loop exists once.
#pragma unroll
        for (int column_tile = 0; column_tile < Traits::kAcross; ++column_tile) {
            if (column_tile == across) adapter.multiply_gradient(stage, tile % 2, gradient[column_tile]);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (++across < a.across) continue;
        if constexpr (Traits::kDown) {
            float* const parts = a.down_parts + column_split * a.down_stride;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t row = row_of(tile) + warp * 16 + half * 8 + lane / 4;
#pragma unroll
                for (int j = 0; j < kRank / 8; ++j) {
                    const int64_t rank = adapter.first_rank + j * 8 + lane % 4 * 2;
                    store_two(parts + row * a.r + rank, down[j][half * 2], down[j][half * 2 + 1],
                              row < a.m ? a.r - rank : 0, a.r % 2 == 0);
                }
            }
#pragma unroll
            for (int j = 0; j < kRank / 8; ++j) adapter.clear(down[j]);
        }
        across = 0, ++tile;
    }

    float* const parts = a.gradient + row_split * a.gradient_stride;
#pragma unroll
    for (int column_tile = 0; column_tile < Traits::kAcross; ++column_tile) {
        if (column_tile >= a.across) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t column = first_column + column_tile * kColumns + warp % 4 * 16 + half * 8 + lane / 4;
            if (column >= a.c) continue;
#pragma unroll
            for (int j = 0; j < kRank / 16; ++j) {
                const int64_t rank = adapter.first_rank + warp / 4 * (kRank / 2) + j * 8 + lane % 4 * 2;
                float first = gradient[column_tile][j][half * 2], second = gradient[column_tile][j][half * 2 + 1];
                if (a.gradient_by_rank) {
                    float* const to = parts + rank * a.c + column;
                    if (rank < a.r) store_global(to, a.add ? load_exchanged(to) + first : first);
                    if (rank + 1 < a.r) store_global(to + a.c, a.add ? load_exchanged(to + a.c) + second : second);
                } else {
                    float* const to = parts + column * a.r + rank;
                    if (a.add && rank < a.r) first += load_exchanged(to);
                    if (a.add && rank + 1 < a.r) second += load_exchanged(to + 1);
                    store_two(to, first, second, a.r - rank, a.gradient_paired);
                }
            }
        }
    }
}

}  // namespace qlk::cuda
