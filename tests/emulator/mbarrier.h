// mbarriers, as bulk copies see them.
#pragma once

#include "block.h"

namespace emu {

// Most arrivals, and most bytes in either direction (PTX ISA, mbarrier, "Contents").
constexpr uint32_t kMostOfMBarrier = (1u << 20) - 1;

struct FoundBarrier {
    Block& block;
    MBarrier& barrier;
};

// The mbarrier at an address of the cluster's shared memory; fails if there is none.
FoundBarrier find_barrier(void* at, Site site);
// Checks an operation for races. Operations on an mbarrier may overlap with each other, but not with its init or inval.
// visits: the operation touches another block's shared memory.
void use(const FoundBarrier& found, void* at, Site site, bool visits = true);
// Ends the phase if all arrivals and bytes have come.
void maybe_complete(Block& block, MBarrier& barrier);
void check_bytes(int64_t bytes);

}  // namespace emu
