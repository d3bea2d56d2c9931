// The shape of a thread block's work in warpgroups.cuh, and its shared memory.
#pragma once

#include <ptx_sm90.cuh>

#include "cuda/common/dispatch.h"
#include "cuda/common/pairs.cuh"
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
    // Blocks in a step. All of their codes are under way: 4 KiB a block. More rows take longer for a block, and leave
    // fewer registers.
    static constexpr int kDepth = warpgroup_depth(kRows), kBlocks = kDepth / kBlock;
    static constexpr int kStageBlocks = warpgroup_stage_blocks(kRows), kStages = kBlocks / kStageBlocks;
    // A unit is half of a block's columns in a row of x. kUnits: of a stage, for each thread that brings x, 1 or 2.
    static constexpr int kUnits = kRows * kStageBlocks * 2 / kProducers;
    static constexpr int kDeep = kRows == 64 ? 4 : kRows == 128 ? 3 : 2;  // units on their way, in registers
    // With 128 rows the threads that multiply need more registers than a third of them each.
    static constexpr bool kUneven = kRows > 64;
    static constexpr int kConsumerRegisters = 208, kProducerRegisters = 88;
    static constexpr int kRoom = kRows == 64 ? 64 : 0;  // registers for other blocks' sums, see splits.cuh
    static constexpr int kPitch = kColumns + 8;  // of results: neither stmatrix nor reading them has bank conflicts

    // The table begins at kTable in the shared address space. So the upper half of a lookup's address is always the
    // same, and PRMT puts an address together from a byte of codes and a register of the lane's own. Other data lies in
    // front of it, and with 128 rows the stages behind it.
    struct Stages {
        uint4 x[kStages][kStageBlocks][kRows * 8];  // rows of 128 bytes for a block, swizzled; see XSource
    };
    static_assert(sizeof(Stages) >= kRows * kColumns * sizeof(float), "a cluster's blocks put their sums there");
    struct Table {
        PairRow pairs[256];
    };
    struct Rest {
        T out[kRows][kPitch];
        float constants[kNestedBlock];  // the table of double-quantized constants
        MBarrier full[kStages], empty[kStages];
        int word;  // for splits.cuh
    };
    struct Nothing {};
    static constexpr bool kStagesFirst = kRows <= 64;
    struct Front : std::conditional_t<kStagesFirst, Stages, Nothing>, Rest {};
    struct Back : Table, std::conditional_t<kStagesFirst, Nothing, Stages> {};
    static constexpr uint32_t kTable = 0x10000;
    // What the block's memory begins behind: 1 KiB on Hopper, which the hardware takes for itself.
    static constexpr size_t kMostBefore = kTable - sizeof(Front);
    static_assert(kMostBefore > 8 * 1024 && alignof(Front) <= 1024);
    static_assert(sizeof(T) == 2 && kRows % 16 == 0 && kUnits * kProducers == kRows * kStageBlocks * 2);
    static_assert(2 * kConsumerRegisters + kProducerRegisters <= 512);
    static_assert(kTable + sizeof(Back) == warpgroup_shared(kRows));

    struct Shared {
        Front& front;
        Back& back;

        QLK_DEVICE static Shared find() {
            unsigned char* const bytes = &shared_memory<unsigned char>();
            // Its first 1 KiB, or so, belongs to the hardware.
            if (shared_address(bytes) > kMostBefore) trap();
            return {*reinterpret_cast<Front*>(bytes), *shared_pointer<Back>(kTable)};
        }
        QLK_DEVICE auto& x() const {
            if constexpr (kStagesFirst) {
                return front.x;
            } else {
                return back.x;
            }
        }
    };
};

// The tiles of a thread block: a whole one, or its part of those that blocks share (splits.cuh). Tiles that have a
// block of their own come first. Tiles go down the rows first, so that those running together share weights in L2.
struct TileShare {
    Share share;

    QLK_DEVICE bool alone() const { return blockIdx.x < static_cast<unsigned>(share.splits.whole); }
    QLK_DEVICE unsigned first_tile() const { return alone() ? 0 : share.first_tile(); }
    QLK_DEVICE bool reaches(unsigned tile) const { return alone() ? tile == 0 : share.reaches(tile); }
    // The block's part of a tile, in steps; and of all its tiles together.
    QLK_DEVICE unsigned from(unsigned tile) const { return alone() ? 0 : share.from(tile); }
    QLK_DEVICE unsigned to(unsigned tile) const { return alone() ? share.steps : share.to(tile); }
    QLK_DEVICE unsigned steps() const {
        return alone() ? share.steps : share.begin_of(share.self() + 1) - share.begin_of(share.self());
    }
    // A tile's number among all tiles.
    QLK_DEVICE unsigned number(unsigned tile) const {
        return alone() ? blockIdx.x : static_cast<unsigned>(share.splits.whole) + share.number(tile);
    }
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
