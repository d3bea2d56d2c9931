// The forward product on tensor cores for up to 8 rows of x. The dispatch table picks it up to 4 rows, where reading W
// takes the time.
//
// Formula: y = u B^T + x W^T + bias
//
// Layout:
//     block    16 warps; takes groups of 1, 2 or 4 times 8 rows of W, one group after the other
//     warp     8 rows of W, and every slices-th chunk of 128 columns
//     lane     32 codes of a chunk, 16 bytes of one row: the right operand of eight products of 16 x 8 x 16, in the
//              order in which they lie in memory. x is laid out once in the same order
//     ahead    kAhead chunks of codes under way in registers, across groups
//     sums     warps that share rows add theirs in the order of the warps, one barrier a group
//
// Shared memory: 64 KiB of level pairs for each byte and lane, 1 KiB for the table of constants, all of x, and the
//     partial sums of two groups: few_shared(m, k) bytes.
//
// Edges: past K a lane reads the row's last block again and takes it for zeros, which meet zeros in x. Past the last
//     row of W or x it reads another row, whose sums are not stored. So the main loop needs no predicates.
//
// Why: the table takes 2.5 issue slots a weight. docs/design/notes-cuda.md, "Up to 8 rows", has the count, and how 8
//     rows use a product made for 16.
#pragma once

#include "cuda/common/bias.cuh"
#include "cuda/common/compiled.cuh"
#include "cuda/common/decode.cuh"
#include "cuda/common/dispatch.h"

namespace qlk::cuda {

// Matrices are row-major. Sizes are in elements.
template <class T>
struct FewArguments {
    DeviceWeight weight;  // W [n, k]
    int64_t n, k;
    const T* x;         // [m, k]
    const T* low_left;  // u [m, r]
    const T* lora_b;    // [n, r]
    Bias<T> bias;       // [n]
    T* y;               // [m, n]
    int64_t r;          // rank of the adapter, 0 for none
    int m;              // rows of x, up to 8
    int row_tiles;      // 1, 2 or 4: tiles of 8 rows of W in a group
    bool x_aligned;     // rows of x are 16-byte aligned
    bool low_aligned;   // rows of u and lora_b are 8-byte aligned
};

struct FewTraits {
    static constexpr int kWarps = kFewWarps, kThreads = kWarps * 32;
    static constexpr int kAhead = 4;    // chunks whose codes are under way
    static constexpr int kChunk = 128;  // columns of W, two blocks

    // x and the partial sums of two groups follow it.
    struct Shared {
        float2 pairs[256][32];          // the two levels of each byte, a copy for each lane
        float constants[kNestedBlock];  // the table of double-quantized constants
    };
    static constexpr size_t kLeastShared = few_shared(1, kBlock);
    static_assert(kThreads == 2 * 256, "two threads fill an entry of the table");
};

// One thread's state and work. T: bf16 or fp16. kNested: the constants are double-quantized.
template <class T, bool kNested>
struct Few {
    using Traits = FewTraits;

    const FewArguments<T>& a;
    typename Traits::Shared& shared;
    uint4* x;              // [chunks][m][4 pieces][4 quarters]
    float* sums;           // [2][slices][m][sums_pitch]
    int sums_pitch;        // float32 numbers
    int self, lane, warp;  // thread in the block, lane in the warp, warp in the block
    int slices, slice;     // warps that share 8 rows of W; this warp has every slices-th chunk
    int tile;              // which 8 rows of the group
    int chunks;            // in a row of W
    float offset;          // mean of the constants, when they are double-quantized

    // Half a block on its way.
    struct Codes {
        uint4 codes;
        uint32_t constant;  // code of the block's constant; without double quantization, its bits
        float nested;       // nested_absmax of the constant's group
    };

    // The block of W that this lane reads next: the index of its row's first block, and its own index in the row.
    struct Cursor {
        uint32_t first, in_row;
    };

    // The cursor at this lane's first block of a group.
    QLK_DEVICE Cursor begin(int64_t group) const {
        const int64_t row = (group * a.row_tiles + tile) * 8 + lane / 4;
        const uint32_t blocks = static_cast<uint32_t>(a.k / kBlock);
        return {row < a.n ? static_cast<uint32_t>(row) * blocks : 0, static_cast<uint32_t>(slice * 2 + lane % 4 / 2)};
    }

    // Loads this lane's codes of a chunk, half a block, and moves the cursor on.
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

    // Slot of a 16-byte piece of x: 8 of the 32 elements in a quarter of a chunk. Odd rows swap pieces 0 and 1, and 2
    // and 3, so that two rows read at once lie in different banks.
    QLK_DEVICE static int x_slot(int row, int piece, int quarter) {
        return (row * 4 + (piece ^ (row & 1))) * 4 + quarter;
    }

    // The two weights of byte kByte of `codes`. lane_bytes: 8 * lane.
    template <int kByte>
    QLK_DEVICE uint32_t pair(uint32_t codes, uint32_t lane_bytes, float absmax) const {
        // {0, 0, byte, 8 * lane}: offset of the byte's levels in this lane's copy of the table.
        const uint32_t at = prmt(codes, lane_bytes, 0x5504 | kByte << 4);
        const float2 levels =
            load_shared(reinterpret_cast<const float2*>(reinterpret_cast<const unsigned char*>(shared.pairs) + at));
        return pack_pair<T>(__fmul_rn(levels.x, absmax), __fmul_rn(levels.y, absmax));
    }

    // sum += x W^T for this lane's part of a chunk. even, odd: where it reads x, for even and for odd pieces.
    QLK_DEVICE void multiply(const Codes& c, const uint4* even, const uint4* odd, float absmax,
                             float (&sum)[2][4]) const {
        const uint32_t words[4] = {c.codes.x, c.codes.y, c.codes.z, c.codes.w};
        const uint32_t lane_bytes = static_cast<uint32_t>(lane) * 8;
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
            const uint32_t pairs[4] = {
                pair<0>(words[piece], lane_bytes, absmax), pair<1>(words[piece], lane_bytes, absmax),
                pair<2>(words[piece], lane_bytes, absmax), pair<3>(words[piece], lane_bytes, absmax)};
            // Two chains of sums: a product waits for the one before the last, not for the last.
            const uint4 row = load_shared((piece % 2 ? odd : even) + piece * 4);
            mma_16x8x16<T>(sum[0], {row.x, row.y, row.z, row.w}, pairs[0], pairs[2]);
            mma_16x8x16<T>(sum[1], {row.x, row.y, row.z, row.w}, pairs[1], pairs[3]);
        }
    }

    // Adds u B^T, 16 of r at a time; the warps of a tile take turns. Rows g + 8 are unused.
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

    // Fills the tables, and lays out x in the order of the products. The levels go through shuffles: the compiler would
    // load levels[byte >> 4] again for each store, and lanes with different indices into constant memory take turns.
    QLK_DEVICE void prepare() {
        const int byte = self / 2;
        const float level = a.weight.levels[lane % 16];
        const float high = __shfl_sync(kAllLanes, level, byte >> 4, 16);
        const float low = __shfl_sync(kAllLanes, level, byte & 15, 16);
        const float4 twice = make_float4(high, low, high, low);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // Neighbouring lanes start at different banks.
            store_shared(reinterpret_cast<float4*>(&shared.pairs[byte][self % 2 * 16]) + (i + lane) % 8, twice);
        }
        if (kNested && self < kNestedBlock) {
            store_shared(shared.constants + self, load_global(a.weight.nested_table + self));
        }
#pragma unroll 1
        for (int i = self; i < chunks * a.m * 16; i += Traits::kThreads) {
            const int quarter = i % 4, piece = i / 4 % 4, row = i / 16 % a.m, chunk = i / 16 / a.m;
            store_shared(x + chunk * a.m * 16 + x_slot(row, piece, quarter), load_x(row, chunk, piece, quarter));
        }
    }

    // Eight elements of x, zeros past K.
    QLK_DEVICE uint4 load_x(int row, int chunk, int piece, int quarter) const {
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

    // Adds the sums of the warps that share rows, and stores the group's outputs. buffer: 0 or 1, in turn.
    QLK_DEVICE void finish(int64_t group, int buffer, const float (&sum)[2][4]) {
        float* const mine = sums + buffer * slices * a.m * sums_pitch;
        const int row = lane / 4;
        float* const to = mine + (slice * a.m + row) * sums_pitch + tile * 8 + lane % 4 * 2;
        if (row < a.m) {
            store_shared(reinterpret_cast<float2*>(to), make_float2(sum[0][0] + sum[1][2], sum[0][1] + sum[1][3]));
        }
        // The next group uses the other buffer, so late threads can still read this one.
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

    // All groups of this block.
    QLK_DEVICE void run() {
        const int64_t groups = (a.n + a.row_tiles * 8 - 1) / (a.row_tiles * 8);
        const int mine = (chunks - slice + slices - 1) / slices;  // this warp's chunks in a group, perhaps none
        const int x_chunk = a.m * 16;
        const int row = lane / 4 < a.m ? lane / 4 : a.m - 1;
        const uint4* const x_first = x + slice * x_chunk;
        const uint4* const first_even = x_first + x_slot(row, 0, lane % 4);
        const uint4* const first_odd = x_first + x_slot(row, 1, lane % 4) - 4;
        // Where this lane's half of the last chunk lies past K, if it does. Its weights have to become zeros: one that
        // rounds to infinity would turn the zeros in x into NaN.
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
                // After this group's last chunks come the next group's first.
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
            if (group == blockIdx.x) griddep_wait();  // for u: the launch that makes it may still be running
            low_rank(group, sum[0]);
            finish(group, buffer, sum);
            group = next_group;
        }
    }
};

// Grid: as many blocks as multiprocessors, or as groups when there are fewer. Dynamic shared memory: few_shared(m, k).
template <class T, bool kNested>
__global__ void __launch_bounds__(FewTraits::kThreads, 1) few_kernel(const __grid_constant__ FewArguments<T> a) {
    if constexpr (!kRuns<T, FewTraits::kLeastShared>) return trap();
    auto& shared = shared_memory<FewTraits::Shared>();
    const int self = static_cast<int>(threadIdx.x), warp = self / 32;
    const int slices = FewTraits::kWarps / a.row_tiles;
    const int chunks = static_cast<int>((a.k + FewTraits::kChunk - 1) / FewTraits::kChunk);
    uint4* const x = reinterpret_cast<uint4*>(&shared + 1);
    Few<T, kNested> few{
        a,
        shared,
        x,
        reinterpret_cast<float*>(x + chunks * a.m * 16),
        a.row_tiles == 1 ? 8 : a.row_tiles * 8 + 8,  // puts the rows of a warp's sums in different banks
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
