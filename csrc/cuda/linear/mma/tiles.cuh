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

// A block's part of a tile. Tiles with a block of their own come first, then the shared ones. Tiles go down the rows
// first, so that those running together share weights in L2.
template <class T, class Traits>
struct TilePart {
    int64_t first_row, first_column;
    int first_step, end;

    QLK_DEVICE static bool alone(const GemmArguments<T>& a) {
        return opaque(blockIdx.x) < static_cast<unsigned>(a.splits.whole);
    }
    QLK_DEVICE static Share share(const GemmArguments<T>& a) {
        const unsigned depth = opaque(static_cast<unsigned>(Traits::kBackward ? a.n : a.k));
        return {a.splits, (depth + Traits::kDepth - 1) / Traits::kDepth};
    }

    // tile: its number among those that the block shares.
    QLK_DEVICE static TilePart of(const GemmArguments<T>& a, unsigned tile) {
        const bool whole = alone(a);
        const unsigned number = whole ? blockIdx.x : static_cast<unsigned>(a.splits.whole) + share(a).number(tile);
        const unsigned down = (opaque(static_cast<unsigned>(a.m)) + Traits::kRows - 1) / Traits::kRows;
        return {static_cast<int64_t>(number % down) * Traits::kRows,
                static_cast<int64_t>(number / down) * Traits::kColumns,
                whole ? 0 : static_cast<int>(share(a).from(tile)),
                static_cast<int>(whole ? share(a).steps : share(a).to(tile))};
    }
};

// All tiles, or parts of tiles, of one block.
template <class T, class Traits>
QLK_DEVICE void gemm_tiles(const GemmArguments<T>& a) {
    using Part = TilePart<T, Traits>;
    auto& shared = shared_memory<typename Traits::Shared>();
    unsigned tile = Part::alone(a) || !Traits::kCuts ? 0 : Part::share(a).first_tile();
#pragma unroll 1
    do {
        const Part part = Part::of(a, tile);
        Gemm<T, Traits> gemm{a,
                             shared.loop,
                             part.first_row,
                             part.first_column,
                             Traits::kBackward ? a.n : a.k,
                             part.first_step,
                             part.end - part.first_step,
                             a.weight.absmax ? 0.0f : load_global(a.weight.nested_offset),
                             static_cast<int>(threadIdx.x),
                             static_cast<int>(threadIdx.x % 32),
                             static_cast<int>(threadIdx.x / 32),
                             {}};
        gemm.run();
        // Computed again: the main loop has no registers for it.
        const Part again = Part::of(a, tile);
        gemm.first_row = again.first_row;
        gemm.first_column = again.first_column;
        gemm.first_step = again.first_step;
        gemm.finish();
        gemm.add_slices(shared.sums);
        if constexpr (kClusters && Traits::kColumns == 128) {
            if (a.splits.cluster) return gemm.add_cluster_and_store(shared.whole);
        }
        // There is a barrier before the word is written, and another before the results are.
        using Sums = float[sizeof(gemm.sum) / sizeof(float) / Traits::kSlices];
        if (Part::alone(a) || Part::share(a).template add<Traits::kThreads>(tile, reinterpret_cast<Sums&>(gemm.sum),
                                                                            reinterpret_cast<int*>(&shared))) {
            gemm.store(shared.out);
        }
        if constexpr (!Traits::kCuts) return;
        __syncthreads();  // results and the word have been read; the next tile's operands take their place
    } while (Traits::kCuts && !Part::alone(a) && Part::share(a).reaches(++tile));
}

// Grid: Plan::blocks() blocks. Dynamic shared memory: sizeof(Traits::Shared).
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) gemm_kernel(const __grid_constant__ GemmArguments<T> a) {
    if constexpr (kRuns<T, sizeof(typename Traits::Shared)>) {
        gemm_tiles<T, Traits>(a);
    } else {
        trap();
    }
}

}  // namespace qlk::cuda
