// The launches of an optimizer's step, on the caller's stream.
#pragma once

#include "kernels.h"

namespace qlk::cuda {

// The sum of squares of all gradients, the coefficient they are multiplied by, and whether the step is left out, in
// params.control: before optimizer_step where max_grad_norm, skip_nonfinite, grad_scale or found_inf ask for any.
void optimizer_norm(const OptimizerParams& params, const Stream& stream);
// The step of chunks [begin, end). maps: signed and unsigned, on the device; of 8-bit states. `measured`: after
// optimizer_norm. `last`: counts the step, when all of it is done.
void optimizer_step(const OptimizerParams& params, const DynamicMap* maps, int64_t begin, int64_t end, bool measured,
                    bool last, const Stream& stream);

}  // namespace qlk::cuda
