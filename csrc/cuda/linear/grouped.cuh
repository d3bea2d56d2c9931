// The products of a mixture's experts: one launch for all of them, however many rows each has.
//
// Formula: for each expert e and its rows of x, offsets[e] to offsets[e + 1], what tiles.cuh and layer_products.cuh
//     compute for a single weight; weights, adapters and biases are stacks, [experts, ...]
//
// Layout: the tile of tiles.cuh or product.cuh. No tile has rows of two experts. An expert's tiles begin at number
//     begin / rows + e, rounded down, which leaves it at least as many as it needs: all experts have
//     m / rows + experts, known to the host, and a block finds its own by a binary search. Those left over end at once.
//
// Shared memory: as tiles.cuh and product.cuh.
//
// Why: the host need not know the offsets, so it does not wait, and a graph can capture the launch.
#pragma once

#include "cuda/linear/mma/tiles.cuh"
#include "cuda/linear/simt/layer_products.cuh"

namespace qlk::cuda {

struct Expert {
    int64_t number, begin, rows;  // its rows of x: `rows` from `begin` on; none where offsets descend
};

struct Experts {
    const int64_t* offsets;  // [count + 1], on the device; clamped to 0 .. m, as the host has not seen them
    int64_t count, m;

    QLK_DEVICE int64_t offset(int64_t e) const {
        const int64_t at = load_global(offsets + e);
        return at < 0 ? 0 : at > m ? m : at;
    }
    QLK_DEVICE Expert expert(int64_t e) const {
        const int64_t begin = offset(e);
        return {e, begin, offset(e + 1) - begin};
    }

    // The expert that a tile belongs to: the last whose tiles begin at or before it. Sets `row` to the tile's first row
    // among the expert's, which may lie past them.
    QLK_DEVICE Expert of_tile(int64_t tile, int rows, int64_t& row) const {
        int64_t low = 0, high = count;
#pragma unroll 1
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (offset(middle) / rows + middle <= tile) {
                low = middle;
            } else {
                high = middle;
            }
        }
        const Expert found = expert(low);
        row = (tile - low - found.begin / rows) * rows;
        return found;
    }
};

template <class T>
QLK_DEVICE T* further(T* address, int64_t count) {
    return address ? address + count : nullptr;
}

QLK_DEVICE void move_weight(DeviceWeight& w, int64_t n, int64_t k, int64_t e) {
    const int64_t blocks = (n * k + kBlock - 1) / kBlock;
    w.packed += e * ((n * k + 1) / 2);
    if (w.absmax) {
        w.absmax += e * blocks;
    } else {
        w.absmax_code += e * blocks;
        w.nested_absmax += e * ((blocks + kNestedBlock - 1) / kNestedBlock);
        w.nested_offset += e;
    }
}

template <class T>
QLK_DEVICE void move_bias(Bias<T>& bias, int64_t n, int64_t e) {
    bias.wide = further(bias.wide, e * n);
    bias.narrow = further(bias.narrow, e * n);
}

// ------------------------------------------------------------------------------------------------- on tensor cores

template <class T>
struct GroupedGemm {
    GemmArguments<T> first;  // of the first expert; m is all experts', and tiles are not shared
    Experts experts;
    unsigned down;  // m / kRows + experts: the tiles of one column of tiles
};

template <class T, class Traits>
QLK_DEVICE void move_to(GemmArguments<T>& a, const Expert& expert) {
    constexpr bool kBackward = Traits::kBackward;
    move_weight(a.weight, a.n, a.k, expert.number);
    a.left += expert.begin * (kBackward ? a.n : a.k);
    a.low_left = further(a.low_left, expert.begin * a.r);
    a.low_right = further(a.low_right, expert.number * a.r * (kBackward ? a.k : a.n));
    if constexpr (!kBackward) move_bias(a.bias, a.n, expert.number);
    a.out += expert.begin * (kBackward ? a.k : a.n);
    a.m = expert.rows;
}

// Grid: `down` times the tiles across. Tiles go down the rows first, so that those running together share
// weights in L2. Dynamic shared memory: sizeof(Traits::Shared).
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) grouped_gemm_kernel(const __grid_constant__ GroupedGemm<T> g) {
    if constexpr (kRuns<T, sizeof(typename Traits::Shared)>) {
        int64_t row;
        const Expert expert = g.experts.of_tile(blockIdx.x % g.down, Traits::kRows, row);
        if (row < 0 || row >= expert.rows) return;
        GemmArguments<T> a = g.first;
        move_to<T, Traits>(a, expert);
        auto& shared = shared_memory<typename Traits::Shared>();
        const int64_t depth = Traits::kBackward ? a.n : a.k;
        Gemm<T, Traits> gemm{a,
                             shared.loop,
                             row,
                             static_cast<int64_t>(blockIdx.x / g.down) * Traits::kColumns,
                             depth,
                             0,
                             static_cast<int>((depth + Traits::kDepth - 1) / Traits::kDepth),
                             a.weight.absmax ? 0.0f : load_global(a.weight.nested_offset),
                             static_cast<int>(threadIdx.x),
                             static_cast<int>(threadIdx.x % 32),
                             static_cast<int>(threadIdx.x / 32),
                             {}};
        gemm.run();
        gemm.finish();
        gemm.add_slices(shared.sums);
        gemm.store(shared.out);
    } else {
        trap();
    }
}

// ---------------------------------------------------------------------------------------------- on float32 units

// Products whose rows are rows of x.
template <class T>
QLK_DEVICE void move_to(ForwardProduct<T>& p, const Expert& expert) {
    const int64_t n = p.columns, r = p.depth[0], k = p.depth[1];
    move_weight(p.weight, n, k, expert.number);
    p.x += expert.begin * k;
    p.u = further(p.u, expert.begin * r);
    p.lora_b = further(p.lora_b, expert.number * n * r);
    move_bias(p.bias, n, expert.number);
    p.y += expert.begin * n;
    p.rows = expert.rows;
}

template <class T>
QLK_DEVICE void move_to(InputGradientProduct<T>& p, const Expert& expert) {
    const int64_t k = p.columns, r = p.depth[0], n = p.depth[1];
    move_weight(p.weight, n, k, expert.number);
    p.dy += expert.begin * n;
    p.v = further(p.v, expert.begin * r);
    p.lora_a = further(p.lora_a, expert.number * r * k);
    p.dx += expert.begin * k;
    p.rows = expert.rows;
}

template <class T>
QLK_DEVICE void move_to(DownProduct<T>& p, const Expert& expert) {
    const int64_t r = p.columns, k = p.depth[1];
    p.x += expert.begin * k;
    p.lora_a += expert.number * r * k;
    p.u += expert.begin * r;
    p.rows = expert.rows;
}

template <class T>
QLK_DEVICE void move_to(UpGradientProduct<T>& p, const Expert& expert) {
    const int64_t r = p.columns, n = p.depth[1];
    p.dy += expert.begin * n;
    p.lora_b += expert.number * n * r;
    p.v += expert.begin * r;
    p.rows = expert.rows;
}

// A gradient's rows of x are its depth. Without any it becomes zero.
template <class T>
QLK_DEVICE void move_to(AdapterGradientProduct<T>& p, const Expert& expert) {
    p.left_matrix += expert.begin * p.rows;
    p.right_matrix += expert.begin * p.columns;
    p.gradient += expert.number * p.rows * p.columns;
    p.depth[1] = expert.rows > 0 ? expert.rows : 0;
}

template <class Product>
constexpr bool kOverRows = true;
template <class T>
constexpr bool kOverRows<AdapterGradientProduct<T>> = false;

template <class Product>
struct GroupedProduct {
    Product first;  // of the first expert; rows, or a gradient's depth, are all experts'
    Experts experts;
};

// Grid: m / 64 + experts tiles, or a gradient's tiles for each expert, times the tiles across, which are neighbours.
template <class Product>
__global__ void __launch_bounds__(ProductTraits::kThreads, 1)
    grouped_product_kernel(const __grid_constant__ GroupedProduct<Product> g) {
    constexpr int kTile = ProductTraits::kTile;
    const unsigned across = static_cast<unsigned>((g.first.columns + kTile - 1) / kTile);
    const unsigned tile = blockIdx.x / across;
    int64_t row;
    Expert expert;
    if constexpr (kOverRows<Product>) {
        expert = g.experts.of_tile(tile, kTile, row);
        if (row < 0 || row >= expert.rows) return;
    } else {
        const unsigned of_one = static_cast<unsigned>((g.first.rows + kTile - 1) / kTile);
        expert = g.experts.expert(tile / of_one);
        row = static_cast<int64_t>(tile % of_one) * kTile;
    }
    Product p = g.first;
    move_to(p, expert);
    // The level from the launch's parameters: a copy that lanes index would lie in local memory.
    product_tile(p, g.first.lane_level(static_cast<int>(threadIdx.x) % 32), row,
                 static_cast<int64_t>(blockIdx.x % across) * kTile);
}

}  // namespace qlk::cuda
