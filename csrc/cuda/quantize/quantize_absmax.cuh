// The second quantization: block constants to 8 bits.
//
// Formula:
//     offset = mean(absmax)
//     in groups of 256 blocks: nested_absmax = max |absmax - offset|
//     code = the entry of a 256-entry table nearest to (absmax - offset) / nested_absmax
//
// Layout: one persistent launch. A thread block takes group after group, a thread one constant, for which it searches
//     256 thresholds in eight halvings; they are exact, as in quantize.cuh.
//
// Shared memory: 5 KiB of table and thresholds, 32 KiB of sums.
//
// Why: every block computes the mean for itself, as a tree over the groups' sums (8 KB for 4096 x 4096, from L2), and
//     sorts the table for itself, so no block waits for another.
#pragma once

#include "cuda/common/reduce.cuh"

namespace qlk::cuda {

struct QuantizeAbsmaxArguments {
    const float* absmax;   // [count]
    const float* table;    // [256]
    double* sums;          // [groups], of each 256 constants
    uint8_t* code;         // [count]
    float* nested_absmax;  // [groups]
    float* offset;         // [1]
    int64_t count;
    int64_t groups;
};

struct QuantizeAbsmaxTraits {
    static constexpr int kThreads = kNestedBlock;
    static constexpr int kWarps = kThreads / 32;
    // Sums of 256 groups' sums: enough for 2^34 weights.
    static constexpr int kMaxPartial = 4096;
    static constexpr int64_t kMaxGroups = static_cast<int64_t>(kMaxPartial) * kNestedBlock;

    struct Shared {
        float value[kNestedBlock];                   // the table as given
        float sorted[kNestedBlock];                  // the table, ascending
        uint32_t code[kNestedBlock];                 // of each sorted entry; the lowest one of equal entries
        float threshold[kNestedBlock];               // for the current group
        uint32_t largest[kWarps];                    // each warp's largest difference, as bits
        double partial[kMaxPartial];                 // sums of 256 groups' sums
        double further[kMaxPartial / kNestedBlock];  // sums of 256 of those
    };
};

// Computes sums[g] for each group of 256, where quantize() hasn't. Grid: a warp for each group.
__global__ void __launch_bounds__(QuantizeAbsmaxTraits::kThreads)
    absmax_sums_kernel(const __grid_constant__ QuantizeAbsmaxArguments a) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int64_t group = static_cast<int64_t>(blockIdx.x) * QuantizeAbsmaxTraits::kWarps + warp;
    if (group >= a.groups) return;
    double value[kNestedBlock / 32];
#pragma unroll
    for (int i = 0; i < kNestedBlock / 32; ++i) {
        const int64_t at = group * kNestedBlock + lane + 32 * i;
        value[i] = at < a.count ? static_cast<double>(load_global(a.absmax + at)) : 0.0;
    }
    const double sum = tree_sum(value);
    if (lane == 0) store_global(a.sums + group, sum);
}

// The sum of all groups' sums, in every thread.
QLK_DEVICE double sum_of_sums(const QuantizeAbsmaxArguments& a, QuantizeAbsmaxTraits::Shared& shared) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    int64_t count = a.groups;
    double* from = shared.further;
    double* to = shared.partial;
    for (bool first = true; first || count > 1; first = false) {
        const int64_t chunks = (count + kNestedBlock - 1) / kNestedBlock;
        for (int64_t chunk = warp; chunk < chunks; chunk += QuantizeAbsmaxTraits::kWarps) {
            double value[kNestedBlock / 32];
#pragma unroll
            for (int i = 0; i < kNestedBlock / 32; ++i) {
                const int64_t at = chunk * kNestedBlock + lane + 32 * i;
                value[i] = at >= count ? 0.0 : first ? load_global(a.sums + at) : load_shared(from + at);
            }
            const double sum = tree_sum(value);
            if (lane == 0) store_shared(to + chunk, sum);
        }
        __syncthreads();
        count = chunks;
        double* const written = to;
        to = from;
        from = written;
    }
    return load_shared(from);
}

// An integer with the order of float32 values.
QLK_DEVICE uint32_t ordered(float value) {
    const uint32_t bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sorts the table by counting, and keeps the lowest code of each value.
QLK_DEVICE void sort_table(const QuantizeAbsmaxArguments& a, QuantizeAbsmaxTraits::Shared& shared) {
    const int self = static_cast<int>(threadIdx.x);
    const float value = load_global(a.table + self) + 0.0f;  // -0 becomes +0
    store_shared(&shared.value[self], value);
    __syncthreads();
    // Compared as integers, so that all ranks differ even with NaN, which nothing here refuses.
    const uint32_t key = ordered(value);
    int rank = 0, lowest = self;
    for (int i = kNestedBlock - 1; i >= 0; --i) {
        const uint32_t other = ordered(load_shared(&shared.value[i]));
        if (other < key || (other == key && i < self)) ++rank;
        if (other == key) lowest = i;
    }
    store_shared(&shared.sorted[rank], value);
    store_shared(&shared.code[rank], static_cast<uint32_t>(lowest));
    __syncthreads();
}

// Grid: any number of blocks; each takes every gridDim.x-th group.
__global__ void __launch_bounds__(QuantizeAbsmaxTraits::kThreads)
    quantize_absmax_kernel(const __grid_constant__ QuantizeAbsmaxArguments a) {
    auto& shared = shared_memory<QuantizeAbsmaxTraits::Shared>();
    const int self = static_cast<int>(threadIdx.x), lane = self % 32, warp = self / 32;

    sort_table(a, shared);
    // The midpoint of two float32 numbers is exact in float64. Between equal entries it is their value: both have one
    // code.
    const double midpoint = self + 1 < kNestedBlock ? (static_cast<double>(load_shared(&shared.sorted[self])) +
                                                       static_cast<double>(load_shared(&shared.sorted[self + 1]))) /
                                                          2
                                                    : static_cast<double>(__uint_as_float(0x7f800000u));
    const float offset = static_cast<float>(sum_of_sums(a, shared) / static_cast<double>(a.count));
    if (blockIdx.x == 0 && self == 0) store_global(a.offset, offset);

    for (int64_t group = blockIdx.x; group < a.groups; group += gridDim.x) {
        const int64_t at = group * kNestedBlock + self;
        const float difference = at < a.count ? __fadd_rn(load_global(a.absmax + at), -offset) : 0.0f;
        uint32_t bits = __float_as_uint(difference) & 0x7fffffffu;
#pragma unroll
        for (int stride = 16; stride > 0; stride /= 2) bits = max(bits, __shfl_xor_sync(kAllLanes, bits, stride));
        if (lane == 0) store_shared(&shared.largest[warp], bits);
        __syncthreads();  // also: all searches in the last group's thresholds are done
        for (int i = 0; i < QuantizeAbsmaxTraits::kWarps; ++i) bits = max(bits, load_shared(&shared.largest[i]));
        const float largest = __uint_as_float(bits);
        store_shared(&shared.threshold[self], __double2float_rd(__dmul_rn(midpoint, static_cast<double>(largest))));
        __syncthreads();

        int position = 0;
        if (largest == 0.0f) {
            // All constants equal the mean: take the entry nearest to zero.
            for (int i = 1; i < kNestedBlock; ++i) {
                if (fabsf(load_shared(&shared.sorted[i])) < fabsf(load_shared(&shared.sorted[position]))) position = i;
            }
        } else {
            for (int step = kNestedBlock / 2; step > 0; step /= 2) {
                if (difference > load_shared(&shared.threshold[position + step - 1])) position += step;
            }
        }
        if (at < a.count) store_global(a.code + at, static_cast<uint8_t>(load_shared(&shared.code[position])));
        if (self == 0) store_global(a.nested_absmax + group, largest);
    }
}

}  // namespace qlk::cuda
