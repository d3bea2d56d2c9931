// Forward and backward of the layer on tensor cores (mma.sync), for 16-bit types and many rows of x.
//
// Formula:
//     forward    y = u B^T + x W^T + bias            columns: N   depth: K
//     backward   dx = mask(v A) + dy W               columns: K   depth: N
//
// Layout:
//     block    256 threads, kRows x kColumns outputs
//     warps    kWarpsDown x kWarpsAcross, once for each of kSlices slices of a step's depth
//     step     64 of depth and kColumns blocks of 64 weights: forward kColumns rows of W by 64 columns, backward 64
//              rows by kColumns columns, which ldmatrix transposes
//     thread   decodes a block of weights in every step, or with 128 columns half of one
//     stages   kStages steps of the left operand and of codes, copied by cp.async
//
// Shared memory: kStages * (kRows * 128 + kColumns * 32) + 2 * kColumns * 128 bytes: the stages, and two buffers of
//     decoded weights. 16-byte pieces are swizzled by row: neither ldmatrix nor any store has a bank conflict.
//
// Low rank: r more of depth, 64 at a time. Forward last, so that the kernel can start while u is still being computed;
//     backward first, so that dropout's mask lies on this part alone.
//
// Why: two slices, decoding between products and what comes after a step's barrier are explained in
//     docs/design/notes-cuda.md, "Tiles".
//
// Files: tiles_layout.cuh (arguments, shape), tiles_pipeline.cuh (main loop), tiles_finish.cuh (low rank, results).
#pragma once

#include "cuda/common/compiled.cuh"
#include "cuda/linear/mma/tiles_finish.cuh"

namespace qlk::cuda {

// One block's tile, or its part of one. Tiles with a block of their own come first, then the shared ones; the blocks of
// a shared tile follow each other. Tiles go down the rows first, so that those running together share weights in L2.
template <class Traits>
struct Place {
    bool alone;
    unsigned count, tile;  // blocks that share the tile; its number
    int split;             // this block among them
    int64_t first_row, first_column;

    template <class T>
    QLK_DEVICE static Place of(const GemmArguments<T>& a, unsigned block) {
        const unsigned down = static_cast<unsigned>((a.m + Traits::kRows - 1) / Traits::kRows);
        const unsigned whole = static_cast<unsigned>(a.splits.whole);
        const bool alone = block < whole;
        const unsigned count = alone ? 1 : static_cast<unsigned>(a.splits.count), shared_from = alone ? 0 : whole;
        const unsigned tile = shared_from + (block - shared_from) / count;
        return {alone,
                count,
                tile,
                static_cast<int>((block - shared_from) % count),
                static_cast<int64_t>(tile % down) * Traits::kRows,
                static_cast<int64_t>(tile / down) * Traits::kColumns};
    }
};

template <class T, class Traits>
QLK_DEVICE void gemm_tile(const GemmArguments<T>& a) {
    auto& shared = shared_memory<typename Traits::Shared>();
    const auto place = Place<Traits>::of(a, blockIdx.x);
    const int64_t depth = Traits::kBackward ? a.n : a.k;
    const int64_t steps = (depth + Traits::kDepth - 1) / Traits::kDepth;
    const int first_step = static_cast<int>(steps * place.split / place.count);
    Gemm<T, Traits> gemm{a,
                         shared.loop,
                         place.first_row,
                         place.first_column,
                         depth,
                         first_step,
                         static_cast<int>(steps * (place.split + 1) / place.count) - first_step,
                         a.weight.absmax ? 0.0f : load_global(a.weight.nested_offset),
                         static_cast<int>(threadIdx.x),
                         static_cast<int>(threadIdx.x % 32),
                         static_cast<int>(threadIdx.x / 32),
                         {}};
    gemm.run();
    // Computed again: the main loop has no registers for it.
    const auto [alone, count, tile, split, first_row, first_column] = Place<Traits>::of(a, opaque(blockIdx.x));
    gemm.first_row = first_row;
    gemm.first_column = first_column;
    gemm.finish();
    gemm.add_slices(shared.sums);
    // There is a barrier before the word is written, and another before the results are.
    using Sums = float[sizeof(gemm.sum) / sizeof(float) / Traits::kSlices];
    const unsigned first_part = (tile - a.splits.whole) * count;
    if (!alone && !add_parts_of<Traits::kThreads>(
                      a.splits, tile - a.splits.whole, split, static_cast<int>(count),
                      [&](int part) { return static_cast<int64_t>(first_part + part); },
                      reinterpret_cast<Sums&>(gemm.sum), reinterpret_cast<int*>(&shared))) {
        return;
    }
    gemm.store(shared.out);
}

// Grid: Plan::blocks() blocks. Dynamic shared memory: sizeof(Traits::Shared).
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) gemm_kernel(const __grid_constant__ GemmArguments<T> a) {
    if constexpr (kRuns<T, sizeof(typename Traits::Shared)>) {
        gemm_tile<T, Traits>(a);
    } else {
        trap();
    }
}

}  // namespace qlk::cuda
