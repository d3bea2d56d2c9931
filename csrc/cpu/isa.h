// An instruction set's kernels: one table of functions, filled by its isa_<name>.cpp.
#pragma once

#include "kernels.h"

namespace qlk::cpu {

// out[i] = code[j], where j is how many of midpoints[] * scale lie below value[i]; up to 256 values. midpoints: 255,
// ascending, padded to 256 with +infinity. Gives a table's nearest entry, exactly (thresholds.h).
using NearestCodes = void (*)(const double* midpoints, const uint8_t* code, float scale, const float* value, int count,
                              uint8_t* out);

// A group's scalars for an optimizer's step, rounded once to float32.
struct StepScalars {
    float decay;  // 1 - lr * weight_decay
    float beta1, beta2;
    float rest1, rest2;  // 1 - beta
    float rate;          // AdamW: lr / (1 - beta1^step); Lion: lr
    float root;          // sqrt(1 - beta2^step)
    float eps;
    float coefficient;  // multiplies the gradients
    bool scales;        // coefficient is not 1
};

struct Kernels {
    const char* name;
    int64_t (*quantize)(const QuantizeParams&);
    NearestCodes nearest_codes;
    void (*dequantize)(const DequantizeParams&);
    void (*linear_forward)(const LinearForwardParams&);
    void (*linear_backward)(const LinearBackwardParams&);
    void (*step_chunk)(const OptimizerParams&, const OptimizerChunk&, const StepScalars&);
    void (*quantize_states)(const float* values, uint8_t* code, float* absmax, int64_t count, bool is_signed);
    double (*sum_of_squares)(const void* values, int64_t count, DType dtype);
};

// The part of quantize_absmax that all sets share.
void quantize_absmax(const QuantizeAbsmaxParams& params, NearestCodes nearest);
// The products of a mixture's experts, by the products of single weights.
void grouped_forward(const GroupedForwardParams& params, const Kernels& kernels);
void grouped_backward(const GroupedBackwardParams& params, const Kernels& kernels);
// The parts of optimizer_step and optimizer_sums that all sets share.
void optimizer_step(const OptimizerParams& params, const double* sum_of_squares, const Kernels& kernels);
void optimizer_sums(const OptimizerParams& params, const Kernels& kernels);

}  // namespace qlk::cpu
