// The parts of an optimizer's step that all instruction sets share: the norm, each tensor's scalars, the loop over
// chunks.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/isa.h"

namespace qlk::cpu {
namespace {

// base^exponent by squaring. Only multiplications, so that a device gets the same bits.
double power(double base, uint32_t exponent) {
    double result = 1;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

// steps: taken so far.
StepScalars scalars_of(const OptimizerParams& a, const OptimizerGroup& group, float steps) {
    const uint32_t step = static_cast<uint32_t>(steps) + 1;
    StepScalars s;
    s.decay = static_cast<float>(1.0 - group.lr * group.weight_decay);
    s.beta1 = static_cast<float>(group.beta1);
    s.beta2 = static_cast<float>(group.beta2);
    s.rest1 = static_cast<float>(1.0 - group.beta1);
    s.rest2 = static_cast<float>(1.0 - group.beta2);
    s.eps = static_cast<float>(group.eps);
    s.rate = static_cast<float>(group.lr);
    s.root = 1;
    if (a.algorithm == Algorithm::kAdamW) {
        s.rate = static_cast<float>(group.lr / (1.0 - power(group.beta1, step)));
        s.root = static_cast<float>(std::sqrt(1.0 - power(group.beta2, step)));
    }
    s.coefficient = a.control->coefficient;
    s.scales = s.coefficient != 1.0f;
    return s;
}

// Fills the control's norm, coefficient and skip.
void measure(const OptimizerParams& a, const double* sum_of_squares, const Kernels& kernels) {
    OptimizerControl& c = *a.control;
    const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
    c.coefficient = a.grad_scale ? static_cast<float>(1.0 / static_cast<double>(scale)) : 1.0f;
    c.skip = a.found_inf && *a.found_inf != 0.0f;
    if (a.max_grad_norm <= 0 && !a.skip_nonfinite) return;
    double sum = 0;
    if (sum_of_squares) {
        sum = *sum_of_squares;
    } else {
        optimizer_sums(a, kernels);
        for (int64_t i = 0; i < a.all_chunks; ++i) sum += a.partial[i];
    }
    c.sum_of_squares = sum;
    c.norm = static_cast<float>(std::sqrt(sum)) * c.coefficient;
    if (a.skip_nonfinite && !(sum <= std::numeric_limits<double>::max())) c.skip = 1;
    if (a.max_grad_norm > 0) {
        // torch.nn.utils.clip_grad_norm_
        const float clip = static_cast<float>(a.max_grad_norm) / (c.norm + 1e-6f);
        c.coefficient *= clip > 1.0f ? 1.0f : clip;
    }
}

}  // namespace

void optimizer_sums(const OptimizerParams& a, const Kernels& kernels) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
    for (int64_t i = 0; i < a.all_chunks; ++i) {
        const OptimizerChunk& chunk = a.chunks[i];
        const uint64_t grad = a.tensors[chunk.tensor].grad;
        const int64_t size = static_cast<DType>(chunk.dtype) == DType::kFloat32 ? 4 : 2;
        a.partial[i] = grad == 0 ? 0.0
                                 : kernels.sum_of_squares(reinterpret_cast<const char*>(grad) + chunk.first * size,
                                                          chunk.count, static_cast<DType>(chunk.dtype));
    }
}

void optimizer_step(const OptimizerParams& a, const double* sum_of_squares, const Kernels& kernels) {
    measure(a, sum_of_squares, kernels);
    if (a.control->skip) {
        ++a.control->skipped;
        return;
    }
    std::vector<StepScalars> scalars(a.tensor_count);
    int last = -1;
    for (int64_t i = 0; i < a.all_chunks; ++i) {
        const OptimizerChunk& chunk = a.chunks[i];
        if (chunk.tensor == last) continue;
        last = chunk.tensor;
        if (a.tensors[last].grad) scalars[last] = scalars_of(a, a.groups[chunk.group], a.steps[last]);
    }
    // Dynamic: a core that another process takes costs its share. A chunk's result doesn't depend on the thread.
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 2)
    for (int64_t i = 0; i < a.all_chunks; ++i) {
        const OptimizerChunk& chunk = a.chunks[i];
        if (a.tensors[chunk.tensor].grad) kernels.step_chunk(a, chunk, scalars[chunk.tensor]);
    }
    for (int64_t t = 0; t < a.tensor_count; ++t) {
        if (a.tensors[t].grad) ++a.steps[t];
    }
}

}  // namespace qlk::cpu
