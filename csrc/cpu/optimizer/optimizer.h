// A step of AdamW or Lion on one chunk.
//
// Formula: adamw() and lion() below, in the order of torch.optim's scalar formulas, every operation rounded once
//
// Layout: blocks of 256 elements; states of 32 or 8 bits; parameters of any type, with or without a float32 master copy
//
// Registers: none by hand; loops over 256 elements without branches vectorize well
//
// Why: rounding every operation once gives the same bits on every instruction set, and on a device.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/optimizer/states.h"
#include "cpu/simd.h"

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
    // As torch's lerp, which starts from the nearer end.
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
// + (1 - beta1) * g); m = beta2 * m + (1 - beta2) * g. Here the sign of NaN is NaN, so that it shows.
QLK_INLINE void lion(const StepScalars& s, int count, const float* __restrict g, float* __restrict p,
                     float* __restrict m) {
    const float decay = s.decay, beta1 = s.beta1, rest1 = s.rest1, beta2 = s.beta2, rest2 = s.rest2, rate = -s.rate;
    for (int i = 0; i < count; ++i) {
        const float u = m[i] * beta1 + rest1 * g[i];
        // Zero and NaN are their own sign. Compared as integers, which vectorizes on every instruction set.
        const uint32_t bits = bits_of(u);
        const uint32_t sign = (bits & 0x7fffffffu) - 1 < 0x7f800000u ? (bits & 0x80000000u) | 0x3f800000u : bits;
        p[i] = p[i] * decay + rate * float_of(sign);
        m[i] = m[i] * beta2 + rest2 * g[i];
    }
}

// --------------------------------------------------------------------------------------------------- a coded block

#if defined(__AVX2__)
// adamw() on a block of 256 with 8-bit states. In one loop, so that decoding runs beside the divisions.
// kNear: 1 - beta1 < 0.5.
template <bool kNear>
inline void adamw_coded(const StepScalars& s, const float* g_line, float* p_line, uint8_t* first, float* first_absmax,
                        uint8_t* second, float* second_absmax) {
    const Lines &with = lines_of(true), &without = lines_of(false);
    const Vec decay = vset(s.decay), rest1 = vset(s.rest1), other = vset(1.0f - s.rest1), beta2 = vset(s.beta2);
    const Vec rest2 = vset(s.rest2), rate = vset(-s.rate), root = vset(s.root), eps = vset(s.eps);
    const Vec m_absmax = vset(*first_absmax), v_absmax = vset(*second_absmax);
    const Ints magnitude = iset(0x7fffffff);
    alignas(64) float m_line[kStateBlock], v_line[kStateBlock];
    Ints m_most = iset(0), v_most = iset(0);
    for (int i = 0; i < kStateBlock; i += kWidth) {
        const Vec g = vload(g_line + i);
        Vec m = decode<true>(with, first + i, m_absmax), v = decode<false>(without, second + i, v_absmax);
        m = kNear ? m + rest1 * (g - m) : g - (g - m) * other;
        v = v * beta2 + rest2 * g * g;
        vstore(p_line + i, vload(p_line + i) * decay + rate * m / (vsqrt(v) / root + eps));
        vstore(m_line + i, m);
        vstore(v_line + i, v);
        m_most = imax(m_most, iand(ibits(m), magnitude));
        v_most = imax(v_most, iand(ibits(v), magnitude));
    }
    *first_absmax = encode_states<true>(m_line, largest_lane(m_most), kStateBlock, first);
    *second_absmax = encode_states<false>(v_line, largest_lane(v_most), kStateBlock, second);
}
#endif

// A block with 8-bit states, of `count` elements.
inline void step_coded(Algorithm algorithm, const StepScalars& s, int count, const float* g, float* p, uint8_t* first,
                       float* first_absmax, uint8_t* second, float* second_absmax) {
    const bool adam = algorithm == Algorithm::kAdamW;
#if defined(__AVX2__)
    if (adam && count == kStateBlock) {
        const auto step = s.rest1 < 0.5f ? adamw_coded<true> : adamw_coded<false>;
        return step(s, g, p, first, first_absmax, second, second_absmax);
    }
#endif
    alignas(64) float m[kStateBlock], v[kStateBlock];
    decode_states<true>(first, *first_absmax, count, m);
    if (adam) {
        decode_states<false>(second, *second_absmax, count, v);
        adamw(s, count, g, p, m, v);
        *second_absmax = encode_states<false>(v, largest_bits(v, count), count, second);
    } else {
        lion(s, count, g, p, m);
    }
    *first_absmax = encode_states<true>(m, largest_bits(m, count), count, first);
}

// --------------------------------------------------------------------------------------------------------- a chunk

// T: type of parameter and gradient.
template <class T>
inline void step_typed(const OptimizerParams& a, const OptimizerChunk& chunk, const StepScalars& s) {
    const OptimizerTensor& tensor = a.tensors[chunk.tensor];
    T* const param = reinterpret_cast<T*>(tensor.param) + chunk.first;
    const T* const grad = reinterpret_cast<const T*>(tensor.grad) + chunk.first;
    const auto plane = [&](int which) {
        return chunk.plane[which] == kNoPlane ? nullptr : a.states + chunk.plane[which];
    };
    float* const master = reinterpret_cast<float*>(plane(kMaster));
    const bool adam = a.algorithm == Algorithm::kAdamW;
    float* const first_absmax = reinterpret_cast<float*>(a.header + chunk.plane[kFirstAbsmax]);
    float* const second_absmax = reinterpret_cast<float*>(a.header + chunk.plane[kSecondAbsmax]);

    for (int at = 0; at < chunk.count; at += kStateBlock) {
        const int count = chunk.count - at < kStateBlock ? chunk.count - at : kStateBlock;
        alignas(64) float g_line[kStateBlock], p_line[kStateBlock];
        float* p = p_line;
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
                // If the parameter is no longer the rounded master copy, something else has written it, and what
                // it wrote counts.
                alignas(64) T rounded[kStateBlock];
                p = master + at;
                from_float(p, rounded, count);
                for (int i = 0; i < count; ++i) p[i] = rounded[i].bits == param[at + i].bits ? p[i] : p_line[i];
            }
        }
        if (a.state_bits == 8) {
            const int block = at / kStateBlock;
            step_coded(a.algorithm, s, count, g, p, plane(kFirst) + at, first_absmax + block,
                       adam ? plane(kSecond) + at : nullptr, second_absmax + block);
        } else {
            float* const m = reinterpret_cast<float*>(plane(kFirst)) + at;
            if (adam) {
                adamw(s, count, g, p, m, reinterpret_cast<float*>(plane(kSecond)) + at);
            } else {
                lion(s, count, g, p, m);
            }
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
    for (int64_t at = 0; at < count; at += kStateBlock) {
        const int size = count - at < kStateBlock ? static_cast<int>(count - at) : kStateBlock;
        alignas(64) float line[kStateBlock];
        std::memcpy(line, values + at, size * sizeof(float));
        const uint32_t most = largest_bits(line, size);
        absmax[at / kStateBlock] = is_signed ? encode_states<true>(line, most, size, code + at)
                                             : encode_states<false>(line, most, size, code + at);
    }
}

// In float64, where the square of a finite float32 is exact and cannot overflow. Sixteen sums side by side, then added
// in a fixed order.
template <class T>
inline double sum_of_squares_typed(const T* values, int64_t count) {
    typedef double Lanes __attribute__((vector_size(64)));
    typedef float Floats __attribute__((vector_size(32)));
    Lanes sum[2] = {};
    for (int64_t at = 0; at < count; at += kStateBlock) {
        const int size = count - at < kStateBlock ? static_cast<int>(count - at) : kStateBlock;
        alignas(64) float line[kStateBlock];
        to_float(values + at, line, size);
        for (int i = size; i < (size + 15) / 16 * 16; ++i) line[i] = 0;
        for (int i = 0; i < size; i += 16) {
            for (int half = 0; half < 2; ++half) {
                Floats floats;
                std::memcpy(&floats, line + i + 8 * half, sizeof floats);
                const Lanes wide = __builtin_convertvector(floats, Lanes);
                sum[half] += wide * wide;
            }
        }
    }
    const Lanes both = sum[0] + sum[1];
    return ((both[0] + both[1]) + (both[2] + both[3])) + ((both[4] + both[5]) + (both[6] + both[7]));
}

static double sum_of_squares(const void* values, int64_t count, DType dtype) {
    switch (dtype) {
        case DType::kBFloat16: return sum_of_squares_typed(static_cast<const bf16*>(values), count);
        case DType::kFloat16: return sum_of_squares_typed(static_cast<const fp16*>(values), count);
        default: return sum_of_squares_typed(static_cast<const float*>(values), count);
    }
}

}  // namespace qlk::cpu::QLK_ISA
