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
