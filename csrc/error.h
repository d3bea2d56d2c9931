// Checks that throw: file, line, expression, and a sentence that says what was expected.
#pragma once

#include <stdexcept>
#include <string>

namespace qlk {

[[noreturn]] inline void fail(const char* file, int line, const char* expression, const std::string& message) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + message +
                             " (failed: " + expression + ")");
}

// Throws one sentence for a driver older than the CUDA runtime that calls it. Versions as CUDA gives them: 13000 for
// 13.0; found: 0 where there is no driver.
[[noreturn]] inline void fail_driver(int found, int needed) {
    const auto name = [](int version) {
        return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    };
    const std::string has = found == 0 ? "there is no NVIDIA driver" : "the NVIDIA driver supports " + name(found);
    throw std::runtime_error(has + ", and these kernels, built with " + name(needed) + ", need one that supports " +
                             name(needed) + " or later; install a newer driver, or build for an older CUDA");
}

}  // namespace qlk

#define QLK_CHECK(condition, message)                                           \
    do {                                                                        \
        if (!(condition)) ::qlk::fail(__FILE__, __LINE__, #condition, message); \
    } while (0)
