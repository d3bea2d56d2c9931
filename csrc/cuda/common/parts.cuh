// Adds parts of sums that blocks have left in scratch, always in the order of the parts: the same inputs give the same
// bits.
//
// Formula: down = scale * sum of its parts; gradient = sum of its parts, plus what it held with `add`
//
// Layout of adapter_sum_kernel: four neighbours of v or of a gradient a thread, 16 parts under way.
//
// Shared memory: none.
#pragma once

#include "cuda/common/decode.cuh"

namespace qlk::cuda {

// all += `count` parts, in their order. stride: from one part to the next, in float4.
QLK_DEVICE void add_parts(float4& all, const float4* parts, int count, int64_t stride) {
    constexpr int kUnderWay = 16;
#pragma unroll 1
    for (int first = 0; first < count; first += kUnderWay) {
        float4 part[kUnderWay];
#pragma unroll
        for (int i = 0; i < kUnderWay; ++i) {
            part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (first + i < count) part[i] = load_exchanged(parts + (first + i) * stride);
        }
#pragma unroll
        for (int i = 0; i < kUnderWay; ++i) {
            all.x += part[i].x;
            all.y += part[i].y;
            all.z += part[i].z;
            all.w += part[i].w;
        }
    }
}

// Stores scale * all to four neighbours, of which `left` exist. aligned: `to` is aligned for all four.
template <class T>
QLK_DEVICE void store_four(T* to, const float4& all, float scale, int64_t left, bool aligned) {
    const float value[4] = {scale * all.x, scale * all.y, scale * all.z, scale * all.w};
    if (aligned && left >= 4) {
        if constexpr (sizeof(T) == 4) {
            store_global(reinterpret_cast<float4*>(to), make_float4(value[0], value[1], value[2], value[3]));
        } else {
            store_global(reinterpret_cast<uint2*>(to),
                         make_uint2(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3])));
        }
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (e < left) store_global(to + e, from_float<T>(value[e]));
        }
    }
}

// Stores two neighbours, of which `left` exist. aligned: `to` is 8-byte aligned and `left` is even.
QLK_DEVICE void store_two(float* to, float first, float second, int64_t left, bool aligned) {
    if (aligned) {
        if (left > 0) store_global(reinterpret_cast<float2*>(to), make_float2(first, second));
    } else {
        if (left > 0) store_global(to, first);
        if (left > 1) store_global(to + 1, second);
    }
}

// Sizes and strides are in elements. Zero strides: no such sum.
template <class T>
struct AdapterSumArguments {
    const float* down_parts;  // [down_splits][down_stride]
    int64_t down_stride, down_count;
    int down_splits;
    float scale;
    T* down;                      // [down_count]
    bool down_aligned;            // down is 8-byte aligned
    const float* gradient_parts;  // [gradient_splits][gradient_stride]
    int64_t gradient_stride, gradient_count;
    int gradient_splits;
    float* gradient;        // [gradient_count]
    bool gradient_aligned;  // gradient is 16-byte aligned
    bool add;               // add to what `gradient` holds
};

constexpr int kAdapterSumThreads = 256;

// Grid: a thread for each four elements of both.
template <class T>
__global__ void __launch_bounds__(kAdapterSumThreads, 1)
    adapter_sum_kernel(const __grid_constant__ AdapterSumArguments<T> a) {
    griddep_launch();
    int64_t at = (static_cast<int64_t>(blockIdx.x) * kAdapterSumThreads + threadIdx.x) * 4;
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (at < a.down_stride) {
        add_parts(all, reinterpret_cast<const float4*>(a.down_parts + at), a.down_splits, a.down_stride / 4);
        store_four(a.down + at, all, a.scale, a.down_count - at, a.down_aligned);
        return;
    }
    at -= a.down_stride;
    if (at >= a.gradient_stride) return;
    const int64_t left = a.gradient_count - at;
    add_parts(all, reinterpret_cast<const float4*>(a.gradient_parts + at), a.gradient_splits, a.gradient_stride / 4);
    if (a.add) {
        float* const value[4] = {&all.x, &all.y, &all.z, &all.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (e < left) *value[e] += load_exchanged(a.gradient + at + e);
        }
    }
    store_four(a.gradient + at, all, 1.0f, left, a.gradient_aligned);
}

}  // namespace qlk::cuda
