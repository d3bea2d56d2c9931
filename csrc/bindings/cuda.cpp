#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <cstring>

#include "bindings/params.h"
#include "cuda/optimizer/arena.h"
#include "cuda/optimizer/optimizer_launch.h"

static qlk::cuda::Stream read_stream(Fields& f) {
    const int device = static_cast<int>(f.integer("device"));
    return {device, f.pointer<void>("stream")};
}

static void quantize(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::QuantizeParams params = quantize_params(f, Device::kCuda);
    auto* sums = f.pointer<double>("sums");
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::quantize(params, sums, stream);
}

static void quantize_absmax(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::QuantizeAbsmaxParams params = quantize_absmax_params(f, Device::kCuda);
    auto* sums = f.pointer<double>("sums");
    const bool summed = f.flag("summed");
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::quantize_absmax(params, sums, summed, stream);
}

static void dequantize(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::DequantizeParams params = dequantize_params(f, Device::kCuda);
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::dequantize(params, stream);
}

static void linear_forward(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::LinearForwardParams params = linear_forward_params(f, Device::kCuda);
    const auto* seed = f.pointer<const int64_t>("seed");
    auto* scratch = f.pointer<void>("scratch");
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::linear_forward(params, seed, scratch, stream);
}

static void linear_backward(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::LinearBackwardParams params = linear_backward_params(f, Device::kCuda);
    const auto* seed = f.pointer<const int64_t>("seed");
    auto* v = f.pointer<void>("v");
    auto* scratch = f.pointer<void>("scratch");
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::linear_backward(params, seed, v, scratch, stream);
}

static void linear_grouped_forward(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::GroupedForwardParams params = grouped_forward_params(f, Device::kCuda);
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::linear_grouped_forward(params, stream);
}

static void linear_grouped_backward(const py::dict& arguments) {
    Fields f(arguments);
    const qlk::GroupedBackwardParams params = grouped_backward_params(f, Device::kCuda);
    auto* v = f.pointer<void>("v");
    const qlk::cuda::Stream stream = read_stream(f);
    f.end();
    py::gil_scoped_release released;
    qlk::cuda::linear_grouped_backward(params, v, stream);
}

static void bind_arena(py::module_& m) {
    using Released = py::call_guard<py::gil_scoped_release>;
    // begin, end, arrive, leave, staged, stays: see csrc/cuda/optimizer/arena.h.
    using Plan = std::vector<
        std::tuple<int64_t, int64_t, qlk::cuda::Intervals, qlk::cuda::Intervals, std::vector<int64_t>, bool>>;
    using qlk::cuda::Arena;
    py::class_<Arena>(m, "Arena", py::module_local())
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
        .def("step",
             [](Arena& a, const py::dict& optimizer, Address maps, bool measure, int device, Address stream) {
                 const qlk::OptimizerParams params = optimizer_params(optimizer, 0);
                 py::gil_scoped_release released;
                 a.step(params, at<const qlk::DynamicMap>(maps), measure, {device, at<void>(stream)});
             })
        .def("page_in", &Arena::page_in, Released())
        .def(
            "page_out", [](Arena& a, int device, Address stream) { a.page_out({device, at<void>(stream)}); },
            Released())
        .def(
            "to_host", [](Arena& a, int device, Address stream) { a.to_host({device, at<void>(stream)}); }, Released())
        .def("wait", &Arena::wait, Released())
        .def_property_readonly("broken", &Arena::broken)
        .def("resident_bytes", &Arena::resident_bytes);
}

void bind_cuda(py::module_ m) {
    if (!py::hasattr(m, "Weight")) bind_weight(m);
    m.def("quantize", &quantize);
    m.def("quantize_absmax", &quantize_absmax);
    m.def("dequantize", &dequantize);
    m.def("linear_forward", &linear_forward);
    m.def("linear_backward", &linear_backward);
    m.def("linear_grouped_forward", &linear_grouped_forward);
    m.def("linear_grouped_backward", &linear_grouped_backward);
    m.def("linear_scratch", [](int64_t m, int64_t n, int64_t k, int64_t r, int dtype, bool wide_a, bool wide_b,
                               bool backward, int device) {
        return qlk::cuda::linear_scratch(m, n, k, r, dtype_of(dtype), wide_a, wide_b, backward, device);
    });
    bind_arena(m);
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
