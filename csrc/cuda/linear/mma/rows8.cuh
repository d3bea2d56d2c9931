// y = u B^T + x W^T + bias for up to 8 rows of x; for up to 4, where reading W is what takes time, nothing is faster.
//
// A block holds x whole, in shared memory, and takes groups of 1, 2 or 4 times 8 rows of W. Its 16 warps share a group:
// a warp has 8 rows and every so many chunks of 128 columns. Of a chunk a lane has 32 codes, 16 bytes, of one row; they
// are the right operand of eight products of 16 x 8 x 16, in the order in which they lie: the order of the depth is
// free as long as x comes in the same one, and x is laid out so once. The sums of the warps that share rows are added
// in the order of the warps, by shared memory, one barrier a group.
//
// Decoding goes by a table of the two levels of each byte, once for each lane, so that 32 lanes with 32 bytes have no
// bank conflict. For two weights: a PRMT makes the address out of the byte and the lane, a load of 64 bits, two
// multiplications by the block's constant, one conversion: 5, or 2.5 issue slots a weight, against 3.1 of decode.cuh,
// and a quarter of its integer instructions; shared memory gives 32 weights a clock. Weights are rounded as dequantize
// rounds them, which no table of finished pairs could have: its entries would have to be those of the block's constant.
//
// What a lane reads of W is asked for kAhead chunks ahead, into registers, across the groups. Beyond K it reads the
// last block of the row again, and takes it for zeros, which meet zeros in x; beyond the last row of W or of x another
// row, whose sums are not stored. That spares the main loop its predicates.
//
// 8 rows of x leave half of a product's 16 without use. Four registers of x, pairs 0 to 3 of a row, would have to be
// spread over rows g and g + 8 with zeros between; instead all four go in as they are, once with pairs 0 and 2 of W,
// whose sum is in row g, and once with pairs 1 and 3, whose sum is in row g + 8. What the other halves compute means
// nothing.
//
// Of the constants of its blocks a request reads two bytes from each of eight rows: as many sectors as rows. 16 chunks
// share such a sector, so that it comes from L1.
#pragma once

#include "cuda/common/bias.cuh"
#include "cuda/common/decode.cuh"
#include "cuda/linear/compiled.cuh"
#include "cuda/linear/dispatch.h"

namespace qlk::cuda {

template <class T>
struct FewArguments {
    DeviceWeight weight;
    int64_t n, k;
    const T* x;         // [m, k]
    const T* low_left;  // u [m, r]
    const T* lora_b;    // [n, r]
    Bias<T> bias;
    T* y;  // [m, n]
    int64_t r;
    int m;
    int row_tiles;     // of a group
    bool x_aligned;    // its rows lie on 16 bytes
    bool low_aligned;  // those of u and lora_b lie on 8
};

struct FewTraits {
    static constexpr int kWarps = kFewWarps, kThreads = kWarps * 32;
    static constexpr int kAhead = 4;
    static constexpr int kChunk = 128;

    // Behind it: x, and the partial sums of two groups.
    struct Shared {
        float2 pairs[256][32];
        float constants[kNestedBlock];
    };
    static constexpr size_t kLeastShared = few_shared(1, kBlock);
    static_assert(kThreads == 2 * 256, "two threads fill an entry of the table");
};

// kNested: the constants are double-quantized.
template <class T, bool kNested>
struct Few {
    using Traits = FewTraits;

    const FewArguments<T>& a;
    typename Traits::Shared& shared;
    uint4* x;     // [chunks][m][4 pieces][4]
    float* sums;  // [2][slices][m][sums_pitch]
    int sums_pitch;
    int self, lane, warp;
    int slices, slice, tile;  // the warps of a group: which chunks this one has, which 8 rows
    int chunks;
    float offset;  // of the constants

    struct Codes {
        uint4 codes;
        uint32_t constant;  // the code of the block's constant, or its bits
        float nested;
    };

    // Where this lane reads next: a block of W, by the number of its row's first and its own in the row.
    struct Cursor {
        uint32_t first, in_row;
    };

    QLK_DEVICE Cursor begin(int64_t group) const {
        const int64_t row = (group * a.row_tiles + tile) * 8 + lane / 4;
        const uint32_t blocks = static_cast<uint32_t>(a.k / kBlock);
        return {row < a.n ? static_cast<uint32_t>(row) * blocks : 0, static_cast<uint32_t>(slice * 2 + lane % 4 / 2)};
    }

    // This lane's codes of a chunk, half a block.
    QLK_DEVICE Codes fetch(Cursor& at) const {
        const uint32_t last = static_cast<uint32_t>(a.k / kBlock) - 1;
        const uint32_t block = at.first + (at.in_row < last ? at.in_row : last);
        Codes c;
        c.codes = ld_global_once_16(a.weight.packed + static_cast<uint64_t>(block) * (kBlock / 2) + lane % 2 * 16);
        if constexpr (kNested) {
            c.constant = load_global(a.weight.absmax_code + block);
            c.nested = load_global(a.weight.nested_absmax + block / kNestedBlock);
        } else {
            c.constant = __float_as_uint(load_global(a.weight.absmax + block));
            c.nested = 0.0f;
        }
        at.in_row += 2 * slices;
        return c;
    }

    QLK_DEVICE float constant(const Codes& c) const {
        if constexpr (!kNested) return __uint_as_float(c.constant);
        return __fadd_rn(__fmul_rn(load_shared(shared.constants + c.constant), c.nested), offset);
    }

    // Where x has a 16-byte piece of a row, 8 of the 32 elements of a quarter of a chunk. Odd rows have pieces 0 and 1,
    // and 2 and 3, the other way round: two rows read at once lie in different banks.
    QLK_DEVICE static int x_place(int row, int piece, int quarter) {
        return (row * 4 + (piece ^ (row & 1))) * 4 + quarter;
    }

    // Two weights of a byte of `codes`.
    template <int kByte>
    QLK_DEVICE uint32_t pair(uint32_t codes, uint32_t lane_bytes, float absmax) const {
        // {0, 0, the byte, 8 times the lane}: where the table has the byte's levels for this lane.
        const uint32_t at = prmt(codes, lane_bytes, 0x5504 | kByte << 4);
        const float2 levels =
            load_shared(reinterpret_cast<const float2*>(reinterpret_cast<const unsigned char*>(shared.pairs) + at));
        return pack_pair<T>(__fmul_rn(levels.x, absmax), __fmul_rn(levels.y, absmax));
    }

    // mine: what this lane reads of x for the chunk, by even and by odd pieces.
    QLK_DEVICE void multiply(const Codes& c, const uint4* even, const uint4* odd, float absmax,
                             float (&sum)[2][4]) const {
        const uint32_t words[4] = {c.codes.x, c.codes.y, c.codes.z, c.codes.w};
        const uint32_t lane_bytes = static_cast<uint32_t>(lane) * 8;
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
            const uint32_t pairs[4] = {
                pair<0>(words[piece], lane_bytes, absmax), pair<1>(words[piece], lane_bytes, absmax),
                pair<2>(words[piece], lane_bytes, absmax), pair<3>(words[piece], lane_bytes, absmax)};
            // Two chains of sums: one product waits for the last but one.
            const uint4 row = load_shared((piece % 2 ? odd : even) + piece * 4);
            mma_16x8x16<T>(sum[0], {row.x, row.y, row.z, row.w}, pairs[0], pairs[2]);
            mma_16x8x16<T>(sum[1], {row.x, row.y, row.z, row.w}, pairs[1], pairs[3]);
        }
    }

    // u B^T: 16 of r at a time, the warps of a tile in turn. Row g + 8 is nobody's.
    QLK_DEVICE void low_rank(int64_t group, float (&sum)[4]) const {
        const int64_t row = (group * a.row_tiles + tile) * 8 + lane / 4;
#pragma unroll 1
        for (int64_t first = slice * 16; first < a.r; first += slices * 16) {
            const int64_t at = first + lane % 4 * 4;
            const uint2 right = load_four(a.lora_b, a.r, row < a.n, row, at, a.low_aligned);
            const uint2 left = load_four(a.low_left, a.r, lane / 4 < a.m, lane / 4, at, a.low_aligned);
            mma_16x8x16<T>(sum, {left.x, 0, left.y, 0}, right.x, right.y);
        }
    }

    // The tables, and x in the order of the products.
    QLK_DEVICE void prepare() {
        const int byte = self / 2;
        const float2 levels = make_float2(a.weight.levels[byte >> 4], a.weight.levels[byte & 15]);
        const float4 twice = make_float4(levels.x, levels.y, levels.x, levels.y);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // Neighbouring lanes begin at different banks.
            store_shared(reinterpret_cast<float4*>(&shared.pairs[byte][self % 2 * 16]) + (i + lane) % 8, twice);
        }
        if (kNested && self < kNestedBlock) {
            store_shared(shared.constants + self, load_global(a.weight.nested_table + self));
        }
#pragma unroll 1
        for (int i = self; i < chunks * a.m * 16; i += Traits::kThreads) {
            const int quarter = i % 4, piece = i / 4 % 4, row = i / 16 % a.m, chunk = i / 16 / a.m;
            store_shared(x + chunk * a.m * 16 + x_place(row, piece, quarter), x_from(row, chunk, piece, quarter));
        }
    }

    // Eight elements of x; zeros beyond it.
    QLK_DEVICE uint4 x_from(int row, int chunk, int piece, int quarter) const {
        const int64_t column = static_cast<int64_t>(chunk) * Traits::kChunk + quarter * 32 + piece * 8;
        if (column >= a.k) return make_uint4(0, 0, 0, 0);
        const T* const from = a.x + row * a.k + column;
        if (a.x_aligned) return load_global(reinterpret_cast<const uint4*>(from));
        float e[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) e[j] = to_float(load_global(from + j));
        return make_uint4(pack_pair<T>(e[0], e[1]), pack_pair<T>(e[2], e[3]), pack_pair<T>(e[4], e[5]),
                          pack_pair<T>(e[6], e[7]));
    }

    QLK_DEVICE void finish(int64_t group, int buffer, const float (&sum)[2][4]) {
        float* const mine = sums + buffer * slices * a.m * sums_pitch;
        const int row = lane / 4;
        float* const to = mine + (slice * a.m + row) * sums_pitch + tile * 8 + lane % 4 * 2;
        if (row < a.m) {
            store_shared(reinterpret_cast<float2*>(to), make_float2(sum[0][0] + sum[1][2], sum[0][1] + sum[1][3]));
        }
        // The other buffer serves the next group: who is late here still reads this one.
        __syncthreads();
        const int wide = a.row_tiles * 8;
        for (int i = self; i < wide * a.m; i += Traits::kThreads) {
            const int64_t column = group * wide + i % wide, out_row = i / wide;
            if (column >= a.n) continue;
            float total = a.bias.at(column);
            for (int s = 0; s < slices; ++s) total += load_shared(mine + (s * a.m + out_row) * sums_pitch + i % wide);
            store_global(a.y + out_row * a.n + column, from_float<T>(total));
        }
    }

    QLK_DEVICE void run() {
        const int64_t groups = (a.n + a.row_tiles * 8 - 1) / (a.row_tiles * 8);
        const int mine = (chunks - slice + slices - 1) / slices;  // chunks of this warp in a group; 0 if there are few
        const int x_chunk = a.m * 16;
        const int row = lane / 4 < a.m ? lane / 4 : a.m - 1;
        const uint4* const x_first = x + slice * x_chunk;
        const uint4* const first_even = x_first + x_place(row, 0, lane % 4);
        const uint4* const first_odd = x_first + x_place(row, 1, lane % 4) - 4;
        // Where this lane's half of the last chunk lies beyond K. What it reads for it has to become zeros: a weight
        // that rounds to infinity would make NaN of the zeros in x.
        const int beyond = a.k % Traits::kChunk != 0 && lane % 4 >= 2 ? (chunks - 1 - slice) * x_chunk : -1;
        int64_t group = blockIdx.x;
        Cursor at = begin(group);
        Codes ahead[Traits::kAhead];
#pragma unroll
        for (int i = 0; i < Traits::kAhead; ++i) ahead[i] = fetch(at);
        prepare();
        __syncthreads();
        for (int buffer = 0; group < groups; buffer ^= 1) {
            float sum[2][4] = {};
            const int64_t next_group = group + gridDim.x;
            int x_at = 0;
#pragma unroll 1
            for (int first = 0; first < mine; first += Traits::kAhead) {
                // Behind the last of this group come the first of the next.
                if (first + Traits::kAhead >= mine) at = begin(next_group);
#pragma unroll
                for (int i = 0; i < Traits::kAhead; ++i) {
                    const Codes now = ahead[i];
                    ahead[i] = fetch(at);
                    if (first + i >= mine) continue;
                    const float absmax = x_at == beyond ? 0.0f : constant(now);
                    multiply(now, first_even + x_at, first_odd + x_at, absmax, sum);
                    x_at += slices * x_chunk;
                }
            }
            if (group == blockIdx.x) griddep_wait();  // for u, made by the launch before, which may still run
            low_rank(group, sum[0]);
            finish(group, buffer, sum);
            group = next_group;
        }
    }
};

template <class T, bool kNested>
__global__ void __launch_bounds__(FewTraits::kThreads, 1) few_kernel(const __grid_constant__ FewArguments<T> a) {
    if constexpr (!kRuns<T, FewTraits::kLeastShared>) return trap();
    auto& shared = shared_memory<FewTraits::Shared>();
    const int self = static_cast<int>(threadIdx.x), warp = self / 32;
    const int slices = FewTraits::kWarps / a.row_tiles;
    const int chunks = static_cast<int>((a.k + FewTraits::kChunk - 1) / FewTraits::kChunk);
    uint4* const x = reinterpret_cast<uint4*>(&shared + 1);
    Few<T, kNested> few{a,
                        shared,
                        x,
                        reinterpret_cast<float*>(x + chunks * a.m * 16),
                        a.row_tiles == 1 ? 8 : a.row_tiles * 8 + 8,  // rows of a warp's sums in different banks
                        self,
                        self % 32,
                        warp,
                        slices,
                        warp / a.row_tiles,
                        warp % a.row_tiles,
                        chunks,
                        kNested ? load_global(a.weight.nested_offset) : 0.0f};
    few.run();
}

}  // namespace qlk::cuda
