// Whether dropout keeps an element, by the mask of csrc/philox.h.
#pragma once

#include <device.cuh>

#include "philox.h"

namespace qlk::cuda {

struct Dropout {
    const int64_t* seed;  // [1], on the device; null: everything is kept
    uint32_t threshold;   // dropout_threshold(p)

    // Element i of the row-major tensor. Four neighbours share a counter: for several of them use the functions below.
    QLK_DEVICE bool keeps(int64_t i) const {
        if (!seed) return true;
        uint32_t words[4];
        philox_blocks(static_cast<uint64_t>(load_global(seed)), static_cast<uint64_t>(i) / 4, 1, words);
        const int which = static_cast<int>(i % 4);
        const uint32_t word = which < 2 ? (which == 0 ? words[0] : words[1]) : (which == 2 ? words[2] : words[3]);
        return word >= threshold;
    }
};

// A bit for each of elements 4 * block to 4 * block + 3, the first the lowest. Not inlined: kernels whose outputs are
// all in registers would have 32 copies.
QLK_DEVICE_CALL uint32_t dropout_keeps_4(uint64_t seed, uint32_t threshold, int64_t block) {
    uint32_t words[4], keep = 0;
    philox_blocks(seed, static_cast<uint64_t>(block), 1, words);
#pragma unroll
    for (int e = 0; e < 4; ++e) keep |= (words[e] >= threshold ? 1u : 0u) << e;
    return keep;
}

// A bit for each of elements i to i + 7, the first the lowest. Computes each counter's words once.
QLK_DEVICE_CALL uint32_t dropout_keeps_8(uint64_t seed, uint32_t threshold, int64_t i) {
    const int before = static_cast<int>(i % 4);
    uint32_t keep = 0;
#pragma unroll
    for (int block = 0; block < 3; ++block) {
        if (block == 2 && before == 0) break;
        uint32_t words[4];
        philox_blocks(seed, static_cast<uint64_t>(i) / 4 + block, 1, words);
#pragma unroll
        for (int e = 0; e < 4; ++e) keep |= (words[e] >= threshold ? 1u : 0u) << (block * 4 + e);
    }
    return keep >> before;
}

}  // namespace qlk::cuda
