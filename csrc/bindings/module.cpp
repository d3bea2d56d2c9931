// The extension _C: ints and floats in, one params struct out, one call. The GIL is released around each.
#include "bindings/marshal.h"

#include <pybind11/stl.h>

#include <vector>

#include "cuda/linear/dispatch.h"
#include "fp8.h"
#ifdef QLK_CUDA_ARCHS
#include "bindings/cuda.h"
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of qlora_kernels; called through qlora_kernels.backends.";
    m.attr("__version__") = QLK_VERSION;
    using Released = py::call_guard<py::gil_scoped_release>;

    m.def(
        "quantize",
        [](Address weight, Address packed, Address absmax, int64_t count, int dtype, int threads) {
            return qlk::cpu::quantize(
                {at<const void>(weight), at<uint8_t>(packed), at<float>(absmax), count, dtype_of(dtype), threads});
        },
        Released());
    m.def(
        "quantize_absmax",
        [](Address absmax, Address table, Address code, Address nested_absmax, Address offset, int64_t count,
           int threads) {
            qlk::cpu::quantize_absmax({at<const float>(absmax), at<const float>(table), at<uint8_t>(code),
                                       at<float>(nested_absmax), at<float>(offset), count, threads});
        },
        Released());
    m.def(
        "dequantize",
        [](const Weight& weight, Address out, int64_t row_begin, int64_t row_end, int dtype, int threads) {
            qlk::cpu::dequantize({weight_view(weight), at<void>(out), row_begin, row_end, dtype_of(dtype), threads});
        },
        Released());
    m.def(
        "linear_forward",
        [](const Weight& weight, Address x, Address lora_a, Address lora_b, Address bias, Address y, Address u,
           int64_t rows, int64_t r, float scaling, double dropout, uint64_t seed, int dtype, int threads) {
            qlk::cpu::linear_forward({weight_view(weight), at<const void>(x), at<const void>(lora_a),
                                      at<const void>(lora_b), at<const float>(bias), at<void>(y), at<void>(u), rows, r,
                                      scaling, dropout, seed, dtype_of(dtype), threads});
        },
        Released());
    m.def(
        "linear_backward",
        [](const Weight& weight, Address dy, Address x, Address u, Address lora_a, Address lora_b, Address dx,
           Address da, Address db, int64_t rows, int64_t r, float scaling, double dropout, uint64_t seed, int dtype,
           int threads) {
            qlk::cpu::linear_backward({weight_view(weight), at<const void>(dy), at<const void>(x), at<const void>(u),
                                       at<const void>(lora_a), at<const void>(lora_b), at<void>(dx), at<float>(da),
                                       at<float>(db), rows, r, scaling, dropout, seed, dtype_of(dtype), threads});
        },
        Released());

    m.def(
        "optimizer_step",
        [](const Optimizer& optimizer, int threads, Address sum_of_squares) {
            qlk::cpu::optimizer_step(optimizer_params(optimizer, threads), at<const double>(sum_of_squares));
        },
        Released());
    m.def(
        "optimizer_sums",
        [](const Optimizer& optimizer, int threads) { qlk::cpu::optimizer_sums(optimizer_params(optimizer, threads)); },
        Released());
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
        "Which CUDA kernel multiplies, on a card of these figures (csrc/cuda/linear/dispatch.h).");
#ifdef QLK_CUDA_ARCHS
    bind_cuda(m.def_submodule("cuda", "The same operations on CUDA devices."));
#endif
}
