#include "cuda/quantize/dequantize.cuh"

#include "cuda/common/aligned.h"

namespace qlk::cuda {
namespace {

template <class T>
void dequantize_launch(const DequantizeParams& p, const Stream& stream) {
    using Traits = DequantizeTraits<T>;
    const DequantizeArguments arguments{DeviceWeight::from(p.weight), p.out, p.row_begin * p.weight.k,
                                        p.row_end * p.weight.k};
    const int64_t count = arguments.end - arguments.begin;
    if (count == 0) return;
    require_aligned(p.weight);
    require_aligned(sizeof(T), "the result of dequantize", p.out);
    const bool aligned = arguments.begin % kBlock == 0 && lies_on(p.out, 16) && lies_on(p.weight.packed, 16);
    const int64_t blocks = (count + Traits::kTile * Traits::kWarps - 1) / (Traits::kTile * Traits::kWarps);
    const DeviceGuard guard(stream.device);
    launch(aligned ? dequantize_kernel<T, true> : dequantize_kernel<T, false>, blocks, Traits::kThreads,
           sizeof(typename Traits::Shared), stream, arguments);
}

}  // namespace

void dequantize(const DequantizeParams& p, const Stream& stream) {
    switch (p.dtype) {
        case DType::kFloat32: return dequantize_launch<float>(p, stream);
        case DType::kBFloat16: return dequantize_launch<bf16>(p, stream);
        case DType::kFloat16: return dequantize_launch<fp16>(p, stream);
    }
    QLK_CHECK(false, "dequantize to dtype code " + std::to_string(static_cast<int>(p.dtype)));
}

}  // namespace qlk::cuda
