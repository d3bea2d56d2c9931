// A layer's bias: float32, or in the result's type, or none.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

template <class T>
struct Bias {
    const float* wide;  // [n] or null
    const T* narrow;    // [n], used instead, or null

    QLK_DEVICE bool any() const { return wide || narrow; }
    QLK_DEVICE float at(int64_t column) const {
        if (narrow) return to_float(load_global(narrow + column));
        return wide ? load_global(wide + column) : 0.0f;
    }
};

}  // namespace qlk::cuda
