// Reads each operation's params struct from a dict: one reader for a struct, whichever device it is for.
//
// A reader takes the fields that its device has (kernels.h) and leaves the arguments after them to the caller, who then
// calls f.end().
#pragma once

#include "bindings/marshal.h"

enum class Device { kCpu, kCuda };

// Threads are the CPU's alone.
inline int read_threads(Fields& f, Device device) {
    return device == Device::kCpu ? static_cast<int>(f.integer("threads")) : 0;
}

// The seed of a CUDA operation is read on the device: an argument of its own, not a field.
inline uint64_t read_seed(Fields& f, Device device) { return device == Device::kCpu ? f.bits("seed") : 0; }

inline qlk::QuantizeParams quantize_params(Fields& f, Device device) {
    return {
        f.pointer<const void>("weight"),
        f.pointer<uint8_t>("packed"),
        f.pointer<float>("absmax"),
        f.integer("count"),
        f.dtype("dtype"),
        read_threads(f, device),
    };
}

inline qlk::QuantizeAbsmaxParams quantize_absmax_params(Fields& f, Device device) {
    return {
        f.pointer<const float>("absmax"),  f.pointer<const float>("table"), f.pointer<uint8_t>("code"),
        f.pointer<float>("nested_absmax"), f.pointer<float>("offset"),      f.integer("count"),
        read_threads(f, device),
    };
}

inline qlk::DequantizeParams dequantize_params(Fields& f, Device device) {
    return {
        f.weight("weight"),   f.pointer<void>("out"), f.integer("row_begin"),
        f.integer("row_end"), f.dtype("dtype"),       read_threads(f, device),
    };
}

inline qlk::LinearForwardParams linear_forward_params(Fields& f, Device device) {
    qlk::LinearForwardParams params = {
        f.weight("weight"),
        f.pointer<const void>("x"),
        f.pointer<const void>("lora_a"),
        f.pointer<const void>("lora_b"),
        f.pointer<const float>("bias"),
        f.pointer<void>("y"),
        f.pointer<void>("u"),
        f.integer("m"),
        f.integer("r"),
        static_cast<float>(f.number("scaling")),
        f.number("dropout"),
        read_seed(f, device),
        f.dtype("dtype"),
        read_threads(f, device),
    };
    if (device == Device::kCuda) {
        params.narrow_bias = f.pointer<const void>("narrow_bias");
        params.wide_a = f.flag("wide_a");
        params.wide_b = f.flag("wide_b");
    }
    return params;
}

inline qlk::LinearBackwardParams linear_backward_params(Fields& f, Device device) {
    qlk::LinearBackwardParams params = {
        f.weight("weight"),
        f.pointer<const void>("dy"),
        f.pointer<const void>("x"),
        f.pointer<const void>("u"),
        f.pointer<const void>("lora_a"),
        f.pointer<const void>("lora_b"),
        f.pointer<void>("dx"),
        f.pointer<float>("da"),
        f.pointer<float>("db"),
        f.integer("m"),
        f.integer("r"),
        static_cast<float>(f.number("scaling")),
        f.number("dropout"),
        read_seed(f, device),
        f.dtype("dtype"),
        read_threads(f, device),
    };
    if (device == Device::kCuda) {
        params.wide_a = f.flag("wide_a");
        params.wide_b = f.flag("wide_b");
        params.narrow_da = f.pointer<void>("narrow_da");
        params.narrow_db = f.pointer<void>("narrow_db");
    }
    return params;
}

// A stack's params: those of its first expert, then offsets and experts.
inline qlk::GroupedForwardParams grouped_forward_params(Fields& f, Device device) {
    const qlk::LinearForwardParams first = linear_forward_params(f, device);
    const auto* offsets = f.pointer<const int64_t>("offsets");
    return {first, offsets, f.integer("experts")};
}

inline qlk::GroupedBackwardParams grouped_backward_params(Fields& f, Device device) {
    const qlk::LinearBackwardParams first = linear_backward_params(f, device);
    const auto* offsets = f.pointer<const int64_t>("offsets");
    return {first, offsets, f.integer("experts")};
}

// Reads the whole dict. threads: an argument of its own in Python too.
inline qlk::OptimizerParams optimizer_params(const py::dict& fields, int threads) {
    Fields f(fields);
    const int64_t algorithm = f.integer("algorithm");
    QLK_CHECK(algorithm == 0 || algorithm == 1, "unknown optimizer " + std::to_string(algorithm));
    const qlk::OptimizerParams params = {
        static_cast<qlk::Algorithm>(algorithm),
        static_cast<int>(f.integer("state_bits")),
        f.pointer<const qlk::OptimizerChunk>("chunks"),
        f.integer("all_chunks"),
        f.pointer<const qlk::OptimizerTensor>("tensors"),
        f.integer("tensor_count"),
        f.pointer<const qlk::OptimizerGroup>("groups"),
        f.pointer<qlk::OptimizerControl>("control"),
        f.pointer<float>("steps"),
        f.pointer<double>("partial"),
        f.pointer<unsigned char>("header"),
        f.pointer<unsigned char>("states"),
        f.pointer<const float>("grad_scale"),
        f.pointer<const float>("found_inf"),
        f.number("max_grad_norm"),
        f.flag("skip_nonfinite"),
        threads,
    };
    f.end();
    return params;
}
