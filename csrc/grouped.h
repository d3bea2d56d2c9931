// One expert's params out of a stack's (kernels.h), for both kinds of device.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace qlk {

// Bytes of `count` elements.
constexpr int64_t bytes_of(int64_t count, DType dtype) { return count * (dtype == DType::kFloat32 ? 4 : 2); }

// The address `bytes` further on, or null.
template <class T>
T* further(T* address, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return address == nullptr ? nullptr : reinterpret_cast<T*>(reinterpret_cast<Byte*>(address) + bytes);
}

inline WeightView expert_of(const WeightView& first, int64_t expert) {
    const int64_t blocks = (first.n * first.k + kBlock - 1) / kBlock;
    const int64_t groups = (blocks + kNestedBlock - 1) / kNestedBlock;
    WeightView w = first;
    w.packed = further(w.packed, expert * ((first.n * first.k + 1) / 2));
    w.absmax = further(w.absmax, expert * blocks * static_cast<int64_t>(sizeof(float)));
    w.absmax_code = further(w.absmax_code, expert * blocks);
    w.nested_absmax = further(w.nested_absmax, expert * groups * static_cast<int64_t>(sizeof(float)));
    w.nested_offset = further(w.nested_offset, expert * static_cast<int64_t>(sizeof(float)));
    return w;
}

inline LinearForwardParams expert_of(const GroupedForwardParams& all, int64_t expert) {
    LinearForwardParams p = all.first;
    const int64_t n = p.weight.n, k = p.weight.k, row = all.offsets[expert];
    p.weight = expert_of(p.weight, expert);
    p.x = further(p.x, bytes_of(row * k, p.dtype));
    p.lora_a = further(p.lora_a, bytes_of(expert * p.r * k, p.dtype));
    p.lora_b = further(p.lora_b, bytes_of(expert * n * p.r, p.dtype));
    p.bias = further(p.bias, bytes_of(expert * n, DType::kFloat32));
    p.y = further(p.y, bytes_of(row * n, p.dtype));
    p.u = further(p.u, bytes_of(row * p.r, p.dtype));
    p.m = all.offsets[expert + 1] - row;
    return p;
}

inline LinearBackwardParams expert_of(const GroupedBackwardParams& all, int64_t expert) {
    LinearBackwardParams p = all.first;
    const int64_t n = p.weight.n, k = p.weight.k, row = all.offsets[expert];
    p.weight = expert_of(p.weight, expert);
    p.dy = further(p.dy, bytes_of(row * n, p.dtype));
    p.x = further(p.x, bytes_of(row * k, p.dtype));
    p.u = further(p.u, bytes_of(row * p.r, p.dtype));
    p.lora_a = further(p.lora_a, bytes_of(expert * p.r * k, p.dtype));
    p.lora_b = further(p.lora_b, bytes_of(expert * n * p.r, p.dtype));
    p.dx = further(p.dx, bytes_of(row * k, p.dtype));
    p.da = further(p.da, bytes_of(expert * p.r * k, DType::kFloat32));
    p.db = further(p.db, bytes_of(expert * n * p.r, DType::kFloat32));
    p.m = all.offsets[expert + 1] - row;
    return p;
}

}  // namespace qlk
