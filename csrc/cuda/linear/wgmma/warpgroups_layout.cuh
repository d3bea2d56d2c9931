// The shape of a thread block's work in warpgroups.cuh, and its shared memory.
#pragma once

#include <ptx_sm90.cuh>

#include "cuda/common/dispatch.h"
#include "cuda/linear/mma/tiles_layout.cuh"

namespace qlk::cuda {

// T: bf16 or fp16.
// kRows_: rows of x in a tile, 16 to 128.
// kNested_: the constants are double-quantized.
template <class T, int kRows_, bool kNested_>
struct WarpgroupTraits {
    static constexpr bool kNested = kNested_;
    static constexpr int kRows = kRows_, kColumns = 128;
    static constexpr int kConsumers = 256, kProducers = 128, kThreads = kConsumers + kProducers;
    static constexpr int kBlocks = kWarpgroupDepth / kBlock;         // in a step
    static constexpr int kStageBlocks = warpgroup_stage_blocks(kRows);  // in a stage
    static constexpr int kStages = warpgroup_stages(kRows);
    // Blocks whose codes are under way, 4 KiB each. More rows take longer for a block, and leave fewer registers.
    static constexpr int kAhead = kRows <= 32 ? 8 : kRows <= 64 ? 4 : 2;
    // A unit is half of a block's columns in a row of x. kUnits: of a stage, for each thread that brings x.
    static constexpr int kUnits = kRows * kStageBlocks * 2 / kProducers;
    static constexpr int kDeep = kRows == 64 ? 4 : 2;  // stages on their way, in registers
    // With 128 rows the threads that multiply need more registers than a third of them each.
    static constexpr bool kUneven = kRows > 64;
    static constexpr int kConsumerRegisters = 200, kProducerRegisters = 104;
    static constexpr int kPitch = kColumns + 8;  // of results: neither stmatrix nor reading them has bank conflicts

    struct Shared {
        uint4 x[kStages][kStageBlocks][kRows * 8];  // rows of 128 bytes, swizzled; see XSource
        uint32_t pairs[256][64];  // the levels of each byte, a copy for each lane; half of it unused: rows of 256 bytes
                                  // save a shift for each lookup
        T out[kRows][kPitch];
        float constants[kNestedBlock];  // the table of double-quantized constants
        MBarrier full[kStages], empty[kStages];
        int word;  // for splits.cuh
    };
    static_assert(sizeof(T) == 2 && kRows % 16 == 0 && kUnits * kProducers == kRows * kStageBlocks * 2);
    static_assert(sizeof(Shared) <= warpgroup_shared(kRows) && sizeof(Shared) + 256 > warpgroup_shared(kRows));
    static_assert(2 * kConsumerRegisters + kProducerRegisters <= 512);
};

// A stage of x, in turn, and the parity of the phase in which it is filled.
struct Stage {
    int index;
    uint32_t parity;

    QLK_DEVICE void advance(int stages) {
        if (++index == stages) {
            index = 0;
            parity ^= 1;
        }
    }
};

}  // namespace qlk::cuda
