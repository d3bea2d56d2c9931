// Small kernels that show what one instruction does. They run on the emulator and on a card with the same operands.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace qlk::conformance {

struct Arguments {
    const uint32_t* in;  // [words_in] for each thread, thread after thread; aligned to 16 bytes
    uint32_t* out;       // [words_out] for each thread
};

struct Kernel {
    const char* name;
    int words_in;
    int words_out;
    void (*run)(const Arguments& arguments, const cuda::Stream& stream);  // one warp
};

const std::vector<Kernel>& kernels();

// Keeps the tensor cores busy, for the bench of their rate: kRateWarps warps in each of `blocks` multiply `turns`
// times, with operands that are not zeros. out [blocks, kRateWarps, 32]: the total of each lane's sums.
struct RateArguments {
    const uint32_t* in;  // [32, 4]: each lane's left operand
    float* out;
    int turns;
};
constexpr int kRateWarps = 8;
constexpr double kRateFlop = 8 * 2.0 * 16 * 8 * 16;  // of a warp in a turn
void launch_rate(const RateArguments& arguments, int blocks, const cuda::Stream& stream);

// Launches a block of idle threads: too many of them, or too much shared memory, to see a launch fail.
void launch_idle(int threads, size_t shared_bytes, const cuda::Stream& stream);

}  // namespace qlk::conformance
