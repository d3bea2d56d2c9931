// What the pybind11 files have in common: addresses as integers, a weight as a tuple.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "error.h"
#include "kernels.h"

namespace py = pybind11;
using Address = uintptr_t;
// packed, absmax, absmax_code, nested_absmax, nested_table, nested_offset, n, k
using Weight = std::tuple<Address, Address, Address, Address, Address, Address, int64_t, int64_t>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline qlk::WeightView weight_view(const Weight& w) {
    return {at<const uint8_t>(std::get<0>(w)),
            at<const float>(std::get<1>(w)),
            at<const uint8_t>(std::get<2>(w)),
            at<const float>(std::get<3>(w)),
            at<const float>(std::get<4>(w)),
            at<const float>(std::get<5>(w)),
            std::get<6>(w),
            std::get<7>(w)};
}

inline qlk::DType dtype_of(int code) {
    QLK_CHECK(code >= 0 && code <= 2, "unknown dtype code " + std::to_string(code));
    return static_cast<qlk::DType>(code);
}

// algorithm, state_bits, chunks, all_chunks, tensors, tensor_count, groups, control, steps, partial, header, states,
// grad_scale, found_inf, max_grad_norm, skip_nonfinite
using Optimizer = std::tuple<int, int, Address, int64_t, Address, int64_t, Address, Address, Address, Address, Address,
                             Address, Address, Address, double, bool>;

inline qlk::OptimizerParams optimizer_params(const Optimizer& o, int threads) {
    QLK_CHECK(std::get<0>(o) == 0 || std::get<0>(o) == 1, "unknown optimizer " + std::to_string(std::get<0>(o)));
    return {static_cast<qlk::Algorithm>(std::get<0>(o)),
            std::get<1>(o),
            at<const qlk::OptimizerChunk>(std::get<2>(o)),
            std::get<3>(o),
            at<const qlk::OptimizerTensor>(std::get<4>(o)),
            std::get<5>(o),
            at<const qlk::OptimizerGroup>(std::get<6>(o)),
            at<qlk::OptimizerControl>(std::get<7>(o)),
            at<float>(std::get<8>(o)),
            at<double>(std::get<9>(o)),
            at<unsigned char>(std::get<10>(o)),
            at<unsigned char>(std::get<11>(o)),
            at<const float>(std::get<12>(o)),
            at<const float>(std::get<13>(o)),
            std::get<14>(o),
            std::get<15>(o),
            threads};
}
