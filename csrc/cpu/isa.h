// What an instruction set provides: one table of functions, filled by its isa_<name>.cpp.
#pragma once

#include "../kernels.h"

namespace qlk::cpu {

struct Kernels {
    const char* name;
    int64_t (*quantize)(const QuantizeParams&);
    void (*dequantize)(const DequantizeParams&);
    void (*linear_forward)(const LinearForwardParams&);
    void (*linear_backward)(const LinearBackwardParams&);
};

}  // namespace qlk::cpu
