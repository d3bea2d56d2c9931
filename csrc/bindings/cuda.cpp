#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <cstring>

#include "bindings/marshal.h"
#include "cuda/optimizer/arena.h"
#include "cuda/optimizer/optimizer_launch.h"

// Of lora_A (0) or lora_B (1), and of its gradient: bits of `wide` say so where x is not float32 itself.
static bool is_wide(int wide, int which, int dtype) {
    return dtype == static_cast<int>(qlk::DType::kFloat32) || (wide >> which & 1) != 0;
}

void bind_cuda(py::module_ m) {
    using Released = py::call_guard<py::gil_scoped_release>;
    m.def(
        "quantize",
        [](Address weight, Address packed, Address absmax, Address sums, int64_t count, int dtype, int device,
           Address stream) {
            qlk::cuda::quantize(
                {at<const void>(weight), at<uint8_t>(packed), at<float>(absmax), count, dtype_of(dtype), 0},
                at<double>(sums), {device, at<void>(stream)});
        },
        Released());
    m.def(
        "quantize_absmax",
        [](Address absmax, Address table, Address code, Address nested_absmax, Address offset, int64_t count,
           Address sums, bool summed, int device, Address stream) {
            qlk::cuda::quantize_absmax({at<const float>(absmax), at<const float>(table), at<uint8_t>(code),
                                        at<float>(nested_absmax), at<float>(offset), count, 0},
                                       at<double>(sums), summed, {device, at<void>(stream)});
        },
        Released());
    m.def(
        "dequantize",
        [](const Weight& weight, Address out, int64_t row_begin, int64_t row_end, int dtype, int device,
           Address stream) {
            qlk::cuda::dequantize({weight_view(weight), at<void>(out), row_begin, row_end, dtype_of(dtype), 0},
                                  {device, at<void>(stream)});
        },
        Released());
    m.def(
        "linear_forward",
        [](const Weight& weight, Address x, Address lora_a, Address lora_b, Address bias, Address narrow_bias,
           Address y, Address u, int64_t rows, int64_t r, float scaling, double dropout, Address seed, Address scratch,
           int dtype, int wide, int device, Address stream) {
            qlk::cuda::linear_forward(
                {weight_view(weight), at<const void>(x), at<const void>(lora_a), at<const void>(lora_b),
                 at<const float>(bias), at<void>(y), at<void>(u), rows, r, scaling, dropout, 0, dtype_of(dtype), 0,
                 at<const void>(narrow_bias), is_wide(wide, 0, dtype), is_wide(wide, 1, dtype)},
                at<const int64_t>(seed), at<void>(scratch), {device, at<void>(stream)});
        },
        Released());
    m.def(
        "linear_backward",
        [](const Weight& weight, Address dy, Address x, Address u, Address lora_a, Address lora_b, Address dx,
           Address da, Address db, Address v, int64_t rows, int64_t r, float scaling, double dropout, Address seed,
           Address scratch, int dtype, int wide, int device, Address stream) {
            const bool wide_a = is_wide(wide, 0, dtype), wide_b = is_wide(wide, 1, dtype);
            qlk::cuda::linear_backward({weight_view(weight),
                                        at<const void>(dy),
                                        at<const void>(x),
                                        at<const void>(u),
                                        at<const void>(lora_a),
                                        at<const void>(lora_b),
                                        at<void>(dx),
                                        at<float>(wide_a ? da : 0),
                                        at<float>(wide_b ? db : 0),
                                        rows,
                                        r,
                                        scaling,
                                        dropout,
                                        0,
                                        dtype_of(dtype),
                                        0,
                                        wide_a,
                                        wide_b,
                                        at<void>(wide_a ? 0 : da),
                                        at<void>(wide_b ? 0 : db)},
                                       at<const int64_t>(seed), at<void>(v), at<void>(scratch),
                                       {device, at<void>(stream)});
        },
        Released());
    m.def("linear_scratch",
          [](int64_t rows, int64_t n, int64_t k, int64_t r, int dtype, int wide, bool backward, int device) {
              return qlk::cuda::linear_scratch(rows, n, k, r, dtype_of(dtype), is_wide(wide, 0, dtype),
                                               is_wide(wide, 1, dtype), backward, device);
          });

    // begin, end, arrive, leave, staged, stays: see csrc/cuda/optimizer/arena.h.
    using Plan = std::vector<
        std::tuple<int64_t, int64_t, qlk::cuda::Intervals, qlk::cuda::Intervals, std::vector<int64_t>, bool>>;
    using qlk::cuda::Arena;
    py::class_<Arena>(m, "Arena")
        .def(py::init<int64_t, int64_t, int64_t, int>(), py::arg("bytes"), py::arg("header"), py::arg("staging"),
             py::arg("device"), Released())
        .def_property_readonly("header", [](const Arena& a) { return reinterpret_cast<Address>(a.header()); })
        .def_property_readonly("states", [](const Arena& a) { return reinterpret_cast<Address>(a.states()); })
        .def_property_readonly("base", [](const Arena& a) { return reinterpret_cast<Address>(a.base()); })
        .def(
            "plan",
            [](Arena& a, const Plan& plan) {
                std::vector<qlk::cuda::Stretch> stretches;
                for (const auto& [begin, end, arrive, leave, staged, stays] : plan) {
                    QLK_CHECK(staged.empty() || staged.size() == arrive.size(), "a place for each interval");
                    stretches.push_back({begin, end, arrive, leave, staged, stays});
                }
                a.plan(std::move(stretches));
            },
            Released())
        .def(
            "step",
            [](Arena& a, const Optimizer& optimizer, Address maps, bool measure, int device, Address stream) {
                a.step(optimizer_params(optimizer, 0), at<const qlk::DynamicMap>(maps), measure,
                       {device, at<void>(stream)});
            },
            Released())
        .def("page_in", &Arena::page_in, Released())
        .def(
            "page_out", [](Arena& a, int device, Address stream) { a.page_out({device, at<void>(stream)}); },
            Released())
        .def(
            "to_host", [](Arena& a, int device, Address stream) { a.to_host({device, at<void>(stream)}); }, Released())
        .def("wait", &Arena::wait, Released())
        .def_property_readonly("broken", &Arena::broken)
        .def("resident_bytes", &Arena::resident_bytes);
    m.def("free_memory", &qlk::cuda::free_bytes, "Bytes that a device has left.");
    m.def("pages_managed", &qlk::cuda::can_page, "Whether a device and the host may use managed memory together.");
    m.def("dynamic_maps", [] {
        // As the kernels read them: signed, then unsigned.
        std::string bytes(2 * sizeof(qlk::DynamicMap), '\0');
        std::memcpy(bytes.data(), &qlk::dynamic_map(true), sizeof(qlk::DynamicMap));
        std::memcpy(bytes.data() + sizeof(qlk::DynamicMap), &qlk::dynamic_map(false), sizeof(qlk::DynamicMap));
        return py::bytes(bytes);
    });
}
