// Launches an optimizer's step on the caller's stream, whose device has to be current: the arena sees to that.
#pragma once

#include "kernels.h"

namespace qlk::cuda {

// Writes to params.control the sum of squares of all gradients, the coefficient to multiply them by, and whether the
// step is skipped. Needed before optimizer_step if max_grad_norm, skip_nonfinite, grad_scale or found_inf is set.
void optimizer_norm(const OptimizerParams& params, const Stream& stream);
// The step for chunks [begin, end). maps: signed and unsigned, on the device; for 8-bit states. measured:
// optimizer_norm has run. last: the step's last launch, which counts it.
void optimizer_step(const OptimizerParams& params, const DynamicMap* maps, int64_t begin, int64_t end, bool measured,
                    bool last, const Stream& stream);

}  // namespace qlk::cuda
