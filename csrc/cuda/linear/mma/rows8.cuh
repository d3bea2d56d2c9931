// The forward product on tensor cores for up to 8 rows of x. The dispatch table picks it up to 4 rows, where reading W
// takes the time.
//
// Formula: y = u B^T + x W^T + bias
//
// Layout:
//     block    16 warps; takes groups of 1, 2 or 4 times 16 rows of W, one group after the other
//     warp     16 rows of W, and every slices-th chunk of 128 columns, two blocks
//     product  W is the left operand, 16 x 16, and x the right one, 16 x 8
//     lane     with g = lane / 4 and t = lane % 4: 8 bytes, codes 16t to 16t + 15, of each block of rows g and g + 8,
//     in
//              the order in which they lie in memory. x is laid out once in the same order
//     constant a lane decodes that of one row and block; the four lanes that need it get it through shuffles
//     ahead    kAhead chunks of codes under way in registers, across groups
//     sums     warps that share rows add theirs in the order of the warps, one barrier a group
//
// Shared memory: 64 KiB of level pairs for each byte and lane, with x in the gaps if it fits there, 1 KiB for the table
//     of constants, x otherwise, and the partial sums of two groups: few_shared(m, k) bytes.
//
// Edges: past K nothing is loaded, and what a lane holds from before counts as zeros. Past the last row of W or x it
//     reads another row, whose sums are not stored.
//
// Why: decoding takes one issue slot a weight. docs/design/notes-cuda.md, "Up to 8 rows", has the count.
#pragma once

#include "cuda/common/bias.cuh"
#include "cuda/common/compiled.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/pairs.cuh"

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
    int row_tiles;      // 1, 2 or 4: tiles of 16 rows of W in a group
    int x_bytes;        // of x in shared memory behind the table; 0: it is in the table's gaps
    bool x_aligned;     // rows of x are 16-byte aligned
    bool low_aligned;   // rows of u and lora_b are 8-byte aligned
};

struct FewTraits {
    static constexpr int kWarps = kFewWarps, kThreads = kWarps * 32;
    static constexpr int kAhead = 2;    // chunks whose codes are under way
    static constexpr int kChunk = 128;  // columns of W, two blocks

    // x, if it is not in the gaps of the table, and the partial sums of two groups follow it.
    struct Shared {
        PairRow rows[256];              // the two levels of each byte, a copy for each lane
        float constants[kNestedBlock];  // the table of double-quantized constants
    };
    static constexpr size_t kLeastShared = few_shared(1, kBlock);
};

// One thread's state and work. T: bf16 or fp16. kNested: the constants are double-quantized.
template <class T, bool kNested>
struct Few {
    using Traits = FewTraits;

    const FewArguments<T>& a;
    typename Traits::Shared& shared;
    unsigned char* x;      // [blocks of K][m] units of 128 bytes: a block of a row, pieces in the order of piece_slot
    int x_pitch;           // from one unit to the next, bytes
    float* sums;           // [2][slices][m][sums_pitch]
    int sums_pitch;        // float32 numbers
    int self, lane, warp;  // thread in the block, lane in the warp, warp in the block
    int slices, slice;     // warps that share 16 rows of W; this warp has every slices-th chunk
    int tile;              // which 16 rows of the group
    int chunks;            // in a row of W
    float offset;          // mean of the constants, when they are double-quantized

    // A lane's part of a chunk on its way.
    struct Codes {
        uint2 of[2][2];     // of rows g and g + 8, of two blocks each
        uint32_t constant;  // code of a block's constant; without double quantization, its bits
        float nested;       // nested_absmax of that constant's group
    };

    // What this lane loads next.
    struct Cursor {
        const uint8_t* codes;  // of row g and the chunk's first block
        uint32_t apart;        // from there to row g + 8, bytes
        uint32_t constant;     // number of the block whose constant this lane decodes
        int left;              // blocks of K from the chunk's first on, zero or less where there are none
    };

    // The cursor at this lane's first chunk of a group. Of 16 rows past the end nothing is loaded.
    QLK_DEVICE Cursor begin(int64_t group) const {
        const int64_t tile_row = (group * a.row_tiles + tile) * 16;
        const int64_t wanted = tile_row + lane / 4, row = wanted < a.n ? wanted : 0;
        const int64_t apart = wanted + 8 < a.n ? 8 : 0, blocks = a.k / kBlock, first = slice * 2;
        return {a.weight.packed + (row * blocks + first) * (kBlock / 2) + lane % 4 * 8,
                static_cast<uint32_t>(apart * (a.k / 2)),
                static_cast<uint32_t>((row + lane % 2 * apart) * blocks + first + lane % 4 / 2),
                tile_row < a.n ? static_cast<int>(blocks - first) : 0};
    }

    // Loads this lane's part of a chunk and moves the cursor on. Of what lies past K, what was there before stays.
    QLK_DEVICE void fetch(Codes& c, Cursor& at) const {
        const uint8_t* const rows[2] = {at.codes, at.codes + at.apart};
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            if (block >= at.left) continue;
            c.of[0][block] = ld_global_once_8(rows[0] + block * (kBlock / 2));
            c.of[1][block] = ld_global_once_8(rows[1] + block * (kBlock / 2));
        }
        if (lane % 4 / 2 < at.left) {
            if constexpr (kNested) {
                c.constant = load_global(a.weight.absmax_code + at.constant);
                c.nested = load_global(a.weight.nested_absmax + at.constant / kNestedBlock);
            } else {
                c.constant = __float_as_uint(load_global(a.weight.absmax + at.constant));
            }
        }
        at.codes += slices * kBlock;
        at.constant += slices * 2;
        at.left -= slices * 2;
    }

    QLK_DEVICE float constant(const Codes& c) const {
        if constexpr (!kNested) return pair_constant<T>(__uint_as_float(c.constant));
        return pair_constant<T>(__fadd_rn(__fmul_rn(load_shared(shared.constants + c.constant), c.nested), offset));
    }

    // Slot of a 16-byte piece of x in its unit: 8 of a lane's 16 columns of a block. Odd rows swap halves, so that two
    // rows read at once lie in different banks.
    QLK_DEVICE static int piece_slot(int row, int half, int quarter) { return (half * 4 + quarter) ^ (row & 1) * 4; }
    QLK_DEVICE static int piece_at(int row, int slot) { return slot % 4 * 2 + (slot / 4 ^ (row & 1)); }

    // sum += x W^T for this lane's part of a chunk, and loads another in its place. low, high: where it reads the first
    // and the second half of x's columns in the first block. beyond: its constant lies past K.
    QLK_DEVICE void multiply(Codes& c, Cursor& at, const unsigned char* low, const unsigned char* high, bool beyond,
                             float (&sum)[4]) const {
        const uint32_t lane_bytes = static_cast<uint32_t>(lane) * 4;
        const float mine = beyond ? 0.0f : constant(c);
        uint32_t left[2][4][4];  // operands of the block's four products
#pragma unroll
        for (int block = 0; block < 2; ++block) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const uint32_t codes[2] = {c.of[row][block].x, c.of[row][block].y};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    left[block][half * 2][row] = pair_of<0>(shared.rows, codes[half], lane_bytes);
                    left[block][half * 2][row + 2] = pair_of<1>(shared.rows, codes[half], lane_bytes);
                    left[block][half * 2 + 1][row] = pair_of<2>(shared.rows, codes[half], lane_bytes);
                    left[block][half * 2 + 1][row + 2] = pair_of<3>(shared.rows, codes[half], lane_bytes);
                }
            }
        }
        fetch(c, at);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            const int behind = block * a.m * x_pitch;
            const uint4 x_low = load_shared(reinterpret_cast<const uint4*>(low + behind));
            const uint4 x_high = load_shared(reinterpret_cast<const uint4*>(high + behind));
            float products[4] = {};
            mma_16x8x16<T>(products, left[block][0], x_low.x, x_low.y);
            mma_16x8x16<T>(products, left[block][1], x_low.z, x_low.w);
            mma_16x8x16<T>(products, left[block][2], x_high.x, x_high.y);
            mma_16x8x16<T>(products, left[block][3], x_high.z, x_high.w);
            const float first = __shfl_sync(kAllLanes, mine, block * 2, 4);
            const float second = __shfl_sync(kAllLanes, mine, block * 2 + 1, 4);
            sum[0] = __fmaf_rn(first, products[0], sum[0]);
            sum[1] = __fmaf_rn(first, products[1], sum[1]);
            sum[2] = __fmaf_rn(second, products[2], sum[2]);
            sum[3] = __fmaf_rn(second, products[3], sum[3]);
        }
    }

    // Adds u B^T, 16 of r at a time; the warps of a tile take turns.
    QLK_DEVICE void low_rank(int64_t group, float (&sum)[4]) const {
        const int64_t row = (group * a.row_tiles + tile) * 16 + lane / 4;
#pragma unroll 1
        for (int64_t first = slice * 16; first < a.r; first += slices * 16) {
            const int64_t at = first + lane % 4 * 4;
            const uint2 left = load_four(a.lora_b, a.r, row < a.n, row, at, a.low_aligned);
            const uint2 right = load_four(a.lora_b, a.r, row + 8 < a.n, row + 8, at, a.low_aligned);
            const uint2 u = load_four(a.low_left, a.r, lane / 4 < a.m, lane / 4, at, a.low_aligned);
            mma_16x8x16<T>(sum, {left.x, right.x, left.y, right.y}, u.x, u.y);
        }
    }

    // Fills the tables, and lays out x in the order of the products.
    QLK_DEVICE void prepare() {
        fill_pairs<T, Traits::kThreads>(shared.rows, a.weight.levels[self % 16], self);
        if (kNested && self < kNestedBlock) {
            store_shared(shared.constants + self, load_global(a.weight.nested_table + self));
        }
#pragma unroll 1
        for (int i = self; i < chunks * 2 * a.m * 8; i += Traits::kThreads) {
            const int unit = i / 8, row = unit % a.m;
            store_shared(reinterpret_cast<uint4*>(x + unit * x_pitch) + i % 8,
                         load_x(row, unit / a.m, piece_at(row, i % 8)));
        }
    }

    // Eight elements of x in a block of K, zeros past K.
    QLK_DEVICE uint4 load_x(int row, int block, int piece) const {
        const int64_t column = static_cast<int64_t>(block) * kBlock + piece * 8;
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
    QLK_DEVICE void finish(int64_t group, int buffer, const float (&sum)[4]) {
        float* const mine = sums + buffer * slices * a.m * sums_pitch;
        const int row = lane % 4 * 2;  // of x
        float* const to = mine + (slice * a.m + row) * sums_pitch + tile * 16 + lane / 4;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (row + e >= a.m) continue;
            store_shared(to + e * sums_pitch, sum[e]);
            store_shared(to + e * sums_pitch + 8, sum[e + 2]);
        }
        // The next group uses the other buffer, so late threads can still read this one.
        __syncthreads();
        const int wide = a.row_tiles * 16;
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
        const int64_t groups = (a.n + a.row_tiles * 16 - 1) / (a.row_tiles * 16);
        const int mine = (chunks - slice + slices - 1) / slices;  // this warp's chunks in a group, perhaps none
        const int x_step = slices * 2 * a.m * x_pitch;            // from one of them to the next
        const int row = lane / 4 < a.m ? lane / 4 : a.m - 1;
        const unsigned char* const first = x + (slice * 2 * a.m + row) * x_pitch;
        const unsigned char* const first_low = first + piece_slot(row, 0, lane % 4) * 16;
        const unsigned char* const first_high = first + piece_slot(row, 1, lane % 4) * 16;
        // The last chunk's second block lies past K, if there is an odd number. Its constant has to become zero: what a
        // lane holds from before may be infinite, and would turn the zeros in x into NaN.
        const bool odd = a.k % Traits::kChunk != 0 && lane % 4 >= 2 && (chunks - 1) % slices == slice;
        const int beyond = odd ? mine - 1 : -1;
        int64_t group = blockIdx.x;
        Cursor at = begin(group);
        Codes ahead[Traits::kAhead] = {};
#pragma unroll
        for (int i = 0; i < Traits::kAhead; ++i) fetch(ahead[i], at);
        prepare();
        __syncthreads();
        for (int buffer = 0; group < groups; buffer ^= 1) {
            float sum[4] = {};
            const int64_t next_group = group + gridDim.x;
            int x_at = 0;
#pragma unroll 1
            for (int chunk = 0; chunk < mine; chunk += Traits::kAhead) {
                // After this group's last chunks come the next group's first.
                if (chunk + Traits::kAhead >= mine) at = begin(next_group);
#pragma unroll
                for (int i = 0; i < Traits::kAhead; ++i) {
                    if (chunk + i < mine) {
                        multiply(ahead[i], at, first_low + x_at, first_high + x_at, chunk + i == beyond, sum);
                        x_at += x_step;
                    } else {
                        fetch(ahead[i], at);
                    }
                }
            }
            if (group == blockIdx.x) griddep_wait();  // for u: the launch that makes it may still be running
            low_rank(group, sum);
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
    unsigned char* const behind = reinterpret_cast<unsigned char*>(&shared + 1);
    const bool in_gaps = a.x_bytes == 0;
    Few<T, kNested> few{a,
                        shared,
                        in_gaps ? reinterpret_cast<unsigned char*>(shared.rows[0].room) : behind,
                        in_gaps ? static_cast<int>(sizeof(PairRow)) : 128,
                        reinterpret_cast<float*>(behind + a.x_bytes),
                        a.row_tiles * 16 + 4,  // puts the rows of a warp's sums in different banks
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
