// Checks that throw: file, line, expression, and a sentence that says what was expected.
#pragma once

#include <stdexcept>
#include <string>

namespace qlk {

[[noreturn]] inline void fail(const char* file, int line, const char* expression, const std::string& message) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + message +
                             " (failed: " + expression + ")");
}

}  // namespace qlk

#define QLK_CHECK(condition, message)                                           \
    do {                                                                        \
        if (!(condition)) ::qlk::fail(__FILE__, __LINE__, #condition, message); \
    } while (0)
