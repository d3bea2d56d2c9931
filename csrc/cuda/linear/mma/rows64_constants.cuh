// Part of rows64.cuh: the constants of a warp's 64 rows of W, decoded for the blocks of four steps at a time.
//
// Formula: absmax = table[code] * nested_absmax + offset, and as pairs.cuh has it for sums of products
//
// Layout: a lane decodes two rows, 32 apart, of each step's block.
//
// Shared memory: the kernel's.
#pragma once

#include <cstdint>

#include "cuda/common/pairs.cuh"

namespace qlk::cuda {

// One lane's work. Traits: MiddleTraits.
template <class T, class Traits>
struct MiddleConstants {
    const DeviceWeight& weight;
    typename Traits::Shared& shared;
    unsigned rows, blocks;  // of W, and in a row of it
    unsigned row;           // first of this lane's two
    int self, lane, slice;  // thread in the block, lane in the warp; the warp's slice of K

    // Constants on their way: two rows of W, and in each this warp's blocks of a period's four steps, four blocks
    // apart. Rows past the end of W take the last row's.
    struct Codes {
        uint4 codes[2];   // of each step; without double quantization, the constants' bits
        float nested[2];  // nested_absmax of the first step's block
    };

    // The first block of a row whose constants this lane decodes.
    QLK_DEVICE uint32_t first_of(int i) const { return min(row + i * 32, rows - 1) * blocks; }
    // Whether a period's 16 blocks in a row are 16 aligned bytes, of one group.
    QLK_DEVICE bool aligned() const {
        return Traits::kNested &&
               ((reinterpret_cast<uintptr_t>(weight.absmax_code) | static_cast<uintptr_t>(blocks)) & 15) == 0;
    }

    // period: number of steps / kPeriod.
    QLK_DEVICE Codes fetch(unsigned period) const {
        Codes c{};
        const unsigned in_row = period * (Traits::kPeriod * Traits::kSlices);
        if (in_row + slice >= blocks) return c;
        if (aligned()) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t block = first_of(i) + in_row;
                c.codes[i] = load_global(reinterpret_cast<const uint4*>(weight.absmax_code + block));
                c.nested[i] = load_global(weight.nested_absmax + block / kNestedBlock);
            }
            return c;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t* const to[4] = {&c.codes[i].x, &c.codes[i].y, &c.codes[i].z, &c.codes[i].w};
#pragma unroll
            for (int q = 0; q < Traits::kPeriod; ++q) {
                const unsigned at = in_row + q * Traits::kSlices + slice;
                if (at >= blocks) continue;
                if constexpr (Traits::kNested) {
                    *to[q] = load_global(weight.absmax_code + first_of(i) + at);
                } else {
                    *to[q] = __float_as_uint(load_global(weight.absmax + first_of(i) + at));
                }
            }
            if constexpr (Traits::kNested) {
                c.nested[i] = load_global(weight.nested_absmax + (first_of(i) + in_row + slice) / kNestedBlock);
            }
        }
        return c;
    }

    QLK_DEVICE float table_entry(uint32_t code) const { return load_shared(shared.nested_table + code); }

    // Decodes a period's constants for this warp.
    QLK_DEVICE void store(unsigned period, const Codes& c) {
        const float offset = Traits::kNested ? load_shared(&shared.offset) : 0.0f;
        if (aligned()) {
            each(c, [&](int i, int, uint32_t code) {
                const float entry = table_entry(prmt(code, 0, 0x4440 | slice));
                return __fadd_rn(__fmul_rn(entry, c.nested[i]), offset);
            });
        } else {
            each(c, [&](int i, int q, uint32_t code) {
                if (!Traits::kNested) return __uint_as_float(code);
                const unsigned in_row = period * (Traits::kPeriod * Traits::kSlices) + slice;
                const uint32_t of_block = (first_of(i) + in_row + q * Traits::kSlices) / kNestedBlock;
                float nested = c.nested[i];
                // The next group begins in this period.
                if (of_block != (first_of(i) + in_row) / kNestedBlock && in_row + q * Traits::kSlices < blocks) {
                    nested = load_global(weight.nested_absmax + of_block);
                }
                return __fadd_rn(__fmul_rn(table_entry(code), nested), offset);
            });
        }
    }

    // Stores constant(row, step, code) for each row and step of a period.
    template <class Constant>
    QLK_DEVICE void each(const Codes& c, Constant constant) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t codes[Traits::kPeriod] = {c.codes[i].x, c.codes[i].y, c.codes[i].z, c.codes[i].w};
#pragma unroll
            for (int q = 0; q < Traits::kPeriod; ++q) {
                const float value = pair_constant<T>(constant(i, q, codes[q]));
                store_shared(&shared.constants[self / 32][q][lane + i * 32], value);
            }
        }
    }
};

}  // namespace qlk::cuda
