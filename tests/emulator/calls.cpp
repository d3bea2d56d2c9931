#include "calls.h"

#include <algorithm>

#include "bindings/params.h"
#include "operands.h"

namespace {

using emu::Operands;

size_t size_of(int64_t count, size_t element) { return static_cast<size_t>(count) * element; }
size_t size_of(int64_t count, qlk::DType dtype) { return size_of(count, dtype == qlk::DType::kFloat32 ? 4 : 2); }

void weight(Operands& all, const qlk::WeightView& w, int64_t experts = 1) {
    const int64_t blocks = (w.n * w.k + qlk::kBlock - 1) / qlk::kBlock;
    const int64_t groups = (blocks + qlk::kNestedBlock - 1) / qlk::kNestedBlock;
    all.reads("packed", w.packed, size_of(experts * ((w.n * w.k + 1) / 2), 1));
    all.reads("absmax", w.absmax, size_of(experts * blocks, 4));
    all.reads("absmax_code", w.absmax_code, size_of(experts * blocks, 1));
    all.reads("nested_absmax", w.nested_absmax, size_of(experts * groups, 4));
    all.reads("nested_table", w.nested_table, size_of(256, 4));
    all.reads("nested_offset", w.nested_offset, size_of(experts, 4));
}

void quantize(Operands& all, Fields& f) {
    const qlk::QuantizeParams p = quantize_params(f, Device::kCuda);
    const int64_t blocks = (p.count + qlk::kBlock - 1) / qlk::kBlock;
    all.reads("weight", p.weight, size_of(p.count, p.dtype));
    all.writes("packed", p.packed, size_of((p.count + 1) / 2, 1));
    all.writes("absmax", p.absmax, size_of(blocks, 4));
    all.writes("sums", f.pointer<double>("sums"),
               size_of((blocks + qlk::kNestedBlock - 1) / qlk::kNestedBlock, sizeof(double)));
}

void quantize_absmax(Operands& all, Fields& f) {
    const qlk::QuantizeAbsmaxParams p = quantize_absmax_params(f, Device::kCuda);
    const int64_t groups = (p.count + qlk::kNestedBlock - 1) / qlk::kNestedBlock;
    const auto* const sums = f.pointer<double>("sums");
    const bool summed = f.flag("summed");
    all.reads("absmax", p.absmax, size_of(p.count, 4));
    all.reads("table", p.table, size_of(256, 4));
    all.writes("code", p.code, size_of(p.count, 1));
    all.writes("nested_absmax", p.nested_absmax, size_of(groups, 4));
    all.writes("offset", p.offset, 4);
    const size_t bytes = size_of(groups, sizeof(double));
    summed ? all.reads("sums", sums, bytes) : all.writes("sums", sums, bytes);
}

void dequantize(Operands& all, Fields& f) {
    const qlk::DequantizeParams p = dequantize_params(f, Device::kCuda);
    weight(all, p.weight);
    all.writes("out", p.out, size_of((p.row_end - p.row_begin) * p.weight.k, p.dtype));
}

// The operands that forward and backward share. The next fields are scratch and the device.
template <class Params>
void layer(Operands& all, const Params& p, const int64_t* seed, bool backward, Fields& f) {
    const int64_t n = p.weight.n, k = p.weight.k;
    weight(all, p.weight);
    all.reads("x", p.x, size_of(p.m * k, p.dtype));
    all.reads("lora_a", p.lora_a, size_of(p.r * k, p.wide_a ? qlk::DType::kFloat32 : p.dtype));
    all.reads("lora_b", p.lora_b, size_of(n * p.r, p.wide_b ? qlk::DType::kFloat32 : p.dtype));
    all.reads("seed", seed, sizeof(int64_t));
    void* const scratch = f.pointer<void>("scratch");
    const int device = static_cast<int>(f.integer("device"));
    const int64_t bytes = qlk::cuda::linear_scratch(p.m, n, k, p.r, p.dtype, p.wide_a, p.wide_b, backward, device);
    all.writes("scratch", scratch, size_of(bytes, 1));
}

void linear_forward(Operands& all, Fields& f) {
    const qlk::LinearForwardParams p = linear_forward_params(f, Device::kCuda);
    const auto* const seed = f.pointer<const int64_t>("seed");
    const int64_t n = p.weight.n;
    all.reads("bias", p.bias, size_of(n, 4));
    all.reads("narrow_bias", p.narrow_bias, size_of(n, p.dtype));
    all.writes("y", p.y, size_of(p.m * n, p.dtype));
    all.writes("u", p.u, size_of(p.m * p.r, p.dtype));
    layer(all, p, seed, false, f);
}

void linear_backward(Operands& all, Fields& f) {
    const qlk::LinearBackwardParams p = linear_backward_params(f, Device::kCuda);
    const auto* const seed = f.pointer<const int64_t>("seed");
    const int64_t n = p.weight.n, k = p.weight.k;
    all.reads("dy", p.dy, size_of(p.m * n, p.dtype));
    all.reads("u", p.u, size_of(p.m * p.r, p.dtype));
    all.writes("dx", p.dx, size_of(p.m * k, p.dtype));
    all.writes("da", p.da, size_of(p.r * k, 4));
    all.writes("db", p.db, size_of(n * p.r, 4));
    all.writes("narrow_da", p.narrow_da, size_of(p.r * k, p.dtype));
    all.writes("narrow_db", p.narrow_db, size_of(n * p.r, p.dtype));
    all.writes("v", f.pointer<void>("v"), size_of(p.m * p.r, p.dtype));
    layer(all, p, seed, true, f);
}

// The operands of all experts that forward and backward share.
template <class Params>
void stack(Operands& all, const qlk::GroupedParams<Params>& grouped) {
    const Params& p = grouped.first;
    const int64_t n = p.weight.n, k = p.weight.k;
    weight(all, p.weight, grouped.experts);
    all.reads("offsets", grouped.offsets, size_of(grouped.experts + 1, sizeof(int64_t)));
    all.reads("x", p.x, size_of(p.m * k, p.dtype));
    all.reads("lora_a", p.lora_a, size_of(grouped.experts * p.r * k, p.dtype));
    all.reads("lora_b", p.lora_b, size_of(grouped.experts * n * p.r, p.dtype));
}

void linear_grouped_forward(Operands& all, Fields& f) {
    const qlk::GroupedForwardParams grouped = grouped_forward_params(f, Device::kCuda);
    const qlk::LinearForwardParams& p = grouped.first;
    const int64_t n = p.weight.n;
    stack(all, grouped);
    all.reads("bias", p.bias, size_of(grouped.experts * n, 4));
    all.reads("narrow_bias", p.narrow_bias, size_of(grouped.experts * n, p.dtype));
    all.writes("y", p.y, size_of(p.m * n, p.dtype));
    all.writes("u", p.u, size_of(p.m * p.r, p.dtype));
}

void linear_grouped_backward(Operands& all, Fields& f) {
    const qlk::GroupedBackwardParams grouped = grouped_backward_params(f, Device::kCuda);
    const qlk::LinearBackwardParams& p = grouped.first;
    const int64_t n = p.weight.n, k = p.weight.k;
    stack(all, grouped);
    all.reads("dy", p.dy, size_of(p.m * n, p.dtype));
    all.reads("u", p.u, size_of(p.m * p.r, p.dtype));
    all.writes("dx", p.dx, size_of(p.m * k, p.dtype));
    all.writes("da", p.da, size_of(grouped.experts * p.r * k, 4));
    all.writes("db", p.db, size_of(grouped.experts * n * p.r, 4));
    all.writes("v", f.pointer<void>("v"), size_of(p.m * p.r, p.dtype));
}

// The planes that hold a chunk's states, and the part of its tensors.
void chunk(Operands& all, const qlk::OptimizerParams& p, int64_t number) {
    const qlk::OptimizerChunk& c = p.chunks[number];
    const int64_t blocks = (c.count + qlk::kStateBlock - 1) / qlk::kStateBlock;
    const auto plane = [&](qlk::Plane which, const char* name, unsigned char* base, size_t bytes) {
        if (c.plane[which] != qlk::kNoPlane) all.writes(name, base + c.plane[which], bytes, number);
    };
    const size_t states = size_of(c.count, p.state_bits == 32 ? 4 : 1);
    plane(qlk::kFirst, "first", p.states, states);
    plane(qlk::kSecond, "second", p.states, states);
    plane(qlk::kFirstAbsmax, "first_absmax", p.header, size_of(blocks, 4));
    plane(qlk::kSecondAbsmax, "second_absmax", p.header, size_of(blocks, 4));
    plane(qlk::kMaster, "master", p.states, size_of(c.count, 4));
    const qlk::OptimizerTensor& tensor = p.tensors[c.tensor];
    if (tensor.grad == 0) return;
    const auto dtype = static_cast<qlk::DType>(c.dtype);
    const size_t before = size_of(c.first, dtype), bytes = size_of(c.count, dtype);
    all.writes("param", at<char>(tensor.param) + before, bytes, number);
    all.reads("grad", at<const char>(tensor.grad) + before, bytes, number);
}

Operands optimizer(const qlk::OptimizerParams& p, const qlk::DynamicMap* maps) {
    Operands all("a step");
    int64_t groups = 0;
    for (int64_t i = 0; i < p.all_chunks; ++i) {
        chunk(all, p, i);
        groups = std::max<int64_t>(groups, p.chunks[i].group + 1);
    }
    all.reads("chunks", p.chunks, size_of(p.all_chunks, sizeof(qlk::OptimizerChunk)));
    all.reads("tensors", p.tensors, size_of(p.tensor_count, sizeof(qlk::OptimizerTensor)));
    all.reads("groups", p.groups, size_of(groups, sizeof(qlk::OptimizerGroup)));
    all.reads("maps", maps, 2 * sizeof(qlk::DynamicMap));
    all.reads("grad_scale", p.grad_scale, 4);
    all.reads("found_inf", p.found_inf, 4);
    all.writes("control", p.control, sizeof(qlk::OptimizerControl));
    all.writes("steps", p.steps, size_of(p.tensor_count, 4));
    all.writes("partial", p.partial, size_of(std::max<int64_t>(p.all_chunks, 1), sizeof(double)));
    return all;
}

// Replaces an operation by one that first states its operands.
void wrap(py::module_& m, const char* name, void (*state)(Operands&, Fields&)) {
    const py::object call = m.attr(name), made = m.attr("made");
    m.attr(name) = py::cpp_function(
        [=](const py::dict& arguments) {
            Operands all(name);
            Fields fields(arguments);
            state(all, fields);
            const py::list tensors = made.attr("copy")();
            made.attr("clear")();
            for (const py::handle tensor : tensors) {
                all.check_tensor(tensor.attr("data_ptr")().cast<Address>(), tensor.attr("nbytes").cast<size_t>());
            }
            const emu::Given given(std::move(all));
            return call(arguments);
        },
        py::name(name));
}

}  // namespace

void state_operands(py::module_& m) {
    py::module_ plain = m.def_submodule("plain", "The operations without checks of their operands.");
    for (const char* name : {"Weight", "Arena", "quantize", "quantize_absmax", "dequantize", "linear_forward",
                             "linear_backward", "linear_grouped_forward", "linear_grouped_backward", "linear_scratch",
                             "free_memory", "pages_managed", "dynamic_maps"}) {
        plain.attr(name) = m.attr(name);
    }
    m.attr("made") = py::list();
    wrap(m, "quantize", quantize);
    wrap(m, "quantize_absmax", quantize_absmax);
    wrap(m, "dequantize", dequantize);
    wrap(m, "linear_forward", linear_forward);
    wrap(m, "linear_backward", linear_backward);
    wrap(m, "linear_grouped_forward", linear_grouped_forward);
    wrap(m, "linear_grouped_backward", linear_grouped_backward);

    const py::object arena = m.attr("Arena"), step = arena.attr("step");
    arena.attr("step") = py::cpp_function(
        [=](const py::object& self, const py::dict& fields, Address maps, bool measure, int device, Address stream) {
            const emu::Given given(optimizer(optimizer_params(fields, 0), at<const qlk::DynamicMap>(maps)));
            return step(self, fields, maps, measure, device, stream);
        },
        py::name("step"), py::is_method(arena));
}
