// What a launch of tiles.cuh takes, the shape of a thread block's tile, and where its data lies in shared memory.
#pragma once

#include "cuda/common/bias.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/dropout.cuh"
#include "cuda/common/splits.cuh"
#include "cuda/common/weight.cuh"

namespace qlk::cuda {

// Matrices are row-major. Sizes and strides are in elements.
template <class T>
struct GemmArguments {
    DeviceWeight weight;  // W [n, k]
    int64_t n, k;
    const T* left;       // [m, depth]: x [m, k], or dy [m, n] in backward
    const T* low_left;   // [m, r]: u, or v in backward
    const T* low_right;  // lora_b [n, r], or lora_a [r, k] in backward
    Bias<T> bias;        // [n]; forward only
    Dropout dropout;     // mask on v A; backward only
    T* out;              // y [m, n], or dx [m, k] in backward
    int64_t m, r;        // rows of x; rank of the adapter, 0 for none
    bool left_aligned;   // rows of left are 16-byte aligned; otherwise they are read element by element
    bool out_aligned;    // rows of out are 16-byte aligned; otherwise they are written element by element
    bool low_aligned;    // rows of low_left and low_right are 16-byte aligned
    Splits splits;       // blocks that share a tile, each with a part of the depth
};

// T: bf16 or fp16.
// kBackward_: dx = dy W instead of y = x W^T.
// kRows_, kColumns_: outputs of a thread block.
// kWarpsDown_: warps that divide kRows_ between them.
// kStages_: steps whose copies are in shared memory or on their way there.
template <class T, bool kBackward_, int kRows_, int kColumns_, int kWarpsDown_, int kStages_>
struct GemmTraits {
    static constexpr bool kBackward = kBackward_;
    static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpsDown = kWarpsDown_, kStages = kStages_;
    static constexpr int kThreads = 256;
    static constexpr int kDepth = kTileDepth;
    // Warps with the same outputs. Each takes its part of every step's depth.
    static constexpr int kSlices = kColumns == 128 && kRows >= 64 ? 2 : 1;
    static constexpr int kWarpsAcross = 8 / kWarpsDown / kSlices;
    static constexpr int kWarpRows = kRows / kWarpsDown;
    static constexpr int kWarpColumns = kColumns / kWarpsAcross;
    static constexpr int kUnits = kColumns * kDepth / kBlock;  // blocks of weights in a step
    static constexpr int kPitch = kColumns + 8;                // of a row of results in shared memory
    static_assert(sizeof(T) == 2);
    static_assert(kDepth == kBlock, "a row of a forward tile is one block of weights");
    static constexpr int kWords = kUnits * 8 / kThreads;  // of eight codes, that a thread decodes in a step
    static_assert(kWords == 4 || kWords == 8, "a thread decodes half a block, or a whole one");
    static_assert(kWarpRows % (16 * kSlices) == 0 && kWarpColumns % 16 == 0);
    static_assert(kSlices <= 2, "add_slices adds two; with more, the order of sums would matter");

    struct Loop {
        T left[kStages][kRows * kDepth];
        uint4 codes[kStages][kUnits * 2];
        T weights[2][kColumns * kDepth];  // decoded: one buffer is read while the other is written
    };
    union Shared {
        Loop loop;
        float4 sums[kSlices == 1 ? 1 : kRows * kColumns / 4];  // sums that one slice hands to the other
        T out[kRows * kPitch];
    };
    static_assert(sizeof(Shared) == tiles_shared(kRows, kColumns, kStages));
};

// Offset, in elements, of a 16-byte piece of a row. Rows of 64 elements have 8 pieces, rows of 256 have 32. Eight
// neighbouring rows have a piece in eight different groups of banks; so have two neighbouring rows, from an even one
// on, four blocks of eight pieces each.
template <int kWidth>
QLK_DEVICE int swizzled(int row, int piece) {
    return row * kWidth + (piece ^ (row & 7) ^ (piece / 8 * 2 & 6)) * 8;
}

}  // namespace qlk::cuda
