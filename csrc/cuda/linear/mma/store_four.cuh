// Results of a product, four neighbours at a time.
#pragma once

#include "cuda/common/decode.cuh"
#include "cuda/linear/mma/tiles_layout.cuh"

namespace qlk::cuda {

// Adds the bias, if kBias, rounds, and writes four sums of a row of the result, [m, columns], from `column` on, a
// multiple of 4. What lies outside is not written.
template <bool kBias, class T>
QLK_DEVICE void store_four(const GemmArguments<T>& a, int64_t columns, int64_t row, int64_t column,
                           const float4& sums) {
    if (row >= a.m || column >= columns) return;
    float out[4] = {sums.x, sums.y, sums.z, sums.w};
    if constexpr (kBias) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[e] += column + e < columns ? a.bias.at(column + e) : 0.0f;
    }
    T* const to = a.out + row * columns + column;
    if (a.out_aligned) {
        store_global(reinterpret_cast<uint2*>(to),
                     make_uint2(pack_pair<T>(out[0], out[1]), pack_pair<T>(out[2], out[3])));
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (column + e < columns) store_global(to + e, from_float<T>(out[e]));
        }
    }
}

}  // namespace qlk::cuda
