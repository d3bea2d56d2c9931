// The forward product on tensor cores for 5 to 64 rows of x, where decoding W takes longer than reading it or
// multiplying.
//
// Formula: y = u B^T + x W^T + bias
//
// Layout:
//     block    256 threads, kRows x 128 outputs; a step is 256 along K
//     warps    8: 2 groups of 64 columns x 4 slices of 64 along K. The two warps of a slice share its x
//     product  W is the left operand, 16 x 16, and x the right one, 16 x 8
//     lane     with g = lane / 4 and t = lane % 4: decodes rows 8g to 8g + 7 of its group's 64 rows of W, two for each
//              of four products, and of each row's block codes 16t to 16t + 15
//     x        pieces of 16 bytes in the order p, t: piece (p, t) is depth 16t + 8p to 16t + 8p + 7. Odd rows swap p:
//              no bank conflicts
//     constant a warp decodes its own for four steps; they multiply the sums of a block, not the weights
//     ahead    codes of two steps in registers, each loaded where one was used; x of up to three by cp.async
//
// Shared memory: 64 KiB of level pairs for each byte and lane, with x in the gaps, 128 bytes for a row, slice and
//     buffer, or the slices' sums in the same place; 9 KiB of constants and their table: kMiddleShared bytes.
//
// Why: each weight is decoded by one lane, into the register that goes into its products, in one issue slot. No barrier
//     stops all warps, so some decode while others multiply. docs/design/notes-cuda.md, "5 to 64 rows", has the clocks
//     and the order of the depth.
#pragma once

#include <cstdint>

#include "cuda/common/compiled.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/pairs.cuh"
#include "cuda/common/splits.cuh"
#include "cuda/linear/mma/rows64_constants.cuh"
#include "cuda/linear/mma/store_four.cuh"

namespace qlk::cuda {

// T: bf16 or fp16.
// kRows_: rows of x in a tile, 8 to 32.
// kNested_: the constants are double-quantized.
template <class T, int kRows_, bool kNested_>
struct MiddleTraits {
    static constexpr bool kNested = kNested_;
    static constexpr int kRows = kRows_, kColumns = 128, kThreads = 256;
    static constexpr int kSlices = 4, kGroups = 2;   // warps along K, and across the columns
    static constexpr int kDepth = kSlices * kBlock;  // of a step
    static constexpr int kPair = kGroups * 32;       // threads that share x
    static constexpr int kPeriod = 4;                // steps whose constants are decoded together
    // Steps whose codes are under way. With 32 rows a second step takes all registers, which the compiler manages for
    // sm_80 and sm_90. On cards with 99 KiB of shared memory these rows keep the tensor cores busy for longer than a
    // load takes.
    static constexpr bool kRoomy = kRows <= 16 || kArchitecture <= 80 || kArchitecture == 90;
    static constexpr int kAhead = kRoomy ? 2 : 1;
    static constexpr int kBuffers = middle_buffers(kRows);  // of x
    static_assert(sizeof(T) == 2 && kRows % 8 == 0);
    static_assert(kGroups * 64 == kColumns && kGroups * kSlices * 32 == kThreads);

    static constexpr int kRowsAtOnce = middle_rows_at_once(kRows);  // whose sums the slices add in one go
    struct Shared {
        // The table; in the room beside it x, 128 bytes a row, buffer and slice, or the slices' sums.
        PairRow rows[256];
        float constants[kThreads / 32][kPeriod][64];  // of each warp's rows of W
        float nested_table[kNestedBlock];
        float offset;  // mean of the constants, when they are double-quantized
        int word;      // for Share::add
    };
    static_assert(sizeof(Shared) == kMiddleShared);
    static_assert(kBuffers * kSlices * kRows <= 256 && kSlices * kRowsAtOnce * 4 <= 256);
};

// One thread's state and work for one tile. Traits: MiddleTraits.
template <class T, class Traits>
struct Middle {
    static constexpr int kTiles = Traits::kRows / 8;   // 8 rows of x each
    static constexpr bool kLazy = Traits::kRows > 16;  // compute addresses where they are needed: registers are short
    static constexpr int kOwn = 8;                     // rows of W that a lane decodes
    static constexpr int kSums = Traits::kRows * Traits::kColumns / Traits::kThreads;  // that a thread stores

    const GemmArguments<T>& a;
    typename Traits::Shared& shared;
    unsigned tile;                    // its number among the tiles that this block shares
    unsigned tile_down, tile_across;  // its place in the result, in tiles
    unsigned first, end;              // this warp's part of K, in steps of kDepth: from first to before end
    unsigned blocks;                  // in a row of W
    int self, lane, slice, group;  // thread in the block, lane in the warp; the warp's slice of K and group of columns
    float sum[kTiles][kOwn / 2][4];

    // Where this thread reads next. Running addresses, as in tiles_pipeline.cuh.
    const T* x_next = nullptr;            // first of its pieces, 8 rows apart
    int x_rows = 0;                       // how many of these rows exist
    const uint8_t* codes_next = nullptr;  // row 8g of the group's 64 rows of W
    uint32_t codes_apart = 0;             // from there to the next row, bytes
    int last = 0;                         // of this lane's eight rows of W, or -1 where none exists
    unsigned constant_row = 0;            // first of the two rows whose constants this lane decodes, 32 apart

    QLK_DEVICE static Share share(const GemmArguments<T>& a) {
        return {a.splits, (opaque(static_cast<unsigned>(a.k)) + Traits::kDepth - 1) / Traits::kDepth};
    }
    QLK_DEVICE Share share() const { return share(a); }

    // This thread's indices and its tile's place. Called again where they are needed again: at 32 rows there are no
    // registers to keep them in during the main loop.
    QLK_DEVICE void locate() {
        self = static_cast<int>(opaque(threadIdx.x));
        lane = self % 32;
        slice = self / 32 / Traits::kGroups;
        group = self / 32 % Traits::kGroups;
        const unsigned down = (opaque(static_cast<unsigned>(a.m)) + Traits::kRows - 1) / Traits::kRows;
        const unsigned number = share().number(tile);
        tile_down = number % down;
        tile_across = number / down;
    }

    QLK_DEVICE int64_t first_row() const { return static_cast<int64_t>(tile_down) * Traits::kRows; }
    QLK_DEVICE int64_t first_column() const { return static_cast<int64_t>(tile_across) * Traits::kColumns; }

    // Slot of a 16-byte piece of x among the eight of its row, and the piece in a slot. Odd rows swap their halves.
    QLK_DEVICE static int piece_slot(int row, int half, int quarter) { return (half * 4 + quarter) ^ (row & 1) * 4; }
    QLK_DEVICE static int piece_at(int row, int at) { return at % 4 * 2 + (at / 4 ^ (row & 1)); }

    // Row `row` of this warp's slice of x.
    QLK_DEVICE PairRow* x_row(unsigned step, int row) const {
        return shared.rows + (step % Traits::kBuffers * Traits::kSlices + slice) * Traits::kRows + row;
    }

    // Sets the running addresses to this block's first step.
    QLK_DEVICE void start() {
        locate();
        first = share().from(tile);
        blocks = static_cast<unsigned>(a.k / kBlock);
        // In the last step of a tile a slice may lie past K.
        const unsigned within_k = (blocks + Traits::kSlices - 1 - slice) / Traits::kSlices;
        end = min(share().to(tile), within_k);
        const int row = self % Traits::kPair / 8, column = group * 64 + lane / 4 * 8;
        x_next = a.left + (first_row() + row) * a.k + static_cast<int64_t>(first) * Traits::kDepth + slice * kBlock +
                 piece_at(row, self % 8) * 8;
        const int64_t rows_left = a.m - first_row() - row, columns_left = a.n - first_column() - column;
        x_rows = static_cast<int>((rows_left + 7) / 8);
        codes_next = a.weight.packed + (first_column() + column) * (a.k / 2) +
                     (static_cast<int64_t>(first) * Traits::kSlices + slice) * (kBlock / 2) + lane % 4 * 8;
        codes_apart = opaque(static_cast<uint32_t>(a.k / 2));
        last = static_cast<int>(columns_left > kOwn ? kOwn : columns_left) - 1;
        constant_row = static_cast<unsigned>(first_column()) + group * 64 + lane;
    }

    // A product that one instruction adds to an address. The compiler would hoist running sums out of the loop, into
    // registers that aren't there.
    QLK_DEVICE static uint64_t wide_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

    // Starts the copies of this pair's x of a step. Rows past the end of x are not copied, since their sums are not
    // stored.
    QLK_DEVICE void copy_x(unsigned step) {
        const int row = self % Traits::kPair / 8;
        const int rows = step < end ? x_rows : 0;
        PairRow* const to = x_row(step, row);
        const unsigned char* const from = reinterpret_cast<const unsigned char*>(x_next);
        const uint32_t apart = static_cast<uint32_t>(a.k) * 8 * sizeof(T);
#pragma unroll
        for (uint32_t i = 0; i < Traits::kRows / 8; ++i) {
            if (static_cast<int>(i) < rows) cp_async_16(to[i * 8].room + self % 8, from + wide_product(apart, i));
        }
        x_next += Traits::kDepth;
        cp_async_commit();
    }

    // This lane's codes of row j of eight: 16 of a block. Rows past the end of W take the last row's, whose sums are
    // not stored.
    QLK_DEVICE const uint8_t* codes_at(int j) const {
        const unsigned row = min(j, last);
        return codes_next + wide_product(codes_apart, kLazy ? opaque(row) : row);
    }

    QLK_DEVICE MiddleConstants<T, Traits> of_warp() const {
        return {a.weight, shared, static_cast<unsigned>(a.n), blocks, constant_row, self, lane, slice};
    }

    // The operands of W of two products: rows first and second of a lane, 8 codes of each.
    QLK_DEVICE void left(uint32_t first, uint32_t second, uint32_t (&low)[4], uint32_t (&high)[4]) const {
        const uint32_t lane_bytes = static_cast<uint32_t>(lane) * 4;
        low[0] = pair_of<0>(shared.rows, first, lane_bytes);
        low[1] = pair_of<0>(shared.rows, second, lane_bytes);
        low[2] = pair_of<1>(shared.rows, first, lane_bytes);
        low[3] = pair_of<1>(shared.rows, second, lane_bytes);
        high[0] = pair_of<2>(shared.rows, first, lane_bytes);
        high[1] = pair_of<2>(shared.rows, second, lane_bytes);
        high[2] = pair_of<3>(shared.rows, first, lane_bytes);
        high[3] = pair_of<3>(shared.rows, second, lane_bytes);
    }

    // sum += W x for a step, and loads codes from at(row) in place of those that were used, if there are more.
    template <class At>
    QLK_DEVICE void multiply(unsigned step, uint2 (&codes)[kOwn], At at, bool more) {
        constexpr int kRow = sizeof(PairRow) / sizeof(uint4);
        const uint4* const x_from = x_row(step, lane / 4)->room;
        const float2* const constants =
            reinterpret_cast<const float2*>(shared.constants[self / 32][step % Traits::kPeriod] + lane / 4 * 8);
        uint4 x[2][kTiles];  // two halves of the block
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4* const from = x_from + piece_slot(lane / 4, half, lane % 4);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) x[half][i] = load_shared(from + i * 8 * kRow);
        }
#pragma unroll
        for (int j = 0; j < kOwn; j += 2) {
            uint32_t low[2][4], high[2][4];
            left(codes[j].x, codes[j + 1].x, low[0], high[0]);
            left(codes[j].y, codes[j + 1].y, low[1], high[1]);
            if (more) {
                codes[j] = ld_global_once_8(at(j));
                codes[j + 1] = ld_global_once_8(at(j + 1));
            }
            const float2 absmax = load_shared(constants + j / 2);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                float products[4] = {};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    mma_16x8x16<T>(products, low[half], x[half][i].x, x[half][i].y);
                    mma_16x8x16<T>(products, high[half], x[half][i].z, x[half][i].w);
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& to = sum[i][j / 2][e];
                    to = __fmaf_rn(e < 2 ? absmax.x : absmax.y, products[e], to);
                }
            }
        }
    }

    // Adds u B^T, 16 of r at a time; the slices take turns.
    QLK_DEVICE void low_rank() {
#pragma unroll 1
        for (int64_t first = slice * 16; first < a.r; first += Traits::kSlices * 16) {
            const int64_t at = first + lane % 4 * 4;
            uint2 u[kTiles];
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const int64_t row = first_row() + i * 8 + lane / 4;
                u[i] = load_four(a.low_left, a.r, row < a.m, row, at, a.low_aligned);
            }
#pragma unroll
            for (int j = 0; j < kOwn; j += 2) {
                const int64_t column = first_column() + group * 64 + lane / 4 * 8 + j;
                const uint2 left = load_four(a.low_right, a.r, column < a.n, column, at, a.low_aligned);
                const uint2 right = load_four(a.low_right, a.r, column + 1 < a.n, column + 1, at, a.low_aligned);
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
                    mma_16x8x16<T>(sum[i][j / 2], {left.x, right.x, left.y, right.y}, u[i].x, u[i].y);
                }
            }
        }
    }

    // All of the tile's sums, a slice of K in each warp. begins: with this tile, so the tables are still missing.
    QLK_DEVICE void run(bool begins) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kOwn / 2; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
            }
        }
        start();
        constexpr int kStepBytes = Traits::kSlices * (kBlock / 2);
        uint2 codes[Traits::kAhead][kOwn] = {};
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
#pragma unroll
            for (unsigned i = 0; i < Traits::kAhead; ++i) {
                if (first + i < end && last >= 0) codes[i][j] = ld_global_once_8(codes_at(j) + i * kStepBytes);
            }
        }
        auto constants = of_warp().fetch(first / Traits::kPeriod);
#pragma unroll
        for (unsigned i = 0; i < Traits::kBuffers - 1; ++i) copy_x(first + i);
        if (begins) {
            float level = 0.0f;
            // In the loop over tiles, no load by lane from constant memory.
#pragma unroll
            for (int i = 0; i < 16; ++i) level = self % 16 == i ? a.weight.levels[i] : level;
            fill_pairs<T, Traits::kThreads>(shared_memory<typename Traits::Shared>().rows, level, self);
            if constexpr (Traits::kNested) {
                store_shared(shared.nested_table + self, load_global(a.weight.nested_table + self));
                if (self == 0) store_shared(&shared.offset, load_global(a.weight.nested_offset));
            }
        }
        __syncthreads();
        of_warp().store(first / Traits::kPeriod, constants);
        constants = of_warp().fetch(first / Traits::kPeriod + 1);
#pragma unroll 1
        for (unsigned from = first; from < end; from += Traits::kAhead) {
            codes_next += Traits::kAhead * kStepBytes;
            const uint8_t* rows[kOwn];
#pragma unroll
            for (int j = 0; j < kOwn && !kLazy; ++j) rows[j] = codes_at(j);
#pragma unroll
            for (unsigned i = 0; i < Traits::kAhead; ++i) {
                const unsigned step = from + i;
                if (step >= end) break;
                cp_async_wait<Traits::kBuffers - 2>();
                // Now this step's x and constants are there for both warps of the pair, and both have done the step
                // before. Other warps are not waited for.
                bar_sync(1 + slice, Traits::kPair);
                copy_x(step + Traits::kBuffers - 1);
                const auto at = [&](int j) { return (kLazy ? codes_at(j) : rows[j]) + i * kStepBytes; };
                multiply(step, codes[i], at, step + Traits::kAhead < end && last >= 0);
                const unsigned period = (step + 1) / Traits::kPeriod;
                if ((step + 1) % Traits::kPeriod == 0 && step + 1 < end) {
                    __syncwarp();  // all lanes have read the old ones
                    of_warp().store(period, constants);
                    constants = of_warp().fetch(period + 1);
                }
            }
        }
        griddep_wait();  // for u: the launch that makes it may still be running
        locate();
        if (share().from(tile) == 0) low_rank();
    }

    // Slot of four neighbouring columns in a row of sums: neither writing nor reading them has bank conflicts.
    QLK_DEVICE static int quad_slot(int row, int four) { return four ^ (row >> 1 & 1) ^ (row >> 2 & 1) << 2; }

    // Four columns of a slice's sums. A row of sums takes the room of four rows of the table.
    QLK_DEVICE float4* sums_at(int of, int row, int four) const {
        const int slot = quad_slot(row, four);
        PairRow* const rows = shared.rows + (of * Traits::kRowsAtOnce + row) * 4;
        return reinterpret_cast<float4*>(rows[slot / 8].room + slot % 8);
    }

    // Adds the slices' sums, in their order. This thread ends up with four columns of each of some rows.
    QLK_DEVICE void add_slices(float (&total)[kSums]) {
        locate();
        constexpr int kRows = Traits::kRowsAtOnce;
#pragma unroll
        for (int first = 0; first < Traits::kRows; first += kRows) {
            __syncthreads();  // all reads of x, or of the earlier rows, are done
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = i * 8 + lane % 4 * 2 + e;
#pragma unroll
                    for (int q = 0; q < 2; ++q) {  // columns 8g + 4q to 8g + 4q + 3
                        const float (&even)[4] = sum[first / 8 + i][q * 2];
                        const float (&odd)[4] = sum[first / 8 + i][q * 2 + 1];
                        store_shared(sums_at(slice, row, group * 16 + lane / 4 * 2 + q),
                                     make_float4(even[e], even[e + 2], odd[e], odd[e + 2]));
                    }
                }
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
                const int at = self + i * Traits::kThreads, row = at / 32;
                float4 all = load_shared(sums_at(0, row, at % 32));
#pragma unroll
                for (int s = 1; s < Traits::kSlices; ++s) {
                    const float4 more = load_shared(sums_at(s, row, at % 32));
                    all = make_float4(all.x + more.x, all.y + more.y, all.z + more.z, all.w + more.w);
                }
                float* const to = total + first / 2 + 4 * i;
                to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
            }
        }
    }

    // Four outputs: number `at` of the tile, row after row.
    QLK_DEVICE void store_at(int at, const float4& total) {
        store_four<true>(a, a.n, first_row() + at / 32, first_column() + at % 32 * 4, total);
    }

    QLK_DEVICE static float4 four(const float (&total)[kSums], int i) {
        return make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
    }

    // This thread's outputs.
    QLK_DEVICE void store(float (&total)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) store_at(self + i * Traits::kThreads, four(total, i));
    }

    // The same for the blocks of a cluster, each of which adds and writes its share of the tile.
    QLK_DEVICE void add_cluster_and_store(float (&total)[kSums]) {
        const auto slot = [&](int at) { return sums_at(0, at / 32, at % 32); };
        // Each of these takes the place of a slice's sums that this thread itself has read.
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) store_shared(slot(self + i * Traits::kThreads), four(total, i));
        add_cluster<Traits::kThreads, kSums / 4>(a.splits, slot, [&](int at, const float4& all) { store_at(at, all); });
    }
};

// All tiles, or parts of tiles, of one block.
template <class T, class Traits>
QLK_DEVICE void middle_tiles(const GemmArguments<T>& a) {
    using Shared = typename Traits::Shared;
    const unsigned first = Middle<T, Traits>::share(a).first_tile();
    unsigned tile = first;
#pragma unroll 1
    do {
        auto& shared = opaque_shared_memory<Shared>();
        Middle<T, Traits> middle{a, shared, tile};
        middle.run(tile == first);
        float total[Middle<T, Traits>::kSums];
        middle.add_slices(total);
        if (kClusters && a.splits.cluster) return middle.add_cluster_and_store(total);
        if (middle.share().template add<Traits::kThreads>(tile, total, &shared.word)) middle.store(total);
        __syncthreads();  // sums and the word have been read; the next tile takes their place
    } while (Middle<T, Traits>::share(a).reaches(++tile));
}

// Grid: Plan::blocks() blocks. Dynamic shared memory: sizeof(Traits::Shared).
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) middle_kernel(const __grid_constant__ GemmArguments<T> a) {
    if constexpr (kRuns<T, sizeof(typename Traits::Shared)>) {
        middle_tiles<T, Traits>(a);
    } else {
        trap();
    }
}

}  // namespace qlk::cuda
