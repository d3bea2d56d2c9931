// What an instruction set provides: one table of functions, filled by its isa_<name>.cpp.
#pragma once

#include "../kernels.h"

namespace qlk::cpu {

// out[i] = code[j], j the number of midpoints[j] * scale below value[i], for up to 256 values. midpoints: 255
// ascending, padded to 256 with +infinity. A table's nearest entry, exactly (thresholds.h).
using NearestCodes = void (*)(const double* midpoints, const uint8_t* code, float scale, const float* value, int count,
                              uint8_t* out);

struct Kernels {
    const char* name;
    int64_t (*quantize)(const QuantizeParams&);
    NearestCodes nearest_codes;
    void (*dequantize)(const DequantizeParams&);
    void (*linear_forward)(const LinearForwardParams&);
    void (*linear_backward)(const LinearBackwardParams&);
};

// The part of quantize_absmax that all sets share.
void quantize_absmax(const QuantizeAbsmaxParams& params, NearestCodes nearest);

}  // namespace qlk::cpu
