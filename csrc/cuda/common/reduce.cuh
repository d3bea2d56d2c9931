// The sum that every backend computes in the same order: float64, 256 values at a time, as a tree of halving strides
// (csrc/cpu/quantize/quantize_absmax.cpp).
#pragma once

#include "cuda/common/weight.cuh"

namespace qlk::cuda {

// The tree sum of 256 values in a warp: lane i brings values i, i + 32, …, i + 224, with zeros past the end. Lane 0
// gets the result.
QLK_DEVICE double tree_sum(double (&value)[kNestedBlock / 32]) {
    constexpr int kCount = kNestedBlock / 32;
#pragma unroll
    for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) value[i] = __dadd_rn(value[i], value[i + half]);
    }
    double sum = value[0];
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) sum = __dadd_rn(sum, __shfl_down_sync(kAllLanes, sum, stride));
    return sum;
}

}  // namespace qlk::cuda
