// The extension _C: each operation reads its params struct from a dict, releases the GIL and makes one call.
#include "bindings/params.h"

#include <pybind11/stl.h>

#include <vector>

#include "cuda/common/dispatch.h"
#include "fp8.h"
#ifdef QLK_CUDA_ARCHS
#include "bindings/cuda.h"
#endif

static void bind_operations(py::module_& m) {
    bind_weight(m);
    m.def("quantize", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = quantize_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        return qlk::cpu::quantize(params);
    });
    m.def("quantize_absmax", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = quantize_absmax_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::quantize_absmax(params);
    });
    m.def("dequantize", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = dequantize_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::dequantize(params);
    });
    m.def("linear_forward", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = linear_forward_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::linear_forward(params);
    });
    m.def("linear_backward", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = linear_backward_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::linear_backward(params);
    });
    m.def("linear_grouped_forward", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = grouped_forward_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::linear_grouped_forward(params);
    });
    m.def("linear_grouped_backward", [](const py::dict& fields) {
        Fields f(fields);
        const auto params = grouped_backward_params(f, Device::kCpu);
        f.end();
        py::gil_scoped_release released;
        qlk::cpu::linear_grouped_backward(params);
    });
}

static void bind_optimizer(py::module_& m) {
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
        py::call_guard<py::gil_scoped_release>());
    m.def("dynamic_map", [](bool is_signed) {
        const qlk::DynamicMap& map = qlk::dynamic_map(is_signed);
        return std::vector<float>(map.value, map.value + 256);
    });
}

static void bind_tables(py::module_& m) {
    m.def("nf4_levels", [] { return std::vector<float>(qlk::kLevels, qlk::kLevels + 16); });
    m.def("e4m3_table", [] {
        std::vector<float> table(256);
        for (int byte = 0; byte < 256; ++byte)
            table[byte] = qlk::e4m3_value(static_cast<uint8_t>(byte)) / qlk::kE4M3Max;
        return table;
    });
}

static py::dict build_info() {
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
}

static py::dict dispatch(int64_t rows, int64_t n, int64_t k, int dtype, bool backward, int architecture,
                         int multiprocessors, size_t shared_bytes) {
    const auto plan = qlk::cuda::plan({rows, n, k, dtype_of(dtype), backward, true, true},
                                      qlk::cuda::Card::capped(architecture, multiprocessors, shared_bytes));
    py::dict chosen;
    chosen["kernel"] = plan.row.name;
    chosen["rows"] = plan.row.rows;
    chosen["columns"] = plan.row.columns;
    chosen["stages"] = plan.row.stages;
    chosen["splits"] = plan.splits;
    chosen["cluster"] = plan.cluster;
    chosen["shared_tiles"] = plan.shared;
    chosen["tiles"] = plan.tiles;
    chosen["whole_tiles"] = plan.whole;
    chosen["row_tiles"] = plan.row_tiles;
    chosen["scratch"] = plan.scratch;
    return chosen;
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of qlora_kernels; called through qlora_kernels.ops.backends.";
    m.attr("__version__") = QLK_VERSION;
    bind_operations(m);
    bind_optimizer(m);
    bind_tables(m);
    m.def("scratch_peak_bytes", &qlk::cpu::scratch_peak_bytes, py::arg("reset") = false,
          "Most bytes of scratch one thread has used since the last reset.");
    m.def("build_info", &build_info);
    m.def("dispatch", &dispatch,
          "Which CUDA kernel multiplies, on a card with these properties (csrc/cuda/common/dispatch.h).");
#ifdef QLK_CUDA_ARCHS
    auto cuda = m.def_submodule("cuda", "The same operations on CUDA devices.");
    cuda.attr("Weight") = m.attr("Weight");
    bind_cuda(cuda);
#endif
}
