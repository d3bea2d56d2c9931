// A block's weights by NEON: 16 look-ups in one instruction, of one byte each.
//
// Formula: value[i] = table[code[i]], for 64 codes
//
// Layout: a table of 16 floats is four planes: the lowest byte of each entry, the next, ... Little-endian, as all of
// the
//     package.
//
// Registers: the planes in four, and two to four more for the bytes of 16 weights on their way.
//
// Why: TBL finds 16 bytes by 16 indices in a register, which is a plane. ZIP then puts the bytes of a weight together.
//     A table rounded to bf16 has zeros in its two low planes, and takes half of the look-ups.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace qlk::cpu::QLK_ISA {

// 16 weights, four a vector. T: the type that the table was rounded to.
template <class T>
QLK_INLINE void lookup16(uint8x16_t code, const uint8x16x4_t& planes, Vec* out) {
    const uint8x16_t third = vqtbl1q_u8(planes.val[2], code), fourth = vqtbl1q_u8(planes.val[3], code);
    const uint16x8_t high[2] = {vreinterpretq_u16_u8(vzip1q_u8(third, fourth)),
                                vreinterpretq_u16_u8(vzip2q_u8(third, fourth))};
    uint16x8_t low[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};
    if constexpr (!std::is_same_v<T, bf16>) {
        const uint8x16_t first = vqtbl1q_u8(planes.val[0], code), second = vqtbl1q_u8(planes.val[1], code);
        low[0] = vreinterpretq_u16_u8(vzip1q_u8(first, second));
        low[1] = vreinterpretq_u16_u8(vzip2q_u8(first, second));
    }
    for (int half = 0; half < 2; ++half) {
        out[2 * half] = vreinterpretq_f32_u16(vzip1q_u16(low[half], high[half]));
        out[2 * half + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[half], high[half]));
    }
}

// 64 weights from 32 bytes, in their natural order. table: [16], rounded to T.
template <class T>
QLK_INLINE void lookup_vectors(const uint8_t* codes, const float* table, Vec* out) {
    const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t bytes = vld1q_u8(codes + 16 * i);
        // The high nibble is the first code of a byte.
        const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
        lookup16<T>(vzip1q_u8(even, odd), planes, out + 8 * i);
        lookup16<T>(vzip2q_u8(even, odd), planes, out + 8 * i + 4);
    }
}

}  // namespace qlk::cpu::QLK_ISA
