// NF4 quantization: absmax and codes of blocks of 64. One source for every instruction set: its loops over 64 elements
// are what compilers vectorize well.
#pragma once

#include "simd.h"
#include "thresholds.h"

namespace qlk::cpu::QLK_ISA {

template <class T>
inline int64_t quantize_impl(const QuantizeParams& p) {
    const T* const weight = static_cast<const T*>(p.weight);
    const int64_t blocks = (p.count + kBlock - 1) / kBlock;
    int64_t bad = p.count;

#pragma omp parallel for num_threads(p.threads) schedule(static) reduction(min : bad)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * kBlock;
        const int count = static_cast<int>(p.count - begin < kBlock ? p.count - begin : kBlock);
        alignas(64) float w[kBlock] = {0};
        to_float(weight + begin, w, count);

        // The order of non-negative floats is that of their bits, and infinity and NaN come last.
        uint32_t largest = 0;
        for (int i = 0; i < kBlock; ++i) {
            const uint32_t bits = bits_of(w[i]) & 0x7fffffffu;
            largest = largest > bits ? largest : bits;
        }
        if (largest >= 0x7f800000u) {
            for (int i = 0; i < count; ++i) {
                if ((bits_of(w[i]) & 0x7fffffffu) >= 0x7f800000u && begin + i < bad) bad = begin + i;
            }
            continue;
        }
        const float absmax = float_of(largest);
        p.absmax[b] = absmax;

        float threshold[15];
        for (int i = 0; i < 15; ++i) {
            // Midpoints in float64 are exact; see thresholds.h.
            const double midpoint = (static_cast<double>(kLevels[i]) + static_cast<double>(kLevels[i + 1])) / 2;
            threshold[i] = round_down(midpoint * static_cast<double>(absmax));
        }
        alignas(64) int32_t code[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            int32_t c = 0;
            for (int t = 0; t < 15; ++t) c += w[i] > threshold[t] ? 1 : 0;
            code[i] = largest == 0 ? kZeroCode : c;
        }
        uint8_t* const packed = p.packed + begin / 2;
        if (count == kBlock) {
            for (int i = 0; i < kBlock / 2; ++i) packed[i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
        } else {
            // The second half of a last odd byte is the code of zero.
            for (int i = 0; i < (count + 1) / 2; ++i) {
                const int second = 2 * i + 1 < count ? code[2 * i + 1] : kZeroCode;
                packed[i] = static_cast<uint8_t>(code[2 * i] << 4 | second);
            }
        }
    }
    return bad == p.count ? -1 : bad;
}

inline int64_t quantize(const QuantizeParams& p) {
    switch (p.dtype) {
        case DType::kBFloat16: return quantize_impl<bf16>(p);
        case DType::kFloat16: return quantize_impl<fp16>(p);
        default: return quantize_impl<float>(p);
    }
}

}  // namespace qlk::cpu::QLK_ISA
