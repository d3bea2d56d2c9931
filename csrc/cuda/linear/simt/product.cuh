// Products on the float32 units: for float32 tensors, and for whatever no tensor-core kernel takes.
//
// Formula: out[i, j] = sum over d of left[i, d] * right[d, j]; a product defines left and right element by element
//     (layer_products.cuh)
//
// Layout: a block makes 64 x 64 outputs, each thread 4 x 4, in panels of 32 of the depth.
//
// Shared memory: two panels of 32 x 64 float32, padded by 4 in each row: 17 KiB.
//
// Why three levels of sums, of 8 products, of 32 and of all: the rounding error grows with the square root of depth /
//     32, not of depth.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

struct ProductTraits {
    static constexpr int kThreads = 256;
    static constexpr int kTile = 64;          // outputs of a block, in both directions
    static constexpr int kDepth = 32;         // depth of a panel
    static constexpr int kRun = 8;            // products in the innermost sum
    static constexpr int kEach = 4;           // outputs of a thread, in both directions
    static constexpr int kPitch = kTile + 4;  // keeps rows 16-byte aligned, and their stores in different banks
    static_assert(kTile / kEach * (kTile / kEach) == kThreads);

    struct Shared {
        float left[kDepth][kPitch];
        float right[kDepth][kPitch];
    };
};

using Outputs = float[ProductTraits::kEach][ProductTraits::kEach];

QLK_DEVICE void add(Outputs& to, const Outputs& what) {
#pragma unroll
    for (int i = 0; i < ProductTraits::kEach; ++i) {
#pragma unroll
        for (int j = 0; j < ProductTraits::kEach; ++j) to[i][j] += what[i][j];
    }
}

// One tile of 64 x 64 outputs. Product says what is multiplied: rows and columns of the result; for each of two parts,
// the first optional, depth[part] and the elements left(part, i, d) and right(part, d, j, lane_level(lane)), the latter
// called by whole warps; between(i, j, sum), applied after the first part; store(i, j, sum). k<Left|Right>DepthFirst:
// the operand's neighbours in memory are neighbours along the depth. level: lane_level(lane).
template <class Product>
QLK_DEVICE void product_tile(const Product& p, float level, int64_t first_row, int64_t first_column) {
    using Traits = ProductTraits;
    constexpr int kEach = Traits::kEach, kTile = Traits::kTile, kDepth = Traits::kDepth;
    auto& shared = shared_memory<Traits::Shared>();
    const int self = static_cast<int>(threadIdx.x);
    const int my_row = self / (kTile / kEach) * kEach, my_column = self % (kTile / kEach) * kEach;

    Outputs sum = {};
    for (int part = 0; part < 2; ++part) {
        const int64_t depth = part == 0 ? p.depth[0] : p.depth[1];
        for (int64_t first = 0; first < depth; first += kDepth) {
            // Neighbouring threads take neighbours in memory, whichever way the operand lies there.
#pragma unroll 1  // unrolled, the addresses of all rounds would be kept and spilled
            for (int i = self; i < kDepth * kTile; i += Traits::kThreads) {
                const int across = i % kTile, along = i / kTile;
                const int l_tile = Product::kLeftDepthFirst ? i / kDepth : across;
                const int l_depth = Product::kLeftDepthFirst ? i % kDepth : along;
                const bool l_in = first_row + l_tile < p.rows && first + l_depth < depth;
                store_shared(&shared.left[l_depth][l_tile],
                             l_in ? p.left(part, first_row + l_tile, first + l_depth) : 0.0f);
                const int r_tile = Product::kRightDepthFirst ? i / kDepth : across;
                const int r_depth = Product::kRightDepthFirst ? i % kDepth : along;
                // Outside, an element at the edge is read instead, so that no lane is missing.
                const int64_t r_along = first + r_depth, r_across = first_column + r_tile;
                const float right = p.right(part, min(r_along, depth - 1), min(r_across, p.columns - 1), level);
                store_shared(&shared.right[r_depth][r_tile], r_along < depth && r_across < p.columns ? right : 0.0f);
            }
            __syncthreads();
            Outputs panel = {};
            for (int run_begin = 0; run_begin < kDepth; run_begin += Traits::kRun) {
                Outputs run = {};
#pragma unroll
                for (int d = run_begin; d < run_begin + Traits::kRun; ++d) {
                    const float4 left = load_shared(reinterpret_cast<const float4*>(&shared.left[d][my_row]));
                    const float4 right = load_shared(reinterpret_cast<const float4*>(&shared.right[d][my_column]));
                    const float l[kEach] = {left.x, left.y, left.z, left.w};
                    const float r[kEach] = {right.x, right.y, right.z, right.w};
#pragma unroll
                    for (int i = 0; i < kEach; ++i) {
#pragma unroll
                        for (int j = 0; j < kEach; ++j) run[i][j] = fmaf(l[i], r[j], run[i][j]);
                    }
                }
                add(panel, run);
            }
            add(sum, panel);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                const int64_t row = first_row + my_row + i, column = first_column + my_column + j;
                if (row >= p.rows || column >= p.columns) continue;
                if (part == 0) {
                    if (depth > 0) sum[i][j] = p.between(row, column, sum[i][j]);
                } else {
                    p.store(row, column, sum[i][j]);
                }
            }
        }
    }
}

// Grid: a block for each 64 x 64 outputs.
template <class Product>
__global__ void __launch_bounds__(ProductTraits::kThreads, 1) product_kernel(const __grid_constant__ Product p) {
    constexpr int kTile = ProductTraits::kTile;
    const unsigned tiles_across = static_cast<unsigned>((p.columns + kTile - 1) / kTile);
    product_tile(p, p.lane_level(static_cast<int>(threadIdx.x) % 32),
                 static_cast<int64_t>(blockIdx.x / tiles_across) * kTile,
                 static_cast<int64_t>(blockIdx.x % tiles_across) * kTile);
}

}  // namespace qlk::cuda
