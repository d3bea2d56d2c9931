// The NF4 number format: the only place where its levels, nibble order and block sizes are written down.
#pragma once

#include <cstdint>

namespace qlk {

// Weights in a block, which share one absmax (Dettmers et al. 2023, arXiv 2305.14314, section 3).
constexpr int kBlock = 64;
// Blocks in a group of the second quantization, which share one nested_absmax.
constexpr int kNestedBlock = 256;
// The code of 0.0. A block of zeros is filled with it.
constexpr int kZeroCode = 7;

// The 16 levels, float32, ascending (ibid., appendix E).
constexpr float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The code of element i of the flat weight: even elements are in the high nibble.
static inline int code_at(const uint8_t* packed, int64_t i) {
    const int byte = packed[i >> 1];
    return (i & 1) ? (byte & 15) : (byte >> 4);
}

}  // namespace qlk
