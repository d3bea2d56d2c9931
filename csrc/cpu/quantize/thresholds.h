// Exact nearest-level comparisons in float32.
//
// x is nearer to the upper of two levels when x > m * absmax, where m is their midpoint. m * absmax is exact in float64
// (25 bits times 24 bits). For a float32 x, comparing with the largest float32 not above it gives the same answer. So
// there is no division, and no rounding that could pick a neighbour; a tie goes to the lower level.
#pragma once

#include <cstdint>
#include <cstring>

namespace qlk::cpu {

// The largest float32 <= value.
static inline float round_down(double value) {
    const float nearest = static_cast<float>(value);
    if (!(static_cast<double>(nearest) > value)) return nearest;
    int32_t bits;
    std::memcpy(&bits, &nearest, sizeof bits);
    // One step towards minus infinity: the magnitude shrinks for positives, grows for negatives.
    bits = nearest > 0 ? bits - 1 : (nearest < 0 ? bits + 1 : static_cast<int32_t>(0x80000001u));
    float below;
    std::memcpy(&below, &bits, sizeof below);
    return below;
}

}  // namespace qlk::cpu
