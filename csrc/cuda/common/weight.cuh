// A quantized weight as kernels see it, and how its block constants are decoded.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The parts of a WeightView that decoding needs, passed by value among a launch's parameters, together with the levels:
// kernels read these once, into a register of each lane or into shared memory.
struct DeviceWeight {
    const uint8_t* packed;       // [ceil(n * k / 2)], the first of a pair in the high nibble
    const float* absmax;         // [blocks]; null when the constants are double-quantized
    const uint8_t* absmax_code;  // [blocks]; null when they are not, as are the next three
    const float* nested_absmax;  // [ceil(blocks / 256)]
    const float* nested_table;   // [256]
    const float* nested_offset;  // [1]
    float levels[16];

    static DeviceWeight from(const WeightView& view) {
        DeviceWeight w{view.packed,        view.absmax, view.absmax_code, view.nested_absmax, view.nested_table,
                       view.nested_offset, {}};
        for (int i = 0; i < 16; ++i) w.levels[i] = view.levels.value[i];
        return w;
    }
};

// A block's constant: a rounded multiply, then a rounded add, never fused, as on every backend.
QLK_DEVICE float decode_absmax(const DeviceWeight& w, int64_t block) {
    if (w.absmax) return load_global(w.absmax + block);
    const float entry = load_global(w.nested_table + load_global(w.absmax_code + block));
    return __fadd_rn(__fmul_rn(entry, load_global(w.nested_absmax + block / kNestedBlock)),
                     load_global(w.nested_offset));
}

}  // namespace qlk::cuda
