// Kernels that test the emulator itself: some right, most with one fault that it has to find.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emu {

std::vector<std::string> samples();
// Runs one on copies of the input, exactly as large, and gives its output; words that it did not write are 0xffffffff.
std::vector<uint32_t> run_sample(const std::string& name, const std::vector<uint32_t>& input, size_t output,
                                 int threads, int blocks);

}  // namespace emu
