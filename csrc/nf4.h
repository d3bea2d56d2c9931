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

// The 16 values that codes stand for, before a block's constant, and forms of them that kernels look up.
struct Levels {
    float value[16];
    int16_t word[16];  // round(value * word_scale)
    float word_scale;  // at most 8191, so that 8 products with 15-bit numbers fit into 32 bits
    float bf16_scale;  // as kBf16LevelScale
};

// Of all factors up to 8191 this one leaves the least relative error in any level of NF4, 1.4e-4 (8191 leaves 3.2e-4: a
// level that a whole block has errs in all its weights alike).
constexpr float kNf4WordScale = 7853.75f;

constexpr Levels levels_from(const float (&values)[16], float word_scale, float bf16_scale) {
    Levels made = {{}, {}, word_scale, bf16_scale};
    for (int i = 0; i < 16; ++i) {
        made.value[i] = values[i];
        made.word[i] = static_cast<int16_t>(values[i] * word_scale + (values[i] < 0 ? -0.5f : 0.5f));
    }
    return made;
}

constexpr Levels kNf4 = levels_from(kLevels, kNf4WordScale, kBf16LevelScale);

// Other levels, all of them from -1 to 1. bitsandbytes' FP4 has multiples of 1 / 192 with at most two significant bits:
// with these factors none of them is rounded.
inline Levels levels_from(const float (&values)[16]) {
    constexpr float kThirdsWordScale = 41 * 192, kThirdsBf16Scale = 1.5f;
    const Levels thirds = levels_from(values, kThirdsWordScale, kThirdsBf16Scale);
    for (int i = 0; i < 16; ++i) {
        const float exact = values[i] * kThirdsWordScale, error = exact - static_cast<float>(thirds.word[i]);
        if (error > 1e-3f || error < -1e-3f) return levels_from(values, kNf4WordScale, kBf16LevelScale);
    }
    return thirds;
}

// The code of element i of the flat weight: even elements are in the high nibble.
static inline int code_at(const uint8_t* packed, int64_t i) {
    const int byte = packed[i >> 1];
    return (i & 1) ? (byte & 15) : (byte >> 4);
}

}  // namespace qlk
