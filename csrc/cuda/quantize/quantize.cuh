// Quantizes a weight to NF4, with the sums that double quantization needs.
//
// Formula:
//     absmax[b] = max |w| over block b of 64
//     code[i] = the level nearest to w[i] / absmax, a tie to the lower
//     sums[g] = the sum of absmax over 256 blocks, from which quantize_absmax computes the mean
//
// Layout: a thread block takes 256 blocks of weights, 16384; a warp takes 32 of them. A lane loads 16 bytes, so 8 lanes
//     (16-bit types) or 16 (float32) share a block and find its constant by shuffles.
//
// Shared memory: 1024 bytes of constants, 64 of buckets, and 384 bytes of thresholds for each warp.
//
// Why: the nearest level is exact. w is nearer to the upper of two levels when w > t, with t = round_down(midpoint *
//     absmax) exact in float64 (csrc/cpu/quantize/thresholds.h). One of 64 buckets says which of the 15 thresholds to
//     compare with, so a weight costs two look-ups: docs/design/notes-cuda.md, "Quantizing".
#pragma once

#include <ptx.cuh>

#include "cuda/common/reduce.cuh"

namespace qlk::cuda {

struct QuantizeArguments {
    const void* weight;    // [count] of T
    uint8_t* packed;       // [ceil(count / 2)]
    float* absmax;         // [blocks of 64]
    double* sums;          // [groups of 256 blocks], or null
    int64_t count;         // elements of the flat weight
    bool aligned;          // weight is 16-byte aligned, packed 4-byte
    double midpoints[16];  // between neighbouring levels; the last is infinite
};

constexpr int kBuckets = 64;  // of [-1, 1]

// T: type of the weight.
template <class T>
struct QuantizeTraits {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kPerLane = 16 / static_cast<int>(sizeof(T));  // weights in one load
    static constexpr int kLanes = kBlock / kPerLane;                   // that share a block
    static constexpr int kUnit = 32 * kPerLane;                        // weights that a warp takes at a time
    static constexpr int kUnitBlocks = kUnit / kBlock;
    static constexpr int kGroup = kBlock * kNestedBlock;    // weights of a thread block
    static constexpr int kUnits = kGroup / kWarps / kUnit;  // of a warp, one after the other
    static constexpr int kThresholds = 16 / kLanes;         // that a lane computes
    // With 16-bit types 4 rows start 24 banks apart, so 32 lanes store to 32 different banks.
    static constexpr int kRow = kUnitBlocks == 4 ? 24 : 16;
    static_assert(kLanes <= 16 && 16 % kLanes == 0, "the lanes of a block compute its 16 thresholds");

    struct Shared {
        float absmax[kNestedBlock];
        uint8_t bucket[kBuckets];  // midpoints below it; bytes, so that 16 banks hold them all
        float threshold[kWarps][kUnitBlocks][kRow];
    };
};

// Loads a lane's weights [first, first + kPerLane) as float32, zeros past `count`.
template <class T>
QLK_DEVICE void load_weights(const QuantizeArguments& a, int64_t first, float (&value)[QuantizeTraits<T>::kPerLane]) {
    constexpr int kCount = QuantizeTraits<T>::kPerLane;
    const T* const weight = static_cast<const T*>(a.weight);
    if (a.aligned && first + kCount <= a.count) {
        const uint4 raw = ld_global_once_16(weight + first);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if constexpr (sizeof(T) == 4) {
                value[i] = __uint_as_float(words[i]);
            } else {
                value[i] = to_float(from_bits<T>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))));
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            value[i] = first + i < a.count ? to_float(load_global(weight + first + i)) : 0.0f;
    }
}

// Grid: a block for each kGroup weights.
template <class T>
__global__ void __launch_bounds__(QuantizeTraits<T>::kThreads)
    quantize_kernel(const __grid_constant__ QuantizeArguments a) {
    using Traits = QuantizeTraits<T>;
    constexpr int kPerLane = Traits::kPerLane;
    auto& shared = shared_memory<typename Traits::Shared>();
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int block_lane = lane % Traits::kLanes;  // this lane among those that share its block
    const int unit_block = lane / Traits::kLanes;  // its block in the warp's unit
    const int64_t group = blockIdx.x;
    const int64_t warp_first = group * Traits::kGroup + warp * (Traits::kGroup / Traits::kWarps);

    if (threadIdx.x < kBuckets) {
        // Widened by 1e-5, far more than the rounding of w / absmax.
        const double edge = -1.0 + static_cast<int>(threadIdx.x) / (kBuckets / 2.0) - 1e-5;
        uint8_t below = 0;
        for (int i = 0; i < 15; ++i) below += a.midpoints[i] < edge ? 1 : 0;
        store_shared(&shared.bucket[threadIdx.x], below);
    }
    __syncthreads();

    // The midpoints of this lane's thresholds. Through shuffles, because the compiler would load them again in each
    // unit, and lanes with different indices into constant memory take turns.
    const double lane_midpoint = a.midpoints[lane % 16];
    double midpoint[Traits::kThresholds];
#pragma unroll
    for (int i = 0; i < Traits::kThresholds; ++i) {
        midpoint[i] = __shfl_sync(kAllLanes, lane_midpoint, i * Traits::kLanes + block_lane, 16);
    }

    float next[kPerLane];
    load_weights<T>(a, warp_first + lane * kPerLane, next);
    for (int unit = 0; unit < Traits::kUnits; ++unit) {
        const int64_t first = warp_first + unit * Traits::kUnit + lane * kPerLane;
        float value[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) value[i] = next[i];
        // The next unit is under way while this one is processed.
        if (unit + 1 < Traits::kUnits) load_weights<T>(a, first + Traits::kUnit, next);

        // Non-negative floats have the order of their bits; infinity and NaN come last.
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) largest = max(largest, __float_as_uint(value[i]) & 0x7fffffffu);
#pragma unroll
        for (int bits = 1; bits < Traits::kLanes; bits *= 2) {
            largest = max(largest, __shfl_xor_sync(kAllLanes, largest, bits));
        }
        const bool finite = largest < 0x7f800000u;
        const float absmax = __uint_as_float(finite ? largest : 0x7fc00000u);
        const int block = (warp * Traits::kUnits + unit) * Traits::kUnitBlocks + unit_block;  // in the group
        const bool exists = group * kNestedBlock + block < (a.count + kBlock - 1) / kBlock;
        if (block_lane == 0) {
            store_shared(&shared.absmax[block], exists ? absmax : 0.0f);
            if (exists) store_global(a.absmax + group * kNestedBlock + block, absmax);
        }

        float (&threshold)[Traits::kRow] = shared.threshold[warp][unit_block];
#pragma unroll
        for (int i = 0; i < Traits::kThresholds; ++i) {
            const int t = i * Traits::kLanes + block_lane;
            const double exact = __dmul_rn(midpoint[i], static_cast<double>(absmax));
            store_shared(&threshold[t], t == 15 ? __uint_as_float(0x7f800000u) : __double2float_rd(exact));
        }
        __syncwarp();

        // Constants too small for a reciprocal are scaled up first, and their weights with them.
        const float scale = absmax < 0x1p-100f ? 0x1p100f : 1.0f;
        const float reciprocal = 1.0f / __fmul_rn(absmax, scale);
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const float ratio = __fmul_rn(__fmul_rn(value[i], scale), reciprocal);
            // NaN, from a constant that is 0 or not finite, goes to bucket 0; its result is not used.
            const float place = fminf(fmaxf((ratio + 1.0f) * (kBuckets / 2), 0.0f), kBuckets - 1.0f);
            const uint32_t below = load_shared(&shared.bucket[static_cast<int>(place)]);
            uint32_t code = below + (value[i] > load_shared(&threshold[below]) ? 1 : 0);
            if (absmax == 0.0f || !finite) code = kZeroCode;
            // The first of a pair goes to the high nibble. Past the end: the code of zero.
            if (first + i >= a.count) code = kZeroCode;
            codes |= code << (i / 2 * 8 + (i % 2 ? 0 : 4));
        }
        __syncwarp();  // all thresholds are read before the next unit's are written

        if (a.aligned && first + kPerLane <= a.count) {
            if constexpr (kPerLane == 8) {
                store_global(reinterpret_cast<uint32_t*>(a.packed + first / 2), codes);
            } else {
                store_global(reinterpret_cast<uint16_t*>(a.packed + first / 2), static_cast<uint16_t>(codes));
            }
        } else {
#pragma unroll
            for (int i = 0; i < kPerLane; i += 2) {
                if (first + i < a.count) {
                    store_global(a.packed + (first + i) / 2, static_cast<uint8_t>(codes >> (i / 2 * 8)));
                }
            }
        }
    }

    if (!a.sums) return;
    __syncthreads();
    if (warp == 0) {
        double part_of_sum[kNestedBlock / 32];
#pragma unroll
        for (int i = 0; i < kNestedBlock / 32; ++i) part_of_sum[i] = load_shared(&shared.absmax[lane + 32 * i]);
        const double sum = tree_sum(part_of_sum);
        if (lane == 0) store_global(a.sums + group, sum);
    }
}

}  // namespace qlk::cuda
