// FP8 E4M3 ("fn": no infinities, one NaN per sign), the default number format of the second level.
#pragma once

#include <cmath>
#include <cstdint>

namespace qlk {

// The largest finite E4M3 value (OCP 8-bit Floating Point Specification, revision 1.0, table 1).
constexpr float kE4M3Max = 448.0f;

// The value of an E4M3 byte. Here the two NaN bytes (0x7f, 0xff) decode to +-448: quantization never produces them, and
// a table without NaN cannot turn a damaged byte into one.
static inline float e4m3_value(uint8_t byte) {
    const int exponent = (byte >> 3) & 15;
    const int mantissa = byte & 7;
    float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                    : std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - 7);
    if ((byte & 0x7f) == 0x7f) magnitude = kE4M3Max;
    return (byte & 0x80) ? -magnitude : magnitude;
}

}  // namespace qlk
