// Vector primitives and number conversions for one instruction set. Files that include this are compiled once for each
// set, so everything lives in that set's namespace: the linker must not share anything here between sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(QLK_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define QLK_INLINE inline __attribute__((always_inline))

namespace qlk::cpu::QLK_ISA {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

// ------------------------------------------------------------------------------------------------ float32 vectors

#if defined(__AVX512F__)
constexpr int kWidth = 16;
using Vec = __m512;
QLK_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
QLK_INLINE void vstore(float* p, Vec v) { _mm512_storeu_ps(p, v); }
QLK_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
QLK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
constexpr int kWidth = 8;
using Vec = __m256;
QLK_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
QLK_INLINE void vstore(float* p, Vec v) { _mm256_storeu_ps(p, v); }
QLK_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
QLK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(QLK_NEON)
constexpr int kWidth = 4;
using Vec = float32x4_t;
QLK_INLINE Vec vload(const float* p) { return vld1q_f32(p); }
QLK_INLINE void vstore(float* p, Vec v) { vst1q_f32(p, v); }
QLK_INLINE Vec vset(float x) { return vdupq_n_f32(x); }
QLK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
#else
constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
QLK_INLINE Vec vload(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
QLK_INLINE void vstore(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
QLK_INLINE Vec vset(float x) { return Vec{x, x, x, x}; }
#if defined(__aarch64__)
// Every 64-bit ARM has FMLA: one instruction and one rounding instead of two, and the same bits as NEON's kernels.
QLK_INLINE Vec vfma(Vec a, Vec b, Vec c) {
    return Vec{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
               __builtin_fmaf(a[3], b[3], c[3])};
}
#else
// The least x86-64 has no fused multiplication, and its emulation is slow: two roundings.
QLK_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
#endif

// The sum of the lanes, always in the same order.
QLK_INLINE float vsum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float lane[kWidth];
    vstore(lane, v);
    for (int stride = kWidth / 2; stride > 0; stride /= 2) {
        for (int i = 0; i < stride; ++i) lane[i] += lane[i + stride];
    }
    return lane[0];
#endif
}

// ---------------------------------------------------------------------------------------------------- conversions

QLK_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

QLK_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Round to nearest even; NaN stays NaN.
QLK_INLINE uint16_t bf16_bits(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#if defined(__F16C__)
QLK_INLINE float fp16_value(uint16_t bits) { return _cvtsh_ss(bits); }
QLK_INLINE uint16_t fp16_bits(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
QLK_INLINE float fp16_value(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + (112u << 23)));
    // Subnormal: rest * 2^-24, exact in float32.
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return float_of(sign | bits_of(magnitude));
}
QLK_INLINE uint16_t fp16_bits(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
    if (rest < 0x38800000u) {
        // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the end of the mantissa.
        const float shifted = float_of(rest) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}
#endif

#if defined(QLK_NEON)
// bf16_bits, four at a time: left to itself, GCC keeps its branch.
QLK_INLINE uint16x4_t bf16_from_float(Vec x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), vshrn_n_u32(rounded, 16), vdup_n_u16(0x7fc0));
}

// fp16, four at a time. A NaN may have other bits than fp16_bits gives it.
QLK_INLINE Vec halves_to_float(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
QLK_INLINE uint16x4_t halves_from_float(Vec x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
#endif

QLK_INLINE void to_float(const float* src, float* dst, int64_t n) { std::memcpy(dst, src, n * sizeof(float)); }

QLK_INLINE void to_float(const bf16* src, float* dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = float_of(static_cast<uint32_t>(src[i].bits) << 16);
}

QLK_INLINE void to_float(const fp16* src, float* dst, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
    }
#elif defined(QLK_NEON)
    for (; i + 4 <= n; i += 4) vstore(dst + i, halves_to_float(vld1_u16(&src[i].bits)));
#endif
    for (; i < n; ++i) dst[i] = fp16_value(src[i].bits);
}

QLK_INLINE void from_float(const float* src, float* dst, int64_t n) { std::memcpy(dst, src, n * sizeof(float)); }

QLK_INLINE void from_float(const float* src, bf16* dst, int64_t n) {
    int64_t i = 0;
#if defined(QLK_NEON)
    for (; i + 4 <= n; i += 4) vst1_u16(&dst[i].bits, bf16_from_float(vload(src + i)));
#endif
    for (; i < n; ++i) dst[i].bits = bf16_bits(src[i]);
}

QLK_INLINE void from_float(const float* src, fp16* dst, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(QLK_NEON)
    for (; i + 4 <= n; i += 4) vst1_u16(&dst[i].bits, halves_from_float(vload(src + i)));
#endif
    for (; i < n; ++i) dst[i].bits = fp16_bits(src[i]);
}

#if defined(__AVX2__)
// Eight elements, as float32.
QLK_INLINE __m256 load8(const float* src) { return _mm256_loadu_ps(src); }
QLK_INLINE __m256 load8(const bf16* src) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
QLK_INLINE __m256 load8(const fp16* src) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}
#endif

}  // namespace qlk::cpu::QLK_ISA
