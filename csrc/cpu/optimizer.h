// A step of AdamW or Lion on one chunk: states of 32 or 8 bits, parameters of any type, with or without a float32
// master copy. Every operation is rounded once, in the order of torch.optim's scalar formulas, so that the bits are the
// same on every instruction set; loops over 256 elements without branches are what compilers vectorize well.
#pragma once

#include <cmath>
#include <type_traits>

#include "isa.h"
#include "simd.h"

namespace qlk::cpu::QLK_ISA {

// torch.optim.AdamW: param *= 1 - lr * weight_decay; m.lerp_(g, 1 - beta1); v = v * beta2 + (1 - beta2) * g * g;
// param += -rate * m / (sqrt(v) / root + eps).
QLK_INLINE void adamw(const StepScalars& s, int count, const float* __restrict g, float* __restrict p,
                      float* __restrict m, float* __restrict v) {
    const float decay = s.decay, rest1 = s.rest1, beta2 = s.beta2, rest2 = s.rest2;
    const float rate = -s.rate, root = s.root, eps = s.eps;
    const auto rest = [&](int i) {
        v[i] = v[i] * beta2 + rest2 * g[i] * g[i];
        p[i] = p[i] * decay + rate * m[i] / (std::sqrt(v[i]) / root + eps);
    };
    // torch's lerp starts from the nearer end.
    if (rest1 < 0.5f) {
        for (int i = 0; i < count; ++i) {
            m[i] = m[i] + rest1 * (g[i] - m[i]);
            rest(i);
        }
    } else {
        const float other = 1.0f - rest1;
        for (int i = 0; i < count; ++i) {
            m[i] = g[i] - (g[i] - m[i]) * other;
            rest(i);
        }
    }
}

// Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): param = param * (1 - lr * weight_decay) - lr * sign(beta1 * m
// + (1 - beta1) * g); m = beta2 * m + (1 - beta2) * g. The sign of NaN is NaN here, so that it shows.
QLK_INLINE void lion(const StepScalars& s, int count, const float* __restrict g, float* __restrict p,
                     float* __restrict m) {
    const float decay = s.decay, beta1 = s.beta1, rest1 = s.rest1, beta2 = s.beta2, rest2 = s.rest2, rate = -s.rate;
    for (int i = 0; i < count; ++i) {
        const float u = m[i] * beta1 + rest1 * g[i];
        const float sign = u > 0 ? 1.0f : u < 0 ? -1.0f : u;
        p[i] = p[i] * decay + rate * sign;
        m[i] = m[i] * beta2 + rest2 * g[i];
    }
}

// ------------------------------------------------------------------------------------------------- 8-bit states

QLK_INLINE void decode_states(const DynamicMap& map, const uint8_t* code, float absmax, int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = map.value[code[i]] * absmax;
}

// How many of the map's midpoints a magnitude is above.
QLK_INLINE int32_t rank_of(const DynamicMap& map, float magnitude) {
    const int32_t key =
        static_cast<int32_t>(bits_of(magnitude) >> DynamicMap::kShift) - static_cast<int32_t>(DynamicMap::kLowest);
    const int32_t inside = key < 0 ? 0 : key < DynamicMap::kKeys ? key : DynamicMap::kKeys - 1;
    int32_t rank = map.start[inside];
    for (int i = 0; i < DynamicMap::kClimb; ++i) rank += magnitude > map.midpoint[rank] ? 1 : 0;
    return rank;
}

// The codes of up to 256 values, and their constant: the largest magnitude, no larger than float32 has. NaN counts as
// zero, so that one spoils its own parameter and not those beside it.
template <bool kSigned>
inline float encode_states(const DynamicMap& map, float* value, int count, uint8_t* code) {
    constexpr float kMost = 3.4028234663852886e38f;
    float largest = 0;
    for (int i = 0; i < count; ++i) {
        const float magnitude = std::fabs(value[i]);
        const float finite = magnitude <= kMost ? magnitude : magnitude > kMost ? kMost : 0.0f;
        value[i] = kSigned && value[i] < 0 ? -finite : finite;
        largest = finite > largest ? finite : largest;
    }
    if (largest == 0) {
        std::memset(code, map.zero, count);
        return 0;
    }
    alignas(64) int32_t rank[kStateBlock];
    for (int i = 0; i < count; ++i) rank[i] = rank_of(map, std::fabs(value[i]) / largest);
    if (kSigned) {
        // -1 is not in the map.
        for (int i = 0; i < count; ++i) {
            const int32_t below = rank[i] < map.zero ? rank[i] : map.zero;
            code[i] = static_cast<uint8_t>(value[i] < 0 ? map.zero - below : map.zero + rank[i]);
        }
    } else {
        // A second moment that has become zero under a first one that has not would let the parameter jump.
        for (int i = 0; i < count; ++i) {
            code[i] = static_cast<uint8_t>(rank[i] == 0 && value[i] > 0 ? 1 : rank[i]);
        }
    }
    return largest;
}

// --------------------------------------------------------------------------------------------------------- a chunk

template <class T>
inline void step_typed(const OptimizerParams& a, const OptimizerChunk& chunk, const StepScalars& s) {
    const OptimizerTensor& tensor = a.tensors[chunk.tensor];
    T* const param = reinterpret_cast<T*>(tensor.param) + chunk.first;
    const T* const grad = reinterpret_cast<const T*>(tensor.grad) + chunk.first;
    const auto plane = [&](int which) {
        return chunk.plane[which] == kNoPlane ? nullptr : a.states + chunk.plane[which];
    };
    float* const master = reinterpret_cast<float*>(plane(kMaster));
    const bool narrow = a.state_bits == 8, adam = a.algorithm == Algorithm::kAdamW;
    const DynamicMap &with = dynamic_map(true), &without = dynamic_map(false);
    float* const first_absmax = reinterpret_cast<float*>(a.header + chunk.plane[kFirstAbsmax]);
    float* const second_absmax = reinterpret_cast<float*>(a.header + chunk.plane[kSecondAbsmax]);

    for (int at = 0; at < chunk.count; at += kStateBlock) {
        const int count = chunk.count - at < kStateBlock ? chunk.count - at : kStateBlock;
        alignas(64) float g_line[kStateBlock], p_line[kStateBlock], m_line[kStateBlock], v_line[kStateBlock];
        float *p = p_line, *m = m_line, *v = v_line;
        const float* g = g_line;
        if constexpr (std::is_same_v<T, float>) {
            p = param + at;
            g = grad + at;
        } else {
            to_float(param + at, p_line, count);
            to_float(grad + at, g_line, count);
        }
        if (s.scales) {
            for (int i = 0; i < count; ++i) g_line[i] = g[i] * s.coefficient;
            g = g_line;
        }
        if constexpr (!std::is_same_v<T, float>) {
            if (master) {
                // What somebody else has written to the parameter since counts.
                alignas(64) T rounded[kStateBlock];
                p = master + at;
                from_float(p, rounded, count);
                for (int i = 0; i < count; ++i) p[i] = rounded[i].bits == param[at + i].bits ? p[i] : p_line[i];
            }
        }
        if (narrow) {
            const int block = at / kStateBlock;
            decode_states(with, plane(kFirst) + at, first_absmax[block], count, m);
            if (adam) decode_states(without, plane(kSecond) + at, second_absmax[block], count, v);
        } else {
            m = reinterpret_cast<float*>(plane(kFirst)) + at;
            v = reinterpret_cast<float*>(plane(kSecond)) + at;
        }
        if (adam) {
            adamw(s, count, g, p, m, v);
        } else {
            lion(s, count, g, p, m);
        }
        if (narrow) {
            const int block = at / kStateBlock;
            first_absmax[block] = encode_states<true>(with, m, count, plane(kFirst) + at);
            if (adam) second_absmax[block] = encode_states<false>(without, v, count, plane(kSecond) + at);
        }
        if constexpr (!std::is_same_v<T, float>) from_float(p, param + at, count);
    }
}

static void step_chunk(const OptimizerParams& a, const OptimizerChunk& chunk, const StepScalars& s) {
    switch (static_cast<DType>(chunk.dtype)) {
        case DType::kBFloat16: return step_typed<bf16>(a, chunk, s);
        case DType::kFloat16: return step_typed<fp16>(a, chunk, s);
        default: return step_typed<float>(a, chunk, s);
    }
}

static void quantize_states(const float* values, uint8_t* code, float* absmax, int64_t count, bool is_signed) {
    const DynamicMap& map = dynamic_map(is_signed);
    for (int64_t at = 0; at < count; at += kStateBlock) {
        const int size = count - at < kStateBlock ? static_cast<int>(count - at) : kStateBlock;
        alignas(64) float line[kStateBlock];
        std::memcpy(line, values + at, size * sizeof(float));
        absmax[at / kStateBlock] = is_signed ? encode_states<true>(map, line, size, code + at)
                                             : encode_states<false>(map, line, size, code + at);
    }
}

// In float64, where the square of no finite float32 overflows; eight sums side by side, then one after the other.
template <class T>
inline double sum_of_squares_typed(const T* values, int64_t count) {
    double lane[8] = {0};
    for (int64_t at = 0; at < count; at += kStateBlock) {
        const int size = count - at < kStateBlock ? static_cast<int>(count - at) : kStateBlock;
        alignas(64) float line[kStateBlock] = {0};
        to_float(values + at, line, size);
        for (int i = 0; i < kStateBlock; i += 8) {
            for (int j = 0; j < 8; ++j) lane[j] += static_cast<double>(line[i + j]) * static_cast<double>(line[i + j]);
        }
    }
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

static double sum_of_squares(const void* values, int64_t count, DType dtype) {
    switch (dtype) {
        case DType::kBFloat16: return sum_of_squares_typed(static_cast<const bf16*>(values), count);
        case DType::kFloat16: return sum_of_squares_typed(static_cast<const fp16*>(values), count);
        default: return sum_of_squares_typed(static_cast<const float*>(values), count);
    }
}

}  // namespace qlk::cpu::QLK_ISA
