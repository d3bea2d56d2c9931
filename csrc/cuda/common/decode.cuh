// Decodes a block's 64 codes to a 16-bit type in registers, for products on tensor cores.
//
// Formula: round_to_T(level[code] * absmax), exactly what dequantize gives
//
// Registers: a block has one constant, so at most 16 different numbers. A thread computes them once for its block and
//     keeps their low bytes in four registers, their high bytes in four more.
//
// Why: PRMT looks four codes up among 8 bytes; two PRMT and a LOP3 that picks by the codes' top bits look them up among
//     16. 8 codes take 3 instructions to prepare, 2 masks, 8 look-ups, 4 choices and 4 to put the bytes together: 21,
//     or 2.6 a weight, and the tables 32 / 64 = 0.5 more.
#pragma once

#include <ptx.cuh>

#include "cuda/common/weight.cuh"

namespace qlk::cuda {

// Two results in one register, the first in the low half, each rounded to T.
template <class T>
QLK_DEVICE uint32_t pack_pair(float first, float second);
template <>
QLK_DEVICE uint32_t pack_pair<bf16>(float first, float second) {
    return cvt_bf16x2(first, second);
}
template <>
QLK_DEVICE uint32_t pack_pair<fp16>(float first, float second) {
    return cvt_fp16x2(first, second);
}

// Elements at to at + 3 of a row of a matrix [rows, r], zeros outside. inside: the row exists. aligned: rows are 8-byte
// aligned. The matrix may have been written since this kernel began.
template <class T>
QLK_DEVICE uint2 load_four(const T* matrix, int64_t r, bool inside, int64_t row, int64_t at, bool aligned) {
    if (!inside) return make_uint2(0, 0);
    const T* const from = matrix + row * r + at;
    if (aligned) return at < r ? load_changing(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = at + i < r ? to_float(load_changing(from + i)) : 0.0f;
    return make_uint2(pack_pair<T>(e[0], e[1]), pack_pair<T>(e[2], e[3]));
}

// The 16 numbers of a block. T: bf16 or fp16.
template <class T>
struct BlockTable {
    uint32_t low[4], high[4];  // low and high bytes of entries 0 to 15

    QLK_DEVICE void fill(const float* levels, float absmax) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t first = pack_pair<T>(__fmul_rn(levels[4 * i], absmax), __fmul_rn(levels[4 * i + 1], absmax));
            const uint32_t second =
                pack_pair<T>(__fmul_rn(levels[4 * i + 2], absmax), __fmul_rn(levels[4 * i + 3], absmax));
            low[i] = prmt(first, second, 0x6420);
            high[i] = prmt(first, second, 0x7531);
        }
    }

    // Four numbers, for nibbles 1, 0, 3, 2 of `codes`, whose top bits are cleared. top: a byte of ones for each code
    // whose top bit was set.
    QLK_DEVICE void look_up(uint32_t codes, uint32_t top, uint32_t& first, uint32_t& second) const {
        const uint32_t l = lop3<0xca>(top, prmt(low[2], low[3], codes), prmt(low[0], low[1], codes));
        const uint32_t h = lop3<0xca>(top, prmt(high[2], high[3], codes), prmt(high[0], high[1], codes));
        first = prmt(l, h, 0x4051);
        second = prmt(l, h, 0x6273);
    }

    // Eight numbers from four bytes of codes in their natural order: the high nibble of a byte comes first.
    QLK_DEVICE uint4 decode(uint32_t codes) const {
        // A selector's top bit makes PRMT replicate a sign. The look-ups must not do that; the masks do, on purpose.
        const uint32_t selector = codes & 0x77777777u, shifted = codes << 4;
        uint4 out;
        look_up(selector, prmt(codes, shifted, 0x9d8c), out.x, out.y);
        look_up(selector >> 16, prmt(codes, shifted, 0xbfae), out.z, out.w);
        return out;
    }
};

}  // namespace qlk::cuda
