#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include "bindings.h"

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
        [](const Weight& weight, Address x, Address lora_a, Address lora_b, Address bias, Address y, Address u,
           int64_t rows, int64_t r, float scaling, double dropout, Address seed, Address scratch, int dtype, int device,
           Address stream) {
            qlk::cuda::linear_forward(
                {weight_view(weight), at<const void>(x), at<const void>(lora_a), at<const void>(lora_b),
                 at<const float>(bias), at<void>(y), at<void>(u), rows, r, scaling, dropout, 0, dtype_of(dtype), 0},
                at<const int64_t>(seed), at<void>(scratch), {device, at<void>(stream)});
        },
        Released());
    m.def(
        "linear_backward",
        [](const Weight& weight, Address dy, Address x, Address u, Address lora_a, Address lora_b, Address dx,
           Address da, Address db, Address v, int64_t rows, int64_t r, float scaling, double dropout, Address seed,
           Address scratch, int dtype, int device, Address stream) {
            qlk::cuda::linear_backward({weight_view(weight), at<const void>(dy), at<const void>(x), at<const void>(u),
                                        at<const void>(lora_a), at<const void>(lora_b), at<void>(dx), at<float>(da),
                                        at<float>(db), rows, r, scaling, dropout, 0, dtype_of(dtype), 0},
                                       at<const int64_t>(seed), at<void>(v), at<void>(scratch),
                                       {device, at<void>(stream)});
        },
        Released());
    m.def("linear_scratch", [](int64_t rows, int64_t n, int64_t k, int64_t r, int dtype, bool backward, int device) {
        return qlk::cuda::linear_scratch(rows, n, k, r, dtype_of(dtype), backward, device);
    });
}
