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

// ------------------------------------------------------------------------------------------------- 8-bit states

// A map's start[] (csrc/optimizer.h) with four bytes for each entry, for gathers.
struct Search {
    alignas(64) int32_t start[DynamicMap::kKeys + 15];
    explicit Search(const DynamicMap& map) {
        for (int i = 0; i < DynamicMap::kKeys + 15; ++i) start[i] = i < DynamicMap::kKeys ? map.start[i] : 0;
    }
};
inline const Search& search_of(bool is_signed) {
    static const Search with(dynamic_map(true)), without(dynamic_map(false));
    return is_signed ? with : without;
}

// out = value[code] * absmax, for one block.
QLK_INLINE void decode_states(const DynamicMap& map, const uint8_t* code, float absmax, int count, float* out) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + i)));
        const __m512 value = _mm512_i32gather_ps(index, map.value, 4);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(value, _mm512_set1_ps(absmax)));
    }
#elif defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + i)));
        const __m256 value = _mm256_i32gather_ps(map.value, index, 4);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(value, _mm256_set1_ps(absmax)));
    }
#endif
    for (; i < count; ++i) out[i] = map.value[code[i]] * absmax;
}

// For each of `count` magnitudes, how many of the map's midpoints lie below it; csrc/optimizer.h describes the search.
QLK_INLINE void ranks_of(const DynamicMap& map, const Search& search, const float* magnitude, int count,
                         int32_t* rank) {
    constexpr int kLowest = static_cast<int>(DynamicMap::kLowest), kLast = DynamicMap::kKeys - 1;
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
        const __m512 x = _mm512_loadu_ps(magnitude + i);
        __m512i key =
            _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(x), DynamicMap::kShift), _mm512_set1_epi32(kLowest));
        key = _mm512_min_epi32(_mm512_max_epi32(key, _mm512_setzero_si512()), _mm512_set1_epi32(kLast));
        __m512i below = _mm512_i32gather_epi32(key, search.start, 4);
        for (int step = 0; step < DynamicMap::kClimb; ++step) {
            const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_i32gather_ps(below, map.midpoint, 4), _CMP_GT_OQ);
            below = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
        }
        _mm512_storeu_si512(rank + i, below);
    }
#elif defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m256 x = _mm256_loadu_ps(magnitude + i);
        __m256i key =
            _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(x), DynamicMap::kShift), _mm256_set1_epi32(kLowest));
        key = _mm256_min_epi32(_mm256_max_epi32(key, _mm256_setzero_si256()), _mm256_set1_epi32(kLast));
        __m256i below = _mm256_i32gather_epi32(search.start, key, 4);
        for (int step = 0; step < DynamicMap::kClimb; ++step) {
            const __m256 above = _mm256_cmp_ps(x, _mm256_i32gather_ps(map.midpoint, below, 4), _CMP_GT_OQ);
            below = _mm256_sub_epi32(below, _mm256_castps_si256(above));  // a true lane is -1
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rank + i), below);
    }
#endif
    for (; i < count; ++i) {
        const int key = static_cast<int>(bits_of(magnitude[i]) >> DynamicMap::kShift) - kLowest;
        int below = search.start[key < 0 ? 0 : key < kLast ? key : kLast];
        for (int step = 0; step < DynamicMap::kClimb; ++step) below += magnitude[i] > map.midpoint[below] ? 1 : 0;
        rank[i] = below;
    }
}

// Encodes up to 256 values and returns their constant: the largest magnitude, at most the largest float32. NaN is
// encoded as zero, so that it spoils its own parameter and not those beside it. kSigned: first moments.
template <bool kSigned>
inline float encode_states(const DynamicMap& map, const float* value, int count, uint8_t* code) {
    // As integers, which have the order of non-negative floats and vectorize on every instruction set.
    constexpr uint32_t kInfinity = 0x7f800000u, kMost = kInfinity - 1;
    alignas(64) uint32_t size[kStateBlock];
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(value[i]) & 0x7fffffffu, number = bits <= kInfinity ? ~0u : 0u;
        size[i] = (bits < kMost ? bits : kMost) & number;
    }
    for (int i = 0; i < count; ++i) most = most > size[i] ? most : size[i];
    const float largest = float_of(most);
    if (most == 0) {
        std::memset(code, map.zero, count);
        return largest;
    }
    alignas(64) int32_t rank[kStateBlock];
    alignas(64) float magnitude[kStateBlock];
    for (int i = 0; i < count; ++i) magnitude[i] = float_of(size[i]) / largest;
    ranks_of(map, search_of(kSigned), magnitude, count, rank);
    const int32_t zero = map.zero;
    if (kSigned) {
        // -1 is not in the map.
        for (int i = 0; i < count; ++i) {
            const int32_t below = rank[i] < zero ? rank[i] : zero;
            code[i] = static_cast<uint8_t>(bits_of(value[i]) >> 31 ? zero - below : zero + rank[i]);
        }
    } else {
        // Never zero for a value that isn't: under a first moment that is not zero it would let the parameter jump.
        for (int i = 0; i < count; ++i) {
            const int32_t least = size[i] ? 1 : 0;
            code[i] = static_cast<uint8_t>(rank[i] > least ? rank[i] : least);
        }
    }
    return largest;
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
                // If the parameter is no longer the rounded master copy, something else has written it, and what
                // it wrote counts.
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
