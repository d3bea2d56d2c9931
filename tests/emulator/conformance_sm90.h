// As conformance.h, for instructions from sm_90 on: kernels of more than a warp.
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

// As launch_rate, with products of 64 x 256 x 16 and two warpgroups a block. in: 64 KiB, of which 64 x 64 elements for
// each warpgroup and 256 x 64 for both are used. out [blocks, 256].
constexpr double kWideRateFlop = 2 * 4 * 2.0 * 64 * 256 * 16;  // of a block in a turn
void launch_wide_rate(const RateArguments& arguments, int blocks, const cuda::Stream& stream);

}  // namespace qlk::conformance
