// The extension _C: each operation reads its params struct from a dict, releases the GIL and makes one call.
#include "bindings/marshal.h"

#include <pybind11/stl.h>

#include <vector>

#include "cuda/common/dispatch.h"
#include "fp8.h"
#ifdef QLK_CUDA_ARCHS
#include "bindings/cuda.h"
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of qlora_kernels; called through qlora_kernels.ops.backends.";
    m.attr("__version__") = QLK_VERSION;
    using Released = py::call_guard<py::gil_scoped_release>;

    bind_weight(m);
    m.def("quantize", [](const py::dict& given) {
        Fields f(given);
        const qlk::QuantizeParams params = {
            f.pointer<const void>("weight"),
            f.pointer<uint8_t>("packed"),
            f.pointer<float>("absmax"),
            f.integer("count"),
            f.dtype("dtype"),
            static_cast<int>(f.integer("threads")),
        };
        f.end();
        py::gil_scoped_release released;
        return qlk::cpu::quantize(params);
    });
    m.def("quantize_absmax", [](const py::dict& given) {
        Fields f(given);
        const qlk::QuantizeAbsmaxParams params = {
            f.pointer<const float>("absmax"),       f.pointer<const float>("table"), f.pointer<uint8_t>("code"),
            f.pointer<float>("nested_absmax"),      f.pointer<float>("offset"),      f.integer("count"),
            static_cast<int>(f.integer("threads")),
        };
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::quantize_absmax(params);
    });
    m.def("dequantize", [](const py::dict& given) {
        Fields f(given);
        const qlk::DequantizeParams params = {
            f.weight("weight"),   f.pointer<void>("out"), f.integer("row_begin"),
            f.integer("row_end"), f.dtype("dtype"),       static_cast<int>(f.integer("threads")),
        };
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::dequantize(params);
    });
    m.def("linear_forward", [](const py::dict& given) {
        Fields f(given);
        const qlk::LinearForwardParams params = {
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
            f.bits("seed"),
            f.dtype("dtype"),
            static_cast<int>(f.integer("threads")),
        };
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::linear_forward(params);
    });
    m.def("linear_backward", [](const py::dict& given) {
        Fields f(given);
        const qlk::LinearBackwardParams params = {
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
            f.bits("seed"),
            f.dtype("dtype"),
            static_cast<int>(f.integer("threads")),
        };
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::linear_backward(params);
    });

    m.def("optimizer_step", [](const py::dict& optimizer, int threads, Address sum_of_squares) {
        const qlk::OptimizerParams params = optimizer_params(optimizer, threads);
        py::gil_scoped_release released;
        qlk::cpu::optimizer_step(params, at<const double>(sum_of_squares));
    });
    m.def("optimizer_sums", [](const py::dict& optimizer, int threads) {
        const qlk::OptimizerParams params = optimizer_params(optimizer, threads);
        py::gil_scoped_release released;
        qlk::cpu::optimizer_sums(params);
    });
    m.def(
        "quantize_states",
        [](Address values, Address code, Address absmax, int64_t count, bool is_signed) {
            qlk::cpu::quantize_states(at<const float>(values), at<uint8_t>(code), at<float>(absmax), count, is_signed);
        },
        Released());
    m.def("dynamic_map", [](bool is_signed) {
        const qlk::DynamicMap& map = qlk::dynamic_map(is_signed);
        return std::vector<float>(map.value, map.value + 256);
    });

    m.def("nf4_levels", [] { return std::vector<float>(qlk::kLevels, qlk::kLevels + 16); });
    m.def("e4m3_table", [] {
        std::vector<float> table(256);
        for (int byte = 0; byte < 256; ++byte)
            table[byte] = qlk::e4m3_value(static_cast<uint8_t>(byte)) / qlk::kE4M3Max;
        return table;
    });
    m.def("scratch_peak_bytes", &qlk::cpu::scratch_peak_bytes, py::arg("reset") = false,
          "Most bytes of scratch one thread has used since the last reset.");
    m.def("build_info", [] {
        py::dict info;
        info["version"] = QLK_VERSION;
        info["compiler"] =
#if defined(__clang__)
            "clang " __clang_version__;
#else
            "gcc " __VERSION__;
#endif
        info["isas_built"] = qlk::cpu::isas_built();
        info["isas_available"] = qlk::cpu::isas_available();
        info["isa_in_use"] = qlk::cpu::isa_in_use();
#ifdef QLK_CUDA_ARCHS
        info["cuda_archs"] = QLK_CUDA_ARCHS;
        info["nvcc"] = QLK_NVCC_VERSION;
#else
        info["cuda_archs"] = "";
#endif
        return info;
    });
    m.def(
        "dispatch",
        [](int64_t rows, int64_t n, int64_t k, int dtype, bool backward, int architecture, int multiprocessors,
           size_t shared_bytes) {
            const auto plan = qlk::cuda::plan({rows, n, k, dtype_of(dtype), backward, true, true},
                                              qlk::cuda::Card::of(architecture, multiprocessors, shared_bytes));
            py::dict chosen;
            chosen["kernel"] = plan.row.name;
            chosen["rows"] = plan.row.rows;
            chosen["columns"] = plan.row.columns;
            chosen["stages"] = plan.row.stages;
            chosen["splits"] = plan.splits;
            chosen["shared_tiles"] = plan.shared;
            chosen["tiles"] = plan.tiles;
            chosen["whole_tiles"] = plan.whole;
            chosen["row_tiles"] = plan.row_tiles;
            chosen["scratch"] = plan.scratch;
            return chosen;
        },
        "Which CUDA kernel multiplies, on a card of these figures (csrc/cuda/common/dispatch.h).");
#ifdef QLK_CUDA_ARCHS
    auto cuda = m.def_submodule("cuda", "The same operations on CUDA devices.");
    cuda.attr("Weight") = m.attr("Weight");
    bind_cuda(cuda);
#endif
}
