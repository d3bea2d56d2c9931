#include <algorithm>

#include "cuda/common/aligned.h"
#include "cuda/quantize/quantize_absmax.cuh"

namespace qlk::cuda {

void quantize_absmax(const QuantizeAbsmaxParams& p, double* sums, bool summed, const Stream& stream) {
    using Traits = QuantizeAbsmaxTraits;
    QLK_CHECK(p.count > 0, "there are no constants to quantize");
    const int64_t groups = (p.count + kNestedBlock - 1) / kNestedBlock;
    QLK_CHECK(groups <= Traits::kMaxGroups, "a weight of more than 2^34 elements cannot be double-quantized at once");
    require_aligned(4, "constants and table", p.absmax, p.table, p.nested_absmax, p.offset);
    require_aligned(8, "the sums of constants", sums);
    const QuantizeAbsmaxArguments a{p.absmax, p.table, sums, p.code, p.nested_absmax, p.offset, p.count, groups};
    const DeviceGuard guard(stream.device);
    if (!summed) {
        launch(absmax_sums_kernel, (groups + Traits::kWarps - 1) / Traits::kWarps, Traits::kThreads, 0, stream, a);
    }
    // Two blocks on each multiprocessor. Each computes the mean and sorts the table, so more would only repeat that.
    const int64_t blocks = std::min<int64_t>(groups, 2 * multiprocessors(stream.device));
    launch(quantize_absmax_kernel, blocks, Traits::kThreads, sizeof(Traits::Shared), stream, a);
}

}  // namespace qlk::cuda
