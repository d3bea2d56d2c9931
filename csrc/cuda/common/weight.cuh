// A quantized weight as kernels see it, and the decoding of its block constants.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The pieces of a WeightView that decoding needs, by value in the launch's parameters, with the levels beside them:
// kernels take the levels from there, once, into a register of each lane or into shared memory.
struct DeviceWeight {
    const uint8_t* packed;
    const float* absmax;         // null when the constants are double-quantized
    const uint8_t* absmax_code;  // null when they are not
    const float* nested_absmax;
    const float* nested_table;
    const float* nested_offset;
    float levels[16];

    static DeviceWeight of(const WeightView& view) {
        DeviceWeight w{view.packed,        view.absmax, view.absmax_code, view.nested_absmax, view.nested_table,
                       view.nested_offset, {}};
        for (int i = 0; i < 16; ++i) w.levels[i] = kLevels[i];
        return w;
    }
};

// The constant of a block: a rounded multiply, then a rounded add, never fused, as on every backend.
QLK_DEVICE float decode_absmax(const DeviceWeight& w, int64_t block) {
    if (w.absmax) return load_global(w.absmax + block);
    const float entry = load_global(w.nested_table + load_global(w.absmax_code + block));
    return __fadd_rn(__fmul_rn(entry, load_global(w.nested_absmax + block / kNestedBlock)),
                     load_global(w.nested_offset));
}

}  // namespace qlk::cuda
