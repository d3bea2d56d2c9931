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

// Where levels are rounded to a 16-bit type once, for all blocks, they are multiplied by this first, and constants are
// divided by it. Of all factors from 1 to 2 these leave the least error when the levels of normally distributed weights
// are rounded: in bf16 0.47 times, in fp16 0.39 times that of a factor at random, which is also about what rounding
// each weight costs.
constexpr float kBf16LevelScale = 1.43670654f, kFp16LevelScale = 1.36619186f;

// The code of element i of the flat weight: even elements are in the high nibble.
static inline int code_at(const uint8_t* packed, int64_t i) {
    const int byte = packed[i >> 1];
    return (i & 1) ? (byte & 15) : (byte >> 4);
}

}  // namespace qlk
