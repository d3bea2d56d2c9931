// Casts between float32 adapters or gradients and x's 16-bit type.
//
// Formula: to[i] = round_to_T(from[i]), to nearest, ties to even, as a cast by torch rounds.
//
// Layout: up to two tensors a launch, four neighbours a thread. Casts by torch, one for each tensor, would cost the
//     host two launches and two allocations more.
//
// Shared memory: none.
//
// Why a launch of its own: the kernels copy adapters asynchronously, which cannot convert, so each would need a second
//     way to load; and many blocks would convert the same elements. This launch reads the adapters once, a few hundred
//     KiB that are then in L2. Reasoned, not measured on a card.
#pragma once

#include "cuda/common/decode.cuh"

namespace qlk::cuda {

// T: bf16 or fp16.
template <class T>
struct NarrowArguments {
    struct Span {
        const float* from;  // [count]
        T* to;              // [count]
        int64_t count;      // elements
        bool aligned;       // from is 16-byte aligned, to 8-byte
    };
    Span first, second;
};

constexpr int kNarrowThreads = 256;

// Four neighbours a thread, from the first tensor or the second.
// Grid: a thread for each four elements of either.
template <class T>
__global__ void __launch_bounds__(kNarrowThreads, 1) narrow_kernel(const __grid_constant__ NarrowArguments<T> a) {
    int64_t at = (static_cast<int64_t>(blockIdx.x) * kNarrowThreads + threadIdx.x) * 4;
    const int64_t before = (a.first.count + 3) / 4 * 4;
    const bool second = at >= before;
    const auto& span = second ? a.second : a.first;
    if (second) at -= before;
    if (span.aligned && at + 4 <= span.count) {
        const float4 four = load_global(reinterpret_cast<const float4*>(span.from + at));
        store_global(reinterpret_cast<uint2*>(span.to + at),
                     make_uint2(pack_pair<T>(four.x, four.y), pack_pair<T>(four.z, four.w)));
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (at + e < span.count) store_global(span.to + at + e, from_float<T>(load_global(span.from + at + e)));
    }
}

}  // namespace qlk::cuda
