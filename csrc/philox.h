// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), for dropout masks.
//
// Element i of a row-major [M, K] tensor takes word i % 4 of the block whose counter is i / 4 and whose key is the
// seed. It is dropped if that word is below p * 2^32. So masks need not be stored, and are the same for every backend,
// thread count and tile shape.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QLK_HOST_DEVICE __host__ __device__
#else
#define QLK_HOST_DEVICE
#endif

namespace qlk {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKey1 = 0xBB67AE85u;

// Fills words [4 * count] from blocks first to first + count - 1. One loop over blocks with ten fixed rounds inside,
// which compilers turn into vector code.
QLK_HOST_DEVICE static inline void philox_blocks(uint64_t seed, uint64_t first, int count, uint32_t* words) {
    for (int i = 0; i < count; ++i) {
        const uint64_t counter = first + static_cast<uint64_t>(i);
        uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = static_cast<uint64_t>(kPhiloxMul0) * c0;
            const uint64_t p1 = static_cast<uint64_t>(kPhiloxMul1) * c2;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(p1);
            c3 = static_cast<uint32_t>(p0);
            k0 += kPhiloxKey0;
            k1 += kPhiloxKey1;
        }
        words[4 * i] = c0;
        words[4 * i + 1] = c1;
        words[4 * i + 2] = c2;
        words[4 * i + 3] = c3;
    }
}

// The threshold of a drop probability in [0, 1): a word below it means "dropped".
static inline uint32_t dropout_threshold(double p) {
    const double t = p * 4294967296.0;
    return t >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(t);
}

}  // namespace qlk
