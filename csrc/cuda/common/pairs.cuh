// A table in shared memory that decodes two codes at once: for each byte, its two levels in the type of the products,
// a copy for each lane, so that lanes with different bytes meet at no bank.
//
// Levels are rounded to that type once, for all blocks. A block's constant is left to the caller, who multiplies the
// block's sums by it in float32: one multiplication for each sum instead of one for each weight.
#pragma once

#include <type_traits>

#include "cuda/common/decode.cuh"

namespace qlk::cuda {

// The table has the levels times this, and constants are divided by it.
template <class T>
constexpr float kPairScale = std::is_same_v<T, bf16> ? kBf16LevelScale : kFp16LevelScale;
// A constant for sums of products with the table's levels.
template <class T>
QLK_DEVICE float pair_constant(float absmax) {
    return __fmul_rn(absmax, 1.0f / kPairScale<T>);
}

// One PRMT makes a pair's address from the byte and the lane, with the byte in bits 8 to 15: rows lie 256 bytes apart.
// A row of the table fills half of that, and the other half is free for something else.
struct PairRow {
    uint32_t levels[32];
    uint4 room[8];
};

// The two levels of byte kByte of `codes`, the one of the high nibble first. lane_bytes: 4 * lane.
template <int kByte>
QLK_DEVICE uint32_t pair_of(const PairRow* rows, uint32_t codes, uint32_t lane_bytes) {
    // {0, 0, byte, 4 * lane}
    const uint32_t at = prmt(codes, lane_bytes, 0x5504 | kByte << 4);
    return load_shared(reinterpret_cast<const uint32_t*>(reinterpret_cast<const unsigned char*>(rows) + at));
}

// Fills the table; called by all kThreads threads, 256 or 512. own: level self % 16. The levels go through shuffles:
// the compiler would load levels[byte >> 4] again for each store, and lanes with different indices into constant memory
// take turns.
template <class T, int kThreads>
QLK_DEVICE void fill_pairs(PairRow* rows, float own, int self) {
    constexpr int kShare = kThreads / 256, kStores = 8 / kShare;
    static_assert(kThreads == kShare * 256 && kStores * kShare == 8);
    const int byte = self / kShare;
    const float level = __fmul_rn(own, kPairScale<T>);
    const float high = __shfl_sync(kAllLanes, level, byte >> 4, 16), low = __shfl_sync(kAllLanes, level, byte & 15, 16);
    const uint32_t pair = pack_pair<T>(high, low);
    uint4* const to = reinterpret_cast<uint4*>(rows[byte].levels);
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
        // Neighbouring lanes start at different banks.
        store_shared(to + (self + i * kShare) % 8, make_uint4(pair, pair, pair, pair));
    }
}

}  // namespace qlk::cuda
