// What a step has to know about all gradients before it starts: their norm, and whether the step is skipped.
//
// Formula: sum_of_squares = sum of g * g in float64; norm = sqrt(sum_of_squares) * coefficient; coefficient = 1 /
//     grad_scale, times min(1, max_grad_norm / (norm + 1e-6)) where gradients are clipped.
//
// Layout: a block for each chunk; the last block to finish adds the chunks' sums, always in the same order. Without a
//     norm one block passes on what a gradient scaler says.
//
// Shared memory: 80 bytes, a float64 sum for each warp.
//
// Why on the device: the next kernel reads the result there, so nothing waits for the host and a graph can capture it.
#pragma once

#include "cuda/optimizer/elements.cuh"

namespace qlk::cuda {

struct OptimizerNormShared {
    double sum[kOptimizerThreads / 32];
    int last;
};

// This thread's part of a chunk's sum of squares.
template <class T>
QLK_DEVICE double sum_of_squares(const T* values, int count) {
    constexpr int kCount = 16 / static_cast<int>(sizeof(T));
    const bool wide = reinterpret_cast<uintptr_t>(values) % 16 == 0;
    double sum = 0.0;
    for (int at = static_cast<int>(threadIdx.x) * kCount; at < count; at += kOptimizerThreads * kCount) {
        alignas(16) T row[kCount];
        load_row(values + at, wide && count - at >= kCount, count - at, row);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const double value = static_cast<double>(to_float(row[i]));
            sum = __dadd_rn(sum, __dmul_rn(value, value));
        }
    }
    return sum;
}

// The sum of all threads' values, always in the same order. Only thread 0 gets it. Two calls need a barrier between
// them.
QLK_DEVICE double block_sum(double value, OptimizerNormShared& shared) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) value = __dadd_rn(value, __shfl_down_sync(kAllLanes, value, stride));
    if (lane == 0) store_shared(&shared.sum[warp], value);
    __syncthreads();
    if (threadIdx.x != 0) return 0.0;
    double sum = 0.0;
    for (int i = 0; i < kOptimizerThreads / 32; ++i) sum = __dadd_rn(sum, load_shared(&shared.sum[i]));
    return sum;
}

// Grid: a block for each chunk, or one when there is no norm to compute.
__global__ void __launch_bounds__(kOptimizerThreads, 1)
    optimizer_norm_kernel(const __grid_constant__ OptimizerArguments a) {
    auto& shared = shared_memory<OptimizerNormShared>();
    OptimizerControl& control = *a.p.control;
    const bool sums = a.p.max_grad_norm > 0.0 || a.p.skip_nonfinite;
    double sum = 0.0;
    if (sums) {
        const bool any = blockIdx.x < a.p.all_chunks;
        const OptimizerChunk chunk = any ? a.p.chunks[blockIdx.x] : OptimizerChunk{};
        const uint64_t grad = any ? load_global(&a.p.tensors[chunk.tensor].grad) : 0;
        if (grad != 0) {
            const ChunkType<true> type(chunk);
            if (type.is_float) {
                sum = sum_of_squares(reinterpret_cast<const float*>(grad) + chunk.first, chunk.count);
            } else if (type.is_bf16) {
                sum = sum_of_squares(reinterpret_cast<const bf16*>(grad) + chunk.first, chunk.count);
            } else {
                sum = sum_of_squares(reinterpret_cast<const fp16*>(grad) + chunk.first, chunk.count);
            }
        }
        sum = block_sum(sum, shared);
        if (threadIdx.x == 0) {
            store_exchanged(a.p.partial + blockIdx.x, sum);
            fence_acq_rel();
            const uint32_t before = atom_add_acquire(&control.arrived, 1u);
            store_shared(&shared.last, before == gridDim.x - 1 ? 1 : 0);
        }
        __syncthreads();
        if (load_shared(&shared.last) == 0) return;
        sum = 0.0;
        for (int64_t i = threadIdx.x; i < gridDim.x; i += kOptimizerThreads) {
            sum = __dadd_rn(sum, load_exchanged(a.p.partial + i));
        }
        sum = block_sum(sum, shared);
    }
    if (threadIdx.x != 0) return;
    float coefficient = 1.0f;
    if (a.p.grad_scale) {
        coefficient = __double2float_rn(__ddiv_rn(1.0, static_cast<double>(load_global(a.p.grad_scale))));
    }
    bool skip = a.p.found_inf && load_global(a.p.found_inf) != 0.0f;
    if (sums) {
        const float norm = __fmul_rn(__double2float_rn(__dsqrt_rn(sum)), coefficient);
        store_global(&control.sum_of_squares, sum);
        store_global(&control.norm, norm);
        if (a.p.skip_nonfinite && !(sum <= 1.7976931348623157e308)) skip = true;
        if (a.p.max_grad_norm > 0.0) {
            // torch.nn.utils.clip_grad_norm_
            const float clip = __fdiv_rn(__double2float_rn(a.p.max_grad_norm), __fadd_rn(norm, 1e-6f));
            coefficient = __fmul_rn(coefficient, clip > 1.0f ? 1.0f : clip);
        }
        store_global(&control.arrived, 0u);
    }
    store_global(&control.coefficient, coefficient);
    store_global(&control.skip, skip ? 1u : 0u);
}

}  // namespace qlk::cuda
