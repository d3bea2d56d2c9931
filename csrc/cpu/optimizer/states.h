// Decodes and encodes 8-bit states, by blocks of at most 256.
//
// Formula: value = level[code] * absmax;  code = the level nearest to value / absmax, at a midpoint the smaller one
//
// Layout: a byte for each state and a float32 for each block
//
// Registers: the levels of a decade lie on a line, so a level or a rank is a multiply-add whose coefficients are looked
//     up by the decade: one permute of 8 entries for each.
//
// Why: gathers from the map's tables took three quarters of a step. Arithmetic finds the same level from the code
//     exactly, and the same code from a value except close to a midpoint, where the tables decide.
#pragma once

#include <cmath>
#include <initializer_list>

#include "cpu/isa.h"
#include "cpu/simd.h"

namespace qlk::cpu::QLK_ISA {

constexpr uint32_t kInfinityBits = 0x7f800000u, kMostBits = kInfinityBits - 1;  // kMostBits: the largest float32

// How many of the map's midpoints lie below a magnitude of [0, 1]; csrc/optimizer.h describes the search.
QLK_INLINE int rank_of(const DynamicMap& map, float magnitude) {
    constexpr int kLowest = static_cast<int>(DynamicMap::kLowest), kLast = DynamicMap::kKeys - 1;
    const int key = static_cast<int>(bits_of(magnitude) >> DynamicMap::kShift) - kLowest;
    int below = map.start[key < 0 ? 0 : key < kLast ? key : kLast];
    for (int step = 0; step < DynamicMap::kClimb; ++step) below += magnitude > map.midpoint[below] ? 1 : 0;
    return below;
}

// The codes of `count` values that are at most `largest`, which is not zero. kSigned: first moments.
template <bool kSigned>
inline void encode_by_table(const DynamicMap& map, const float* value, float largest, int count, uint8_t* code) {
    const int zero = map.zero;
    for (int i = 0; i < count; ++i) {
        const uint32_t size = bits_of(value[i]) & 0x7fffffffu;
        const int rank = rank_of(map, float_of(size) / largest);
        if (kSigned) {
            // -1 is not in the map.
            code[i] = static_cast<uint8_t>(bits_of(value[i]) >> 31 ? zero - (rank < zero ? rank : zero) : zero + rank);
        } else {
            // Never zero for a value that isn't: under a first moment that is not zero it would let the parameter jump.
            code[i] = static_cast<uint8_t>(rank == 0 && size != 0 ? 1 : rank);
        }
    }
}

#if defined(__AVX2__)

// A map as lines, of eight entries each; twice for registers of 16.
//
// Levels: a code becomes an odd or whole number q (decode() says how), and a decade is the q with the same exponent d;
// there the level is slope * q + offset. Each coefficient is cut in two: the upper parts have so few bits that slope *
// q + offset is exact, and adding the rest rounds once, to the map's float32. Entries are ordered by (127 + d) % 8. d =
// 0, where zero is alone, and d = 8, where 1 is alone, share one.
//
// Ranks: entry 0 is below the first midpoint, the others are decades. The map's midpoints lie on the line trunc(rate *
// x + start) to a few units in the last place of x.
struct Lines {
    alignas(64) float slope[16], offset[16], slope_rest[16], offset_rest[16];
    alignas(64) float next[16];  // above it x belongs to the next entry
    alignas(64) float rate[16], start[16], most[16];
    float top;  // above it lies the rank of 1

    // How far below the line the ranks are sought, in ranks. A rank is right unless its fraction is above 1 - kDoubt.
    static constexpr float kShift = 0x1p-15f, kDoubt = 0x1p-14f;

    explicit Lines(bool is_signed) {
        const DynamicMap& map = dynamic_map(is_signed);
        for (int d = 1; d <= 7; ++d) {
            const double scale = std::pow(10.0, d - 7), parts = std::ldexp(1.0, d);
            const double exact_slope = scale * 0.9 / parts;
            const double exact_offset = scale * (is_signed ? -0.8 : -0.8 + 0.45 / parts);
            constexpr int kBits = 14;  // q has at most 8
            const double unit = std::ldexp(1.0, std::ilogb(exact_slope) + 1 - kBits);
            const int at = d - 1;
            slope[at] = static_cast<float>(std::floor(exact_slope / unit) * unit);
            offset[at] = static_cast<float>(std::floor(exact_offset / unit) * unit);
            slope_rest[at] = static_cast<float>(exact_slope - slope[at]);
            offset_rest[at] = static_cast<float>(exact_offset - offset[at]);
        }
        // From 1, which is zero, to the largest q, which is 1; both come out exactly.
        slope[7] = is_signed ? 1.0f / 256 : 1.0f / 255;
        offset[7] = -slope[7];
        slope_rest[7] = offset_rest[7] = 0;

        rate[0] = 0;
        start[0] = most[0] = 0.5f;
        next[0] = map.midpoint[0];
        for (int at = 1; at < 8; ++at) {
            const int levels = is_signed ? 1 << (at - 1) : 1 << at, first = is_signed ? levels : levels - 1;
            rate[at] = static_cast<float>(levels / (0.9 * std::pow(10.0, at - 7)));
            start[at] = static_cast<float>(first - levels / 9.0 - kShift);
            most[at] = static_cast<float>(first + levels - 0.5);
            next[at] = map.midpoint[first + levels - 1];
        }
        top = next[7];
        next[7] = float_of(kInfinityBits);
        for (float* entries : {slope, offset, slope_rest, offset_rest, next, rate, start, most}) {
            std::memcpy(entries + 8, entries, 8 * sizeof(float));
        }
    }
};

inline const Lines& lines_of(bool is_signed) {
    static const Lines with(true), without(false);
    return is_signed ? with : without;
}

#if defined(__AVX512F__)
using Ints = __m512i;
QLK_INLINE Ints iset(int x) { return _mm512_set1_epi32(x); }
QLK_INLINE Ints ibits(Vec v) { return _mm512_castps_si512(v); }
QLK_INLINE Vec vbits(Ints v) { return _mm512_castsi512_ps(v); }
QLK_INLINE Ints iand(Ints a, Ints b) { return _mm512_and_si512(a, b); }
QLK_INLINE Ints ixor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
QLK_INLINE Ints isub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
// In 16-bit halves, at least zero.
QLK_INLINE Ints isub_halves(Ints a, Ints b) { return _mm512_subs_epu16(a, b); }
QLK_INLINE Ints imax(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
QLK_INLINE Ints imin(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
QLK_INLINE Ints imulhi16(Ints a, Ints b) { return _mm512_mulhi_epu16(a, b); }
template <int kBy>
QLK_INLINE Ints ishift(Ints v) {
    return _mm512_srli_epi32(v, kBy);
}
QLK_INLINE Ints isign(Ints v) { return _mm512_srai_epi32(v, 31); }
QLK_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
QLK_INLINE Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
QLK_INLINE Vec vsqrt(Vec v) { return _mm512_sqrt_ps(v); }
QLK_INLINE Vec to_vec(Ints v) { return _mm512_cvtepi32_ps(v); }
QLK_INLINE Ints truncated(Vec v) { return _mm512_cvttps_epi32(v); }
QLK_INLINE Vec entry(const float* entries, Ints index) { return _mm512_permutexvar_ps(index, vload(entries)); }
QLK_INLINE Ints load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// count, and one more where x > limit.
QLK_INLINE Ints add_above(Ints count, Vec x, Vec limit) {
    return _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), count, iset(1));
}
QLK_INLINE bool any_above(Vec x, float limit) { return _mm512_cmp_ps_mask(x, vset(limit), _CMP_GT_OQ) != 0; }
QLK_INLINE uint32_t largest_lane(Ints v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
// Four registers as bytes, in their order; what is negative becomes zero.
QLK_INLINE void store_bytes(uint8_t* p, const Ints (&v)[4]) {
    const Ints packed = _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    const Ints order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
}
#else
using Ints = __m256i;
QLK_INLINE Ints iset(int x) { return _mm256_set1_epi32(x); }
QLK_INLINE Ints ibits(Vec v) { return _mm256_castps_si256(v); }
QLK_INLINE Vec vbits(Ints v) { return _mm256_castsi256_ps(v); }
QLK_INLINE Ints iand(Ints a, Ints b) { return _mm256_and_si256(a, b); }
QLK_INLINE Ints ixor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
QLK_INLINE Ints isub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
QLK_INLINE Ints isub_halves(Ints a, Ints b) { return _mm256_subs_epu16(a, b); }
QLK_INLINE Ints imax(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
QLK_INLINE Ints imin(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
QLK_INLINE Ints imulhi16(Ints a, Ints b) { return _mm256_mulhi_epu16(a, b); }
template <int kBy>
QLK_INLINE Ints ishift(Ints v) {
    return _mm256_srli_epi32(v, kBy);
}
QLK_INLINE Ints isign(Ints v) { return _mm256_srai_epi32(v, 31); }
QLK_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
QLK_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
QLK_INLINE Vec vsqrt(Vec v) { return _mm256_sqrt_ps(v); }
QLK_INLINE Vec to_vec(Ints v) { return _mm256_cvtepi32_ps(v); }
QLK_INLINE Ints truncated(Vec v) { return _mm256_cvttps_epi32(v); }
QLK_INLINE Vec entry(const float* entries, Ints index) { return _mm256_permutevar8x32_ps(vload(entries), index); }
QLK_INLINE Ints load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
QLK_INLINE Ints add_above(Ints count, Vec x, Vec limit) {
    return isub(count, ibits(_mm256_cmp_ps(x, limit, _CMP_GT_OQ)));  // a true lane is -1
}
QLK_INLINE bool any_above(Vec x, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, vset(limit), _CMP_GT_OQ)) != 0;
}
QLK_INLINE uint32_t largest_lane(Ints v) {
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1))));
}
QLK_INLINE void store_bytes(uint8_t* p, const Ints (&v)[4]) {
    const Ints packed = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const Ints order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(packed, order));
}
#endif

// A register's states.
template <bool kSigned>
QLK_INLINE Vec decode(const Lines& lines, const uint8_t* code, Vec absmax) {
    const Vec number = to_vec(load_bytes(code));
    Vec q = number + vset(1.0f);
    Ints sign = iset(0);
    if (kSigned) {
        // Twice the distance from the code of zero, 127, and 1.
        const Vec twice = vfma(number, vset(2.0f), vset(-254.0f));
        sign = iand(ibits(twice), iset(static_cast<int>(0x80000000u)));
        q = vbits(ixor(ibits(twice), sign)) + vset(1.0f);
    }
    const Ints decade = ishift<23>(ibits(q));
    const Vec rest = vfma(q, entry(lines.slope_rest, decade), entry(lines.offset_rest, decade));
    const Vec level = vfma(q, entry(lines.slope, decade), entry(lines.offset, decade)) + rest;
    return (kSigned ? vbits(ixor(ibits(level), sign)) : level) * absmax;
}

// The ranks of magnitudes of [0, 1]. doubt: grows to the largest fraction.
QLK_INLINE Ints ranks_of(const Lines& lines, Vec x, Vec& doubt) {
    // A third of the exponent above 2^-24: the entry, or the one below it. 170 / 2^16 is a little less than 1 / 384.
    const Ints above = isub_halves(ibits(x), iset((127 - 24) << 23));
    Ints index = ishift<16>(imulhi16(above, iset(170 << 16)));
    index = add_above(index, x, entry(lines.next, index));
    const Vec line = vmin(vfma(x, entry(lines.rate, index), entry(lines.start, index)), entry(lines.most, index));
    const Ints rank = truncated(line);
    doubt = vmax(doubt, line - to_vec(rank));
    return add_above(rank, x, vset(lines.top));
}

// The codes of 256 values that are at most `largest`, which is not zero.
template <bool kSigned>
QLK_INLINE void encode_block(const DynamicMap& map, const float* value, float largest, uint8_t* code) {
    const Lines& lines = lines_of(kSigned);
    for (int at = 0; at < kStateBlock; at += 4 * kWidth) {
        Ints codes[4];
        Vec doubt = vset(0.0f);
        for (int j = 0; j < 4; ++j) {
            const Ints bits = ibits(vload(value + at + j * kWidth)), size = iand(bits, iset(0x7fffffff));
            const Ints rank = ranks_of(lines, vbits(size) / vset(largest), doubt);
            if (kSigned) {
                // zero + rank or zero - rank; as -1 is not in the map, -1 becomes 0 when it is stored.
                const Ints sign = isign(bits);
                codes[j] = isub(ixor(rank, sign), isub(sign, iset(127)));
            } else {
                codes[j] = imax(rank, imin(size, iset(1)));
            }
        }
        if (__builtin_expect(any_above(doubt, 1.0f - Lines::kDoubt), 0)) {
            encode_by_table<kSigned>(map, value + at, largest, 4 * kWidth, code + at);
        } else {
            store_bytes(code + at, codes);
        }
    }
}

#endif

// out = level[code] * absmax, for one block.
template <bool kSigned>
QLK_INLINE void decode_states(const uint8_t* code, float absmax, int count, float* out) {
    int i = 0;
#if defined(__AVX2__)
    const Lines& lines = lines_of(kSigned);
    for (; i + kWidth <= count; i += kWidth) vstore(out + i, decode<kSigned>(lines, code + i, vset(absmax)));
#endif
    const DynamicMap& map = dynamic_map(kSigned);
    for (; i < count; ++i) out[i] = map.value[code[i]] * absmax;
}

// The largest magnitude as bits, infinities and NaN included.
QLK_INLINE uint32_t largest_bits(const float* value, int count) {
    // As integers, which have the order of non-negative floats and vectorize on every instruction set.
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t size = bits_of(value[i]) & 0x7fffffffu;
        most = most > size ? most : size;
    }
    return most;
}

// Encodes up to 256 values and returns their constant: the largest magnitude, at most the largest float32. NaN is
// encoded as zero, so that it spoils its own parameter and not those beside it. most: their largest_bits. Values that
// are not finite are changed.
template <bool kSigned>
inline float encode_states(float* value, uint32_t most, int count, uint8_t* code) {
    const DynamicMap& map = dynamic_map(kSigned);
    if (__builtin_expect(most > kMostBits, 0)) {
        for (int i = 0; i < count; ++i) {
            const uint32_t sign = bits_of(value[i]) & 0x80000000u, size = bits_of(value[i]) & 0x7fffffffu;
            value[i] = float_of(size > kInfinityBits ? 0 : sign | (size < kMostBits ? size : kMostBits));
        }
        most = largest_bits(value, count);
    }
    const float largest = float_of(most);
    if (most == 0) {
        for (int i = 0; i < count; ++i) code[i] = static_cast<uint8_t>(map.zero);
        return largest;
    }
#if defined(__AVX2__)
    if (count == kStateBlock) {
        encode_block<kSigned>(map, value, largest, code);
        return largest;
    }
#endif
    encode_by_table<kSigned>(map, value, largest, count, code);
    return largest;
}

}  // namespace qlk::cpu::QLK_ISA
