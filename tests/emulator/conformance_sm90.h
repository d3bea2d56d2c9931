// As conformance.h, for what came with sm_90: kernels of more than a warp.
#pragma once

#include "conformance.h"

namespace qlk::conformance {

struct WideKernel {
    const char* name;
    int words_in;  // in all
    int words_out;
    void (*run)(const Arguments& arguments, const cuda::Stream& stream);
};

// On a card: compiled for sm_90a only.
const std::vector<WideKernel>& wide_kernels();

}  // namespace qlk::conformance
