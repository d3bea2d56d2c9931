#include <limits>

#include "cuda/common/aligned.h"
#include "cuda/quantize/quantize.cuh"

namespace qlk::cuda {
namespace {

template <class T>
void quantize_launch(const QuantizeParams& p, double* sums, const Stream& stream) {
    using Traits = QuantizeTraits<T>;
    if (p.count == 0) return;
    require_aligned(sizeof(T), "the weight to quantize", p.weight);
    require_aligned(8, "the sums of a weight's constants", sums);
    require_aligned(4, "the constants of a weight", p.absmax);
    QuantizeArguments a{p.weight, p.packed, p.absmax, sums, p.count, lies_on(p.weight, 16) && lies_on(p.packed, 4), {}};
    for (int i = 0; i < 15; ++i) {
        a.midpoints[i] = (static_cast<double>(kLevels[i]) + static_cast<double>(kLevels[i + 1])) / 2;
    }
    a.midpoints[15] = std::numeric_limits<double>::infinity();
    const DeviceGuard guard(stream.device);
    launch(quantize_kernel<T>, (p.count + Traits::kGroup - 1) / Traits::kGroup, Traits::kThreads,
           sizeof(typename Traits::Shared), stream, a);
}

}  // namespace

void quantize(const QuantizeParams& p, double* sums, const Stream& stream) {
    switch (p.dtype) {
        case DType::kFloat32: return quantize_launch<float>(p, sums, stream);
        case DType::kBFloat16: return quantize_launch<bf16>(p, sums, stream);
        case DType::kFloat16: return quantize_launch<fp16>(p, sums, stream);
    }
    QLK_CHECK(false, "quantize from dtype code " + std::to_string(static_cast<int>(p.dtype)));
}

}  // namespace qlk::cuda
