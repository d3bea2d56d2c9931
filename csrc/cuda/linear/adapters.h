// Launches the layer's low-rank products on tensor cores, where the card and the type have them (adapters.cuh).
#pragma once

#include "cuda/common/dropout.cuh"
#include "kernels.h"

namespace qlk::cuda {

// Each returns whether it has launched the product. If not, the caller has to compute all of it. scratch:
// adapter_scratch bytes. T: bf16 or fp16; for float the answer is always no. start: kFollowed or kInOrder, for the
// launch that makes u or v, if it is the last one.

// u [m, r] = scale * mask(x [m, k]) lora_a [r, k]^T
template <class T>
bool adapter_down(const T* x, const T* lora_a, T* u, int64_t m, int64_t k, int64_t r, float scale,
                  const Dropout& dropout, void* scratch, const Stream& stream, Start start);

// v [m, r] = scale * dy [m, n] lora_b [n, r], db [n, r] = dy^T u [m, r]; v or db may be null.
template <class T>
bool adapter_up_gradient(const T* dy, const T* lora_b, const T* u, T* v, float* db, int64_t m, int64_t n, int64_t r,
                         float scale, void* scratch, const Stream& stream, Start start);

// da [r, k] = v [m, r]^T mask(x [m, k])
template <class T>
bool adapter_down_gradient(const T* x, const T* v, float* da, int64_t m, int64_t k, int64_t r, const Dropout& dropout,
                           void* scratch, const Stream& stream);

// Bytes of scratch that these need: adapter_down, or the other two with `backward`.
int64_t adapter_scratch(int64_t m, int64_t n, int64_t k, int64_t r, DType dtype, bool backward, int device);

}  // namespace qlk::cuda
