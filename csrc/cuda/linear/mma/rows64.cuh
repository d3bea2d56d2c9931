// y = u B^T + x W^T + bias for 5 to 64 rows of x, where neither reading W nor the products, but decoding takes the
// time.
//
// tiles.cuh decodes to shared memory, from where two to eight warps read every weight again: at 64 rows of x that takes
// longer than the products. Here each weight is decoded by one lane alone, into the register that goes into its
// products, by rows8.cuh's table. What a step would move through shared memory at 64 rows, for 128 x 256 weights: 128
// KiB of the table, 32 KiB of x in and 64 out, 1824 clocks; its products take 1630 of sm_90's mma.sync, and its
// instructions less than either. At 16 rows: 1250 and 410. So of a lane's eight rows of W one is decoded in registers
// (decode.cuh): 4.6 instructions a weight and not 2.5, for a lane has but 16 of a block's weights, but none of the 128
// KiB: 112 of them stay.
//
// A block makes kRows x 128 outputs, and of a step of 256 along K each of its 8 warps multiplies 64 columns of the
// outputs by 64 of K: 2 groups of columns, 4 slices of K. So a warp reads x for 64 columns at once, which is what keeps
// x from binding; its 64 x 64 sums take half of its registers. At the end the slices are added through shared memory,
// in their order.
//
// W is the left operand, 16 x 16, and x the right one, 16 x 8. Of the columns of its group, lane g * 4 + t decodes 8g
// to 8g + 7, two for each of four products, and of each 16 codes, 8 bytes, 16t to 16t + 15 of the block: a request
// takes one whole sector of each of 8 rows of W. The order of the columns is free as long as the sums are stored in it:
// a lane's are those of the columns that it decodes, of rows 2t and 2t + 1. The order of the depth is free as long as x
// comes in it: a piece of 16 bytes of a row of x, depth 16t + 8p to 16t + 8p + 7, is a lane's part of the right operand
// of two products, in the order of their registers. Of the left operand it would not be: half of its registers are of
// another row, and six MOVs a product bring them together. Pieces lie in the order p, t; for odd rows p is the other
// way round. Then neither cp.async, whose lanes take them in the order in which they lie, nor the loads have bank
// conflicts.
//
// The codes of the next step, 8 KiB a step for each 64 rows of W, are under way in registers while a step multiplies, x
// in the other of two buffers; a step takes 1200 clocks or more, and memory 500 to 1000. The constants of a step's 512
// blocks are made by all threads, two each, a step ahead.
//
// Where there are few tiles, several blocks share one, each with a part of the depth; and where there are more, but not
// as many as multiprocessors or a multiple of that, all blocks share all tiles (splits.cuh): 112 tiles on 132
// multiprocessors would leave 20 of them idle. A tile's low-rank part is that of the block with its first step.
#pragma once

#include "cuda/common/decode.cuh"
#include "cuda/common/splits.cuh"
#include "cuda/linear/compiled.cuh"
#include "cuda/linear/dispatch.h"
#include "cuda/linear/mma/tiles.cuh"

namespace qlk::cuda {

// kNested: the constants are double-quantized.
template <class T, int kRows_, bool kNested_>
struct MiddleTraits {
    static constexpr bool kNested = kNested_;
    static constexpr int kRows = kRows_, kColumns = 128, kThreads = 256;
    static constexpr int kSlices = 4, kGroups = 2;  // of warps: along K, across the columns
    static constexpr int kDepth = kSlices * kBlock;
    static constexpr int kConstantsPitch = kColumns + 8;
    static_assert(sizeof(T) == 2 && kRows % 8 == 0);
    static_assert(kGroups * 64 == kColumns && kGroups * kSlices * 32 == kThreads);

    static constexpr int kRowsAtOnce = middle_rows_at_once(kRows);  // whose sums the slices add
    struct Loop {
        uint4 x[2][kSlices][kRows * 8];
        float constants[2][kSlices][kConstantsPitch];
    };
    struct Shared {
        float2 pairs[256][32];  // for all tiles
        union {
            Loop loop;
            float4 sums[kSlices][kRowsAtOnce][kColumns / 4];
        };
    };
    static_assert(sizeof(Shared) == middle_shared(kRows));
};

template <class T, class Traits>
struct Middle {
    static constexpr int kTiles = Traits::kRows / 8;  // of rows of x
    static constexpr bool kLate =
        Traits::kRows > 32;         // half of a step is long enough for codes to come: fewer registers
    static constexpr int kOwn = 8;  // of W's rows, a lane's
    static constexpr int kSums = Traits::kRows * Traits::kColumns / Traits::kThreads;  // of a thread, in the end

    const GemmArguments<T>& a;
    typename Traits::Shared& shared;
    unsigned tile;  // of those that this block shares
    unsigned tile_down, tile_across;
    int first_step, steps;
    int blocks;    // of a row of W
    float offset;  // of the constants
    int self, lane, slice, group;
    float sum[kTiles][kOwn / 2][4];

    // Where this thread reads next: running, as in tiles.cuh.
    const T* x_next = nullptr;            // the first of its pieces, 8 rows apart
    int x_rows = 0;                       // how many of these rows there are
    const uint8_t* codes_next = nullptr;  // column 8g of the group
    int own = 0;                          // how many of this lane's columns there are
    uint32_t constant_next = 0;           // the first of two blocks whose constants come next, 64 rows apart
    int constant_at = 0;                  // their number in the row
    int constant_rows = 0;                // how many of the two rows there are

    QLK_DEVICE static Share share(const GemmArguments<T>& a) {
        return {a.splits, (anew(static_cast<unsigned>(a.k)) + Traits::kDepth - 1) / Traits::kDepth};
    }
    QLK_DEVICE Share share() const { return share(a); }

    // Who and where this thread is. Called again where it is needed again: at 64 rows there are no registers for it
    // while steps are multiplied.
    QLK_DEVICE void locate() {
        self = static_cast<int>(anew(threadIdx.x));
        lane = self % 32;
        slice = self / 32 / Traits::kGroups;
        group = self / 32 % Traits::kGroups;
        const unsigned down = (anew(static_cast<unsigned>(a.m)) + Traits::kRows - 1) / Traits::kRows;
        const unsigned number = share().number(tile);
        tile_down = number % down;
        tile_across = number / down;
    }

    QLK_DEVICE int64_t first_row() const { return static_cast<int64_t>(tile_down) * Traits::kRows; }
    QLK_DEVICE int64_t first_column() const { return static_cast<int64_t>(tile_across) * Traits::kColumns; }

    // Where a piece of a row of x lies among the row's eight, and back.
    QLK_DEVICE static int place(int row, int half, int quarter) { return (half * 4 + quarter) ^ (row & 1) * 4; }
    QLK_DEVICE static int piece_at(int row, int at) { return at % 4 * 2 + (at / 4 ^ (row & 1)); }

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

    // One instruction adds it to an address. Sums would be taken out of the loop, to registers that are not there.
    QLK_DEVICE static uint64_t wide_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

    // x of the next step, by all threads. What is not copied, rows beyond those of x and depth beyond K, goes into sums
    // that are not stored, or into none.
    QLK_DEVICE void copy_step(int step, int buffer) {
        const int row = self / 32, part = self / 8 % 4;
        const int rows = step * Traits::kSlices + part < blocks ? x_rows : 0;
        uint4* const to = shared.loop.x[buffer][part] + row * 8 + self % 8;
        const unsigned char* const from = reinterpret_cast<const unsigned char*>(x_next);
        const uint32_t apart = static_cast<uint32_t>(a.k) * 8 * sizeof(T);
#pragma unroll
        for (uint32_t i = 0; i < Traits::kRows / 8; ++i) {
            if (static_cast<int>(i) < rows) cp_async_16(to + i * 64, from + wide_product(apart, i));
        }
        x_next += Traits::kDepth;
    }

    // This lane's codes of the next step: of eight rows of W, 16 each.
    QLK_DEVICE void fetch(int step, uint2 (&codes)[kOwn]) {
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

    // Constants on their way, of a block in each of two rows; as in tiles.cuh asked for two steps before they are
    // needed, and looked up in their table one before. Four lanes have the four blocks of a row: a request goes to
    // eight rows. Of a row that is not there it becomes a number, which goes into sums that are not stored.
    struct Constants {
        uint32_t code[2];  // or, without double quantization, the constants' bits
        float nested[2];
    };

    QLK_DEVICE Constants ask(bool wanted) {
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

    QLK_DEVICE float entry(uint32_t code) const {
        return Traits::kNested ? load_global(a.weight.nested_table + code) : __uint_as_float(code);
    }

    QLK_DEVICE void put(int buffer, const Constants& c, const float (&entries)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float value = Traits::kNested ? __fadd_rn(__fmul_rn(entries[i], c.nested[i]), offset) : entries[i];
            float* const to = shared.loop.constants[buffer][self % Traits::kSlices] + self / Traits::kSlices + i * 64;
            store_shared(to, value);
        }
    }

    // Two weights of a byte of `codes`, rounded once, as dequantize rounds them; see rows8.cuh.
    template <int kByte>
    QLK_DEVICE uint32_t pair(uint32_t codes, uint32_t lane_bytes, float absmax) const {
        const uint32_t at = prmt(codes, lane_bytes, 0x5504 | kByte << 4);
        const float2 levels =
            load_shared(reinterpret_cast<const float2*>(reinterpret_cast<const unsigned char*>(shared.pairs) + at));
        return pack_pair<T>(__fmul_rn(levels.x, absmax), __fmul_rn(levels.y, absmax));
    }

    // The first or the second eight of the 16 columns along K that a lane has. `last` decodes the last of its rows of
    // W.
    template <int kHalf>
    QLK_DEVICE void multiply(int buffer, const uint2 (&codes)[kOwn], const float (&absmax)[kOwn],
                             const BlockTable<T>& last) {
        const uint4 right = last.decode(kHalf ? codes[kOwn - 1].y : codes[kOwn - 1].x);
        const uint32_t lane_bytes = static_cast<uint32_t>(lane) * 8;
        const uint4* const from = shared.loop.x[buffer][slice] + lane / 4 * 8 + place(lane / 4, kHalf, lane % 4);
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

    // u B^T: 16 of r at a time, the slices in turn.
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
            fetch(first_step, codes);
        }
        cp_async_commit();
        Constants next = ask(steps > 0);
        put(0, next, {entry(next.code[0]), entry(next.code[1])});
        next = ask(steps > 1);
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
                if (!kLate) fetch(number + 1, ahead);
                entries[0] = entry(next.code[0]);
                entries[1] = entry(next.code[1]);
            }
            cp_async_commit();
            const float4* const constants =
                reinterpret_cast<const float4*>(shared.loop.constants[buffer][slice] + group * 64 + lane / 4 * 8);
            const float4 low = load_shared(constants), high = load_shared(constants + 1);
            const float absmax[kOwn] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const bool inside = number * Traits::kSlices + slice < blocks;  // beyond K nothing is multiplied
            BlockTable<T> last;
            last.fill(a.weight.levels, absmax[kOwn - 1]);
            if (inside) multiply<0>(buffer, codes, absmax, last);
            if (more) {
                if (kLate) fetch(number + 1, ahead);
                put(buffer ^ 1, next, entries);
                next = ask(step + 2 < steps);
            }
            // At 64 rows there are no registers to keep it in.
            if (kLate) last.fill(a.weight.levels, load_shared(constants + 1).w);
            if (inside) multiply<1>(buffer, codes, absmax, last);
#pragma unroll
            for (int j = 0; j < kOwn; ++j) codes[j] = ahead[j];
            // The next step's x and constants are there, and nobody reads this one's any more.
            cp_async_wait<0>();
            __syncthreads();
        }
        griddep_wait();  // for u, made by the launch before, which may still run
        locate();
        if (share().from(tile) == 0) low_rank();
    }

    // Where four neighbouring columns of a row of sums lie, so that neither writing them nor reading them has bank
    // conflicts.
    QLK_DEVICE static int four_at(int row, int four) { return four ^ (row >> 1 & 1) ^ (row >> 2 & 1) << 2; }

    // The slices' sums together: four columns of each of some rows become this thread's.
    QLK_DEVICE void add_slices(float (&total)[kSums]) {
        locate();
        constexpr int kRows = Traits::kRowsAtOnce;
#pragma unroll
        for (int first = 0; first < Traits::kRows; first += kRows) {
            if (first > 0) __syncthreads();  // nobody reads the rows before
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = i * 8 + lane % 4 * 2 + e;
                    float4* const to = shared.sums[slice][row];
#pragma unroll
                    for (int q = 0; q < 2; ++q) {  // columns 8g + 4q and on
                        const float (&even)[4] = sum[first / 8 + i][q * 2];
                        const float (&odd)[4] = sum[first / 8 + i][q * 2 + 1];
                        store_shared(to + four_at(row, group * 16 + lane / 4 * 2 + q),
                                     make_float4(even[e], even[e + 2], odd[e], odd[e + 2]));
                    }
                }
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
                const int at = self + i * Traits::kThreads, row = at / 32;
                float4 all = load_shared(shared.sums[0][row] + four_at(row, at % 32));
#pragma unroll
                for (int s = 1; s < Traits::kSlices; ++s) {
                    const float4 part = load_shared(shared.sums[s][row] + four_at(row, at % 32));
                    all = make_float4(all.x + part.x, all.y + part.y, all.z + part.z, all.w + part.w);
                }
                float* const to = total + first / 2 + 4 * i;
                to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
            }
        }
    }

    QLK_DEVICE void store(float (&total)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
            const int at = self + i * Traits::kThreads;
            const int64_t row = first_row() + at / 32, column = first_column() + at % 32 * 4;
            if (row >= a.m || column >= a.n) continue;
            float out[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                out[e] = total[4 * i + e] + (column + e < a.n ? a.bias.at(column + e) : 0.0f);
            }
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
    }
};

// The table: an entry for each thread; neighbouring lanes begin at different banks.
template <class Shared>
QLK_DEVICE void make_pairs(Shared& shared, const float* levels, int self) {
    const float high = levels[self >> 4], low = levels[self & 15];
    float4* const to = reinterpret_cast<float4*>(shared.pairs[self]);
#pragma unroll
    for (int i = 0; i < 16; ++i) store_shared(to + (i + self) % 16, make_float4(high, low, high, low));
}

template <class T, class Traits>
QLK_DEVICE void middle_tiles(const GemmArguments<T>& a) {
    using Shared = typename Traits::Shared;
    make_pairs(shared_memory<Shared>(), a.weight.levels, static_cast<int>(threadIdx.x));
    unsigned tile = Middle<T, Traits>::share(a).first_tile();
#pragma unroll 1
    do {
        auto& shared = shared_memory_anew<Shared>();
        Middle<T, Traits> middle{a, shared, tile};
        middle.run();
        float total[Middle<T, Traits>::kSums];
        middle.add_slices(total);
        int* const word = reinterpret_cast<int*>(&shared.loop);
        if (middle.share().template add<Traits::kThreads>(tile, total, word)) middle.store(total);
        __syncthreads();  // nobody reads sums or the word any more, whose place the next tile takes
    } while (Middle<T, Traits>::share(a).reaches(++tile));
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) middle_kernel(const __grid_constant__ GemmArguments<T> a) {
    if constexpr (kRuns<T, sizeof(typename Traits::Shared)>) {
        middle_tiles<T, Traits>(a);
    } else {
        trap();
    }
}

}  // namespace qlk::cuda
