#include <algorithm>

#include "cuda/common/aligned.h"
#include "cuda/optimizer/norm.cuh"
#include "cuda/optimizer/optimizer.cuh"
#include "cuda/optimizer/optimizer_launch.h"

namespace qlk::cuda {
namespace {

template <class Rule, int kBits>
void launch_step(const OptimizerArguments& a, int64_t blocks, const Stream& stream) {
    launch(optimizer_step_kernel<Rule, kBits>, blocks, kOptimizerThreads, sizeof(OptimizerShared<kBits>), stream, a);
}

}  // namespace

void optimizer_norm(const OptimizerParams& p, const Stream& stream) {
    const bool sums = p.max_grad_norm > 0 || p.skip_nonfinite;
    const OptimizerArguments a{p, nullptr, 0, false, false};
    launch(optimizer_norm_kernel, sums ? std::max<int64_t>(p.all_chunks, 1) : 1, kOptimizerThreads,
           sizeof(OptimizerNormShared), stream, a);
}

void optimizer_step(const OptimizerParams& p, const DynamicMap* maps, int64_t begin, int64_t end, bool measured,
                    bool last, const Stream& stream) {
    QLK_CHECK(p.state_bits == 32 || p.state_bits == 8, "states of " + std::to_string(p.state_bits) + " bits");
    require_aligned(16, "the states of an optimizer", p.states, p.header);
    const OptimizerArguments a{p, maps, begin, measured, last};
    const int64_t blocks = std::max<int64_t>(end - begin, 1);
    if (p.algorithm == Algorithm::kAdamW) {
        if (p.state_bits == 32) return launch_step<AdamW, 32>(a, blocks, stream);
        return launch_step<AdamW, 8>(a, blocks, stream);
    }
    if (p.state_bits == 32) return launch_step<Lion, 32>(a, blocks, stream);
    return launch_step<Lion, 8>(a, blocks, stream);
}

}  // namespace qlk::cuda
