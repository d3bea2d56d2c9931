#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "error.h"
#include "optimizer.h"

namespace qlk {
namespace {

DynamicMap make(bool is_signed) {
    constexpr int kDecades = 7;
    // Magnitudes, ascending: 0, the levels of each decade, 1.
    std::vector<double> magnitude = {0.0};
    for (int decade = 0; decade < kDecades; ++decade) {
        const int levels = is_signed ? 1 << decade : 2 << decade;
        const double scale = std::pow(10.0, decade - (kDecades - 1));
        for (int i = 0; i < levels; ++i) magnitude.push_back(scale * (0.1 + 0.9 * (i + 0.5) / levels));
    }
    magnitude.push_back(1.0);

    DynamicMap map;
    const int most = static_cast<int>(magnitude.size()) - 1;
    map.zero = is_signed ? most - 1 : 0;
    for (int i = 0; i <= most; ++i) {
        map.value[map.zero + i] = static_cast<float>(magnitude[i]);
        if (is_signed && i > 0 && i < most) map.value[map.zero - i] = -static_cast<float>(magnitude[i]);
    }
    std::fill(map.midpoint, std::end(map.midpoint), std::numeric_limits<float>::infinity());
    for (int i = 0; i < most; ++i) {
        const double low = map.value[map.zero + i], high = map.value[map.zero + i + 1];
        map.midpoint[i] = static_cast<float>((low + high) / 2);
    }
    std::memset(map.start, 0, sizeof map.start);
    for (int key = 0; key < DynamicMap::kKeys; ++key) {
        const auto at = [](uint32_t bits) {
            float value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
        };
        const uint32_t bits = (DynamicMap::kLowest + static_cast<uint32_t>(key)) << DynamicMap::kShift;
        const float first = at(bits), last = at(bits + (1u << DynamicMap::kShift) - 1);
        const auto below = [&](float x) {
            return std::lower_bound(map.midpoint, map.midpoint + most, x) - map.midpoint;
        };
        map.start[key] = static_cast<uint8_t>(key == 0 ? 0 : below(first));
        QLK_CHECK(below(last) - map.start[key] <= DynamicMap::kClimb, "the search among a map's levels is too short");
    }
    return map;
}

}  // namespace

const DynamicMap& dynamic_map(bool is_signed) {
    static const DynamicMap with = make(true), without = make(false);
    return is_signed ? with : without;
}

}  // namespace qlk
