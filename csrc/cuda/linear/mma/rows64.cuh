// The forward product on tensor cores for 5 to 64 rows of x, where decoding W takes longer than reading it or
// multiplying.
//
// Formula: y = u B^T + x W^T + bias
//
// Layout:
//     block    256 threads, kRows x 128 outputs; a step is 256 along K
//     warps    8: 2 groups of 64 columns x 4 slices of 64 along K
//     product  W is the left operand, 16 x 16, and x the right one, 16 x 8
//     lane     with g = lane / 4 and t = lane % 4: decodes rows 8g to 8g + 7 of its group's 64 rows of W, two for each
//              of four products, and of each row's block codes 16t to 16t + 15
//     x        pieces of 16 bytes in the order p, t: piece (p, t) is depth 16t + 8p to 16t + 8p + 7. Odd rows swap p:
//              no bank conflicts
//     ahead    codes of the next step in registers, its x in the other buffer by cp.async, its constants looked up
//
// Shared memory: 64 KiB of level pairs for each byte and lane, then 2 * (kRows * 512 + 2176) bytes of x and constants,
//     or the slices' sums in the same place: middle_shared(kRows) bytes.
//
// Why: each weight is decoded by one lane, into the register that goes into its products. docs/design/notes-cuda.md, "5
//     to 64 rows", has the clocks, the order of the depth, and why one row in eight is decoded in registers.
#pragma once

#include "cuda/common/compiled.cuh"
#include "cuda/common/decode.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/splits.cuh"
#include "cuda/linear/mma/tiles_layout.cuh"

namespace qlk::cuda {

// T: bf16 or fp16.
// kRows_: rows of x in a tile, 8 to 64.
// kNested_: the constants are double-quantized.
template <class T, int kRows_, bool kNested_>
struct MiddleTraits {
    static constexpr bool kNested = kNested_;
    static constexpr int kRows = kRows_, kColumns = 128, kThreads = 256;
    static constexpr int kSlices = 4, kGroups = 2;        // warps along K, and across the columns
    static constexpr int kDepth = kSlices * kBlock;       // of a step
    static constexpr int kConstantsPitch = kColumns + 8;  // float32 numbers, so that rows start at different banks
    static_assert(sizeof(T) == 2 && kRows % 8 == 0);
    static_assert(kGroups * 64 == kColumns && kGroups * kSlices * 32 == kThreads);

    static constexpr int kRowsAtOnce = middle_rows_at_once(kRows);  // whose sums the slices add in one go
    struct Loop {
        uint4 x[2][kSlices][kRows * 8];                // of this step and the next
        float constants[2][kSlices][kConstantsPitch];  // one for each column and slice
    };
    struct Shared {
        float2 pairs[256][32];  // the two levels of each byte, a copy for each lane; for all tiles
        union {
            Loop loop;
            float4 sums[kSlices][kRowsAtOnce][kColumns / 4];
        };
    };
    static_assert(sizeof(Shared) == middle_shared(kRows));
};

// One thread's state and work for one tile. Traits: MiddleTraits.
template <class T, class Traits>
struct Middle {
    static constexpr int kTiles = Traits::kRows / 8;  // 8 rows of x each
    // Fetch the next step's codes halfway through a step: that is early enough, and takes fewer registers.
    static constexpr bool kLate = Traits::kRows > 32;
    static constexpr int kOwn = 8;                                                     // rows of W that a lane decodes
    static constexpr int kSums = Traits::kRows * Traits::kColumns / Traits::kThreads;  // that a thread stores

    const GemmArguments<T>& a;
    typename Traits::Shared& shared;
    unsigned tile;                    // its number among the tiles that this block shares
    unsigned tile_down, tile_across;  // its place in the result, in tiles
    int first_step, steps;            // this block's part of K, in steps of kDepth
    int blocks;                       // in a row of W
    float offset;                     // mean of the constants, when they are double-quantized
    int self, lane, slice, group;  // thread in the block, lane in the warp; the warp's slice of K and group of columns
    float sum[kTiles][kOwn / 2][4];

    // Where this thread reads next. Running addresses, as in tiles_pipeline.cuh.
    const T* x_next = nullptr;            // first of its pieces, 8 rows apart
    int x_rows = 0;                       // how many of these rows exist
    const uint8_t* codes_next = nullptr;  // row 8g of the group's 64 rows of W
    int own = 0;                          // how many of this lane's rows of W exist
    uint32_t constant_next = 0;           // first of two blocks whose constants are fetched next, 64 rows apart
    int constant_at = 0;                  // index of these blocks in their rows
    int constant_rows = 0;                // how many of the two rows exist

    QLK_DEVICE static Share share(const GemmArguments<T>& a) {
        return {a.splits, (opaque(static_cast<unsigned>(a.k)) + Traits::kDepth - 1) / Traits::kDepth};
    }
    QLK_DEVICE Share share() const { return share(a); }

    // This thread's indices and its tile's place. Called again where they are needed again: at 64 rows there are no
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

    // Sets the running addresses to this block's first step.
    QLK_DEVICE void start() {
        locate();
        first_step = static_cast<int>(share().from(tile));
        steps = static_cast<int>(share().to(tile)) - first_step;
        blocks = static_cast<int>(a.k / kBlock);
        offset = Traits::kNested ? load_global(a.weight.nested_offset) : 0.0f;
        const int row = self / 32, column = group * 64 + lane / 4 * 8;
        x_next = a.left + (first_row() + row) * a.k + first_step * Traits::kDepth + self / 8 % 4 * kBlock +
                 piece_at(row, self % 8) * 8;
        const auto within = [](int64_t left, int apart) { return static_cast<int>((left + apart - 1) / apart); };
        x_rows = within(a.m - first_row() - row, 8);
        const int64_t block = static_cast<int64_t>(first_step) * Traits::kSlices;
        codes_next =
            a.weight.packed + ((first_column() + column) * blocks + block + slice) * (kBlock / 2) + lane % 4 * 8;
        own = within(a.n - first_column() - column, 1);
        const int64_t constant_row = first_column() + self / Traits::kSlices;
        constant_at = static_cast<int>(block) + self % Traits::kSlices;
        constant_next = static_cast<uint32_t>(constant_row * blocks + constant_at);
        constant_rows = within(a.n - constant_row, 64);
    }

    // A product that one instruction adds to an address. The compiler would hoist running sums out of the loop, into
    // registers that aren't there.
    QLK_DEVICE static uint64_t wide_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

    // Starts the copies of a step's x, by all threads. Rows past the end of x are not copied, since their sums are not
    // stored; neither is depth past K, which is not multiplied.
    QLK_DEVICE void copy_step(int step, int buffer) {
        const int row = self / 32, x_slice = self / 8 % 4;
        const int rows = step * Traits::kSlices + x_slice < blocks ? x_rows : 0;
        uint4* const to = shared.loop.x[buffer][x_slice] + row * 8 + self % 8;
        const unsigned char* const from = reinterpret_cast<const unsigned char*>(x_next);
        const uint32_t apart = static_cast<uint32_t>(a.k) * 8 * sizeof(T);
#pragma unroll
        for (uint32_t i = 0; i < Traits::kRows / 8; ++i) {
            if (static_cast<int>(i) < rows) cp_async_16(to + i * 64, from + wide_product(apart, i));
        }
        x_next += Traits::kDepth;
    }

    // Loads this lane's codes of a step: 16 from each of eight rows of W.
    QLK_DEVICE void fetch_codes(int step, uint2 (&codes)[kOwn]) {
        const int rows = step * Traits::kSlices + slice < blocks ? own : 0;
        const uint32_t apart = static_cast<uint32_t>(a.k) / 2;
#pragma unroll
        for (uint32_t j = 0; j < kOwn; ++j) {
            const uint8_t* const from = codes_next + wide_product(apart, j);
            codes[j] = make_uint2(0, 0);
            if (static_cast<int>(j) < rows) codes[j] = load_global(reinterpret_cast<const uint2*>(from));
        }
        codes_next += Traits::kSlices * (kBlock / 2);
    }

    // Constants on their way, one block in each of two rows. As in tiles_pipeline.cuh they are fetched two steps before
    // they are needed and looked up in their table one step before. Four lanes have the four blocks of a row, so a
    // request touches eight rows. Rows past the end decode to finite garbage, which is never stored.
    struct Constants {
        uint32_t code[2];  // without double quantization, the constants' bits
        float nested[2];
    };

    QLK_DEVICE Constants fetch_constants(bool wanted) {
        Constants c{{0, 0}, {0.0f, 0.0f}};
        const int rows = wanted && constant_at < blocks ? constant_rows : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (i >= rows) continue;
            const uint32_t block = constant_next + i * 64 * static_cast<uint32_t>(blocks);
            if constexpr (Traits::kNested) {
                c.code[i] = load_global(a.weight.absmax_code + block);
                c.nested[i] = load_global(a.weight.nested_absmax + block / kNestedBlock);
            } else {
                c.code[i] = __float_as_uint(load_global(a.weight.absmax + block));
            }
        }
        constant_at += Traits::kSlices;
        constant_next += Traits::kSlices;
        return c;
    }

    QLK_DEVICE float table_entry(uint32_t code) const {
        return Traits::kNested ? load_global(a.weight.nested_table + code) : __uint_as_float(code);
    }

    // Decodes constants from their table entries and stores them to a buffer.
    QLK_DEVICE void store_constants(int buffer, const Constants& c, const float (&entries)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float value = Traits::kNested ? __fadd_rn(__fmul_rn(entries[i], c.nested[i]), offset) : entries[i];
            float* const to = shared.loop.constants[buffer][self % Traits::kSlices] + self / Traits::kSlices + i * 64;
            store_shared(to, value);
        }
    }

    // The two weights of byte kByte of `codes`, rounded once, as dequantize rounds them; see rows8.cuh.
    // lane_bytes: 8 * lane.
    template <int kByte>
    QLK_DEVICE uint32_t pair(uint32_t codes, uint32_t lane_bytes, float absmax) const {
        const uint32_t at = prmt(codes, lane_bytes, 0x5504 | kByte << 4);
        const float2 levels =
            load_shared(reinterpret_cast<const float2*>(reinterpret_cast<const unsigned char*>(shared.pairs) + at));
        return pack_pair<T>(__fmul_rn(levels.x, absmax), __fmul_rn(levels.y, absmax));
    }

    // sum += W x for half of a step: the first or the second eight of a lane's 16 columns along K. absmax: constants of
    // its eight rows of W. last: the table that decodes the last of these rows.
    template <int kHalf>
    QLK_DEVICE void multiply(int buffer, const uint2 (&codes)[kOwn], const float (&absmax)[kOwn],
                             const BlockTable<T>& last) {
        const uint4 right = last.decode(kHalf ? codes[kOwn - 1].y : codes[kOwn - 1].x);
        const uint32_t lane_bytes = static_cast<uint32_t>(lane) * 8;
        const uint4* const from = shared.loop.x[buffer][slice] + lane / 4 * 8 + piece_slot(lane / 4, kHalf, lane % 4);
        uint4 x[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) x[i] = load_shared(from + i * 64);
#pragma unroll
        for (int j = kOwn - 2; j >= 0; j -= 2) {
            const uint32_t first = kHalf ? codes[j].y : codes[j].x, second = kHalf ? codes[j + 1].y : codes[j + 1].x;
            const auto of_second = [&](auto byte, uint32_t decoded) {
                return j + 2 == kOwn ? decoded : pair<decltype(byte)::value>(second, lane_bytes, absmax[j + 1]);
            };
            const uint32_t low[4] = {
                pair<0>(first, lane_bytes, absmax[j]), of_second(std::integral_constant<int, 0>{}, right.x),
                pair<1>(first, lane_bytes, absmax[j]), of_second(std::integral_constant<int, 1>{}, right.y)};
#pragma unroll
            for (int i = 0; i < kTiles; ++i) mma_16x8x16<T>(sum[i][j / 2], low, x[i].x, x[i].y);
            const uint32_t high[4] = {
                pair<2>(first, lane_bytes, absmax[j]), of_second(std::integral_constant<int, 2>{}, right.z),
                pair<3>(first, lane_bytes, absmax[j]), of_second(std::integral_constant<int, 3>{}, right.w)};
#pragma unroll
            for (int i = 0; i < kTiles; ++i) mma_16x8x16<T>(sum[i][j / 2], high, x[i].z, x[i].w);
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

    // All of the tile's sums, a slice of K in each warp.
    QLK_DEVICE void run() {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kOwn / 2; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
            }
        }
        start();
        uint2 codes[kOwn] = {};
        if (steps > 0) {
            copy_step(first_step, 0);
            fetch_codes(first_step, codes);
        }
        cp_async_commit();
        Constants next = fetch_constants(steps > 0);
        store_constants(0, next, {table_entry(next.code[0]), table_entry(next.code[1])});
        next = fetch_constants(steps > 1);
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const int buffer = step % 2, number = first_step + step;
            const bool more = step + 1 < steps;
            uint2 ahead[kOwn] = {};
            float entries[2] = {0.0f, 0.0f};
            if (more) {
                copy_step(number + 1, buffer ^ 1);
                if (!kLate) fetch_codes(number + 1, ahead);
                entries[0] = table_entry(next.code[0]);
                entries[1] = table_entry(next.code[1]);
            }
            cp_async_commit();
            const float4* const constants =
                reinterpret_cast<const float4*>(shared.loop.constants[buffer][slice] + group * 64 + lane / 4 * 8);
            const float4 low = load_shared(constants), high = load_shared(constants + 1);
            const float absmax[kOwn] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const bool inside = number * Traits::kSlices + slice < blocks;  // past K nothing is multiplied
            BlockTable<T> last;
            last.fill(a.weight.levels, absmax[kOwn - 1]);
            if (inside) multiply<0>(buffer, codes, absmax, last);
            if (more) {
                if (kLate) fetch_codes(number + 1, ahead);
                store_constants(buffer ^ 1, next, entries);
                next = fetch_constants(step + 2 < steps);
            }
            // At 64 rows there are no registers to keep the table in.
            if (kLate) last.fill(a.weight.levels, load_shared(constants + 1).w);
            if (inside) multiply<1>(buffer, codes, absmax, last);
#pragma unroll
            for (int j = 0; j < kOwn; ++j) codes[j] = ahead[j];
            // Now the next step's x and constants are there, and all reads of this step's are done.
            cp_async_wait<0>();
            __syncthreads();
        }
        griddep_wait();  // for u: the launch that makes it may still be running
        locate();
        if (share().from(tile) == 0) low_rank();
    }

    // Slot of four neighbouring columns in a row of sums: neither writing nor reading them has bank conflicts.
    QLK_DEVICE static int quad_slot(int row, int four) { return four ^ (row >> 1 & 1) ^ (row >> 2 & 1) << 2; }

    // Adds the slices' sums, in their order. This thread ends up with four columns of each of some rows.
    QLK_DEVICE void add_slices(float (&total)[kSums]) {
        locate();
        constexpr int kRows = Traits::kRowsAtOnce;
#pragma unroll
        for (int first = 0; first < Traits::kRows; first += kRows) {
            if (first > 0) __syncthreads();  // all reads of the earlier rows are done
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = i * 8 + lane % 4 * 2 + e;
                    float4* const to = shared.sums[slice][row];
#pragma unroll
                    for (int q = 0; q < 2; ++q) {  // columns 8g + 4q to 8g + 4q + 3
                        const float (&even)[4] = sum[first / 8 + i][q * 2];
                        const float (&odd)[4] = sum[first / 8 + i][q * 2 + 1];
                        store_shared(to + quad_slot(row, group * 16 + lane / 4 * 2 + q),
                                     make_float4(even[e], even[e + 2], odd[e], odd[e + 2]));
                    }
                }
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
                const int at = self + i * Traits::kThreads, row = at / 32;
                float4 all = load_shared(shared.sums[0][row] + quad_slot(row, at % 32));
#pragma unroll
                for (int s = 1; s < Traits::kSlices; ++s) {
                    const float4 more = load_shared(shared.sums[s][row] + quad_slot(row, at % 32));
                    all = make_float4(all.x + more.x, all.y + more.y, all.z + more.z, all.w + more.w);
                }
                float* const to = total + first / 2 + 4 * i;
                to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
            }
        }
    }

    // Adds the bias, rounds and writes four outputs: number `at` of the tile, row after row.
    QLK_DEVICE void store_four(int at, const float4& total) {
        const int64_t row = first_row() + at / 32, column = first_column() + at % 32 * 4;
        if (row >= a.m || column >= a.n) return;
        float out[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) out[e] += column + e < a.n ? a.bias.at(column + e) : 0.0f;
        T* const to = a.out + row * a.n + column;
        if (a.out_aligned) {
            store_global(reinterpret_cast<uint2*>(to),
                         make_uint2(pack_pair<T>(out[0], out[1]), pack_pair<T>(out[2], out[3])));
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (column + e < a.n) store_global(to + e, from_float<T>(out[e]));
            }
        }
    }

    QLK_DEVICE static float4 four(const float (&total)[kSums], int i) {
        return make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
    }

    // This thread's outputs.
    QLK_DEVICE void store(float (&total)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) store_four(self + i * Traits::kThreads, four(total, i));
    }

    // The same for the blocks of a cluster, each of which adds and writes its share of the tile.
    QLK_DEVICE void add_cluster_and_store(float (&total)[kSums]) {
        float4* const room = reinterpret_cast<float4*>(&shared.loop);
        __syncthreads();  // all reads of the slices' sums are done; these sums take their place
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) store_shared(room + self + i * Traits::kThreads, four(total, i));
        add_cluster<Traits::kThreads, kSums / 4>(
            a.splits, [&](int at) { return room + at; }, [&](int at, const float4& all) { store_four(at, all); });
    }
};

// Fills the table of level pairs, one byte's entry for each thread. Neighbouring lanes start at different banks. Why
// the levels go through shuffles: see prepare() in rows8.cuh.
template <class Shared>
QLK_DEVICE void make_pairs(Shared& shared, const float* levels, int self) {
    const float level = levels[self % 16];
    const float high = __shfl_sync(kAllLanes, level, self >> 4, 16), low = __shfl_sync(kAllLanes, level, self & 15, 16);
    float4* const to = reinterpret_cast<float4*>(shared.pairs[self]);
#pragma unroll
    for (int i = 0; i < 16; ++i) store_shared(to + (i + self) % 16, make_float4(high, low, high, low));
}

// All tiles, or parts of tiles, of one block.
template <class T, class Traits>
QLK_DEVICE void middle_tiles(const GemmArguments<T>& a) {
    using Shared = typename Traits::Shared;
    make_pairs(shared_memory<Shared>(), a.weight.levels, static_cast<int>(threadIdx.x));
    unsigned tile = Middle<T, Traits>::share(a).first_tile();
#pragma unroll 1
    do {
        auto& shared = opaque_shared_memory<Shared>();
        Middle<T, Traits> middle{a, shared, tile};
        middle.run();
        float total[Middle<T, Traits>::kSums];
        middle.add_slices(total);
        if (kClusters && a.splits.cluster) return middle.add_cluster_and_store(total);
        int* const word = reinterpret_cast<int*>(&shared.loop);
        if (middle.share().template add<Traits::kThreads>(tile, total, word)) middle.store(total);
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
