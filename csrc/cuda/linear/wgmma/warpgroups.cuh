// The forward product on Hopper's tensor cores (wgmma), for 16-bit types and 5 and more rows of x.
//
// Formula: y = u B^T + sum over blocks b of constant[b] * (x[b] levels[b]^T) + bias
//
// Layout:
//     block    kRows x 128 outputs; persistent where blocks share tiles. A step is kBlocks blocks of 64 along K
//     warps    two warpgroups that multiply, 64 columns of the result each, and one that brings x
//     product  levels of W, 64 x 16, are the left operand, in registers; x, 16 x kRows, the right one, in shared memory
//     lane     with w its warp in the warpgroup, g = lane / 4 and t = lane % 4: decodes rows 16w + g and 16w + g + 8 of
//              W, and of each of their blocks codes 16t to 16t + 15, 8 bytes
//     depth    product s of a block's four takes its columns 16t + 4s to 16t + 4s + 3 from each t. x is laid out in
//     that
//              order, rows of 128 bytes for a block, swizzled
//     ahead    codes of the next kBlocks blocks under way in registers, constants of four; the kStages stages of x are
//     a
//              step, and kDeep pieces of each thread are on their way to them. So all addresses in a step are fixed
//
// Shared memory: warpgroup_shared(kRows) bytes: the stages of x, results, and 64 KiB for a table of level pairs for
// each
//     byte and lane.
//
// Why: docs/design/notes-cuda.md, "Warpgroups": levels are multiplied as they are and a block's constant is applied to
//     its partial sum, in float32. So a weight costs half a PRMT and half a load from shared memory.
//
// Files: warpgroups_layout.cuh (shape, shared memory), warpgroups_x.cuh (what brings x), this one (what multiplies).
#pragma once

#include "cuda/common/pairs.cuh"
#include "cuda/linear/mma/store_four.cuh"
#include "cuda/linear/wgmma/warpgroups_x.cuh"

namespace qlk::cuda {

// One multiplying thread's state and work. Traits: WarpgroupTraits.
template <class T, class Traits>
struct Warpgroup {
    static constexpr int kBlocks = Traits::kBlocks;
    static constexpr int kTiles = Traits::kRows / 8;  // of 8 rows of x
    static constexpr int kSums = Traits::kRows / 2;   // of a thread
    // Whether the next tile's codes come while a tile ends. With 128 rows there are no registers for it.
    static constexpr bool kEarly = Traits::kRows <= 64;

    const GemmArguments<T>& a;
    const typename Traits::Shared shared;
    int lane;
    uint32_t blocks;      // in a row of W
    float offset;         // mean of the constants, when they are double-quantized
    uint32_t parity = 0;  // of the phase in which the next step's stages are filled

    const uint8_t* codes_at[2] = {};  // this lane's first codes in its two rows of W
    uint32_t row_block[2] = {};       // index of these rows' first blocks
    uint32_t next_codes = 0;          // block of the row whose codes are fetched next
    uint32_t next_constants = 0;      // block of the row whose constants this lane fetches next

    uint2 ahead[kBlocks][2];  // codes under way
    uint32_t left[2][4][4];   // levels of the block that is multiplied, and of the next
    float part[kSums];        // sums over one block
    float sum[kTiles][4];

    // Constants of one block in each of two rows, on their way. Lane t has block t of four.
    struct Constants {
        uint32_t code[2];  // without double quantization, the constants' bits
        float nested[2];
    } constants;

    // A thread's place, and its tile's. Computed again where it is needed again: in the main loop it would only take
    // registers.
    struct Place {
        int self, lane, group, warp;      // thread in the block, lane in the warp; warpgroup, warp in the warpgroup
        int64_t first_row, first_column;  // of the tile

        QLK_DEVICE int64_t column(int half) const {
            return first_column + group * 64 + warp * 16 + lane / 4 + half * 8;
        }
    };
    QLK_DEVICE Place place(const TileShare& share, unsigned tile) const {
        const int self = static_cast<int>(opaque(threadIdx.x));
        const unsigned down = (opaque(static_cast<unsigned>(a.m)) + Traits::kRows - 1) / Traits::kRows;
        const unsigned number = share.number(opaque(tile));
        return {self,
                self % 32,
                self / 128,
                self / 32 % 4,
                static_cast<int64_t>(number % down) * Traits::kRows,
                static_cast<int64_t>(number / down) * Traits::kColumns};
    }

    // Moves on to a tile, or to this thread block's part of one.
    QLK_DEVICE void begin(const TileShare& share, unsigned tile) {
        const Place at = place(share, tile);
        next_codes = share.from(tile) * kBlocks;
        next_constants = next_codes + at.lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Rows past the end of W read its last row; their sums are not stored.
            const int64_t row = at.column(half) < a.n ? at.column(half) : a.n - 1;
            row_block[half] = static_cast<uint32_t>(row) * blocks;
            codes_at[half] = a.weight.packed + row * blocks * (kBlock / 2) + at.lane % 4 * 8;
        }
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) fetch_codes(ahead[i]);
        fetch_constants();
    }

    // Past K the row's last block is read again; there x is zero.
    QLK_DEVICE void fetch_codes(uint2 (&codes)[2]) {
        const uint32_t block = min(next_codes, blocks - 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            codes[half] = ld_global_once_8(codes_at[half] + static_cast<uint64_t>(block) * (kBlock / 2));
        }
        ++next_codes;
    }

    QLK_DEVICE void fetch_constants() {
        const uint32_t block = min(next_constants, blocks - 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = row_block[half] + block;
            if constexpr (Traits::kNested) {
                constants.code[half] = load_global(a.weight.absmax_code + at);
                constants.nested[half] = load_global(a.weight.nested_absmax + at / kNestedBlock);
            } else {
                constants.code[half] = __float_as_uint(load_global(a.weight.absmax + at));
            }
        }
        next_constants += 4;
    }

    // Zero past K: there x is zero too, but a constant may be infinite.
    QLK_DEVICE float constant(int half, bool inside) const {
        if (!inside) return 0.0f;
        if constexpr (!Traits::kNested) return pair_constant<T>(__uint_as_float(constants.code[half]));
        const float entry = load_shared(shared.front.constants + constants.code[half]);
        return pair_constant<T>(__fadd_rn(__fmul_rn(entry, constants.nested[half]), offset));
    }

    // The levels of byte kByte of `codes`. mine: the lane's column of the table.
    template <int kByte>
    QLK_DEVICE uint32_t pair(uint32_t codes, uint32_t mine) const {
        return load_shared(shared_pointer<const uint32_t>(prmt(codes, mine, 0x7604 | kByte << 4)));
    }

    QLK_DEVICE void decode(const uint2 (&codes)[2], uint32_t (&to)[4][4]) const {
        const uint32_t mine = Traits::kTable | static_cast<uint32_t>(lane) * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            to[0][half] = pair<0>(codes[half].x, mine);
            to[0][half + 2] = pair<1>(codes[half].x, mine);
            to[1][half] = pair<2>(codes[half].x, mine);
            to[1][half + 2] = pair<3>(codes[half].x, mine);
            to[2][half] = pair<0>(codes[half].y, mine);
            to[2][half + 2] = pair<1>(codes[half].y, mine);
            to[3][half] = pair<2>(codes[half].y, mine);
            to[3][half + 2] = pair<3>(codes[half].y, mine);
        }
    }

    // Four blocks of a step, from kFirst on. While one is multiplied, the next is decoded.
    template <int kFirst>
    QLK_DEVICE void multiply() {
        const bool inside = next_constants - 4 < blocks;
        const float mine[2] = {constant(0, inside), constant(1, inside)};
        fetch_constants();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            constexpr int kStageBlocks = Traits::kStageBlocks;
            const int block = kFirst + i, stage = block / kStageBlocks, within = block % kStageBlocks;
            if (within == 0) mbarrier_wait(shared.front.full[stage], parity);
            const uint64_t right = wgmma_descriptor(shared.x()[stage][within], 16, 1024, Swizzle::k128);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                // 32 bytes of each row further on; a descriptor counts 16.
                wgmma_rs<T, Traits::kRows, false>(part, left[i % 2][s], right + 2 * s, s > 0);
            }
            wgmma_commit();
            fetch_codes(ahead[block]);
            decode(ahead[(block + 1) % kBlocks], left[(i + 1) % 2]);
            const float of_block[2] = {__shfl_sync(kAllLanes, mine[0], i, 4), __shfl_sync(kAllLanes, mine[1], i, 4)};
            wgmma_wait<0>();
            wgmma_settle(part);
            if (within + 1 == kStageBlocks) {
                __syncwarp();  // also for what the lanes have read of the results before
                if (lane == 0) mbarrier_arrive(shared.front.empty[stage]);
            }
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[j][e] += of_block[e / 2] * part[4 * j + e];
            }
        }
    }

    // Adds u B^T, 16 of r at a time. mma.sync has its sums where wgmma has them.
    QLK_DEVICE void low_rank(const Place& place) {
        const int64_t columns[2] = {place.column(0), place.column(1)};
#pragma unroll 1
        for (int64_t first = 0; first < a.r; first += 16) {
            const int64_t at = first + place.lane % 4 * 4;
            const uint2 upper = load_four(a.low_right, a.r, columns[0] < a.n, columns[0], at, a.low_aligned);
            const uint2 lower = load_four(a.low_right, a.r, columns[1] < a.n, columns[1], at, a.low_aligned);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                const int64_t row = place.first_row + j * 8 + place.lane / 4;
                const uint2 u = load_four(a.low_left, a.r, row < a.m, row, at, a.low_aligned);
                mma_16x8x16<T>(sum[j], {upper.x, lower.x, upper.y, lower.y}, u.x, u.y);
            }
        }
    }

    // The barrier of the threads that multiply.
    struct Barrier {
        QLK_DEVICE void operator()() const { bar_sync(1, Traits::kConsumers); }
    };

    // Adds the bias, rounds, and writes the tile through shared memory, so that stores are 16 bytes wide.
    QLK_DEVICE void store(const Place& place) {
        const auto [self, lane, group, warp, first_row, first_column] = place;
        const int64_t columns[2] = {place.column(0), place.column(1)};
        const float bias[2] = {columns[0] < a.n ? a.bias.at(columns[0]) : 0.0f,
                               columns[1] < a.n ? a.bias.at(columns[1]) : 0.0f};
        // All reads of the tile before are done: since then each warp has released a stage of this tile that had to be
        // filled again, as it has two steps, or all have met to add its parts.
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            const uint32_t pairs[4] = {pack_pair<T>(sum[j][0] + bias[0], sum[j][1] + bias[0]),
                                       pack_pair<T>(sum[j][2] + bias[1], sum[j][3] + bias[1]),
                                       pack_pair<T>(sum[j + 1][0] + bias[0], sum[j + 1][1] + bias[0]),
                                       pack_pair<T>(sum[j + 1][2] + bias[1], sum[j + 1][3] + bias[1])};
            const int row = (j + lane / 16) * 8 + lane % 8, at = group * 64 + warp * 16 + lane / 8 % 2 * 8;
            stmatrix_x4<true>(&shared.front.out[row][at], pairs);
        }
        bar_sync(1, Traits::kConsumers);
        for (int i = self; i < Traits::kRows * (Traits::kColumns / 8); i += Traits::kConsumers) {
            const int row = i / (Traits::kColumns / 8), at = i % (Traits::kColumns / 8) * 8;
            if (first_row + row >= a.m || first_column + at >= a.n) continue;
            const T* const from = &shared.front.out[row][at];
            T* const to = a.out + (first_row + row) * a.n + first_column + at;
            if (a.out_aligned) {
                st_global_16(to, load_shared(reinterpret_cast<const uint4*>(from)));
            } else {
#pragma unroll 1
                for (int e = 0; e < 8 && first_column + at + e < a.n; ++e) store_global(to + e, load_shared(from + e));
            }
        }
    }

    // The tile's sums of all blocks of a cluster, each of which stores its share of the results. They take x's place.
    QLK_DEVICE void add_cluster_and_store(const Place& place) {
        float4* const room = reinterpret_cast<float4*>(&shared.x());
        // Four neighbours of a row of the tile. Neither writing nor reading them has bank conflicts.
        const auto slot = [=](int at) { return room + at / 32 * 32 + (at % 32 ^ at / 64 % 4 * 2); };
        bar_sync(1, Traits::kConsumers);  // all products of this block have read x
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = j * 8 + place.lane % 4 * 2 + e % 2;
                const int column = place.group * 64 + place.warp * 16 + place.lane / 4 + e / 2 * 8;
                store_shared(reinterpret_cast<float*>(slot(row * 32 + column / 4)) + column % 4, sum[j][e]);
            }
        }
        add_cluster<Traits::kConsumers, kSums / 4>(a.splits, slot, [&](int at, const float4& all) {
            store_four<true>(a, a.n, place.first_row + at / 32, place.first_column + at % 32 * 4, all);
        });
    }

    // All tiles, or parts of tiles, of this thread block.
    QLK_DEVICE void run(const TileShare& share) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) part[i] = 0.0f;
#pragma unroll 1
        for (unsigned tile = share.first_tile(); share.reaches(tile); ++tile) {
            const unsigned steps = share.to(tile) - share.from(tile);
            if (!kEarly && tile != share.first_tile()) begin(share, tile);
            decode(ahead[0], left[0]);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
            }
#pragma unroll 1
            for (unsigned step = 0; step < steps; ++step) {
                multiply<0>();
                if constexpr (kBlocks > 4) multiply<4>();
                parity ^= 1;
            }
            if (kEarly && share.reaches(tile + 1)) begin(share, tile + 1);
            griddep_wait();  // for u: the launch that makes it may still be running
            if (share.from(tile) == 0) low_rank(place(share, tile));
            if (kClusters && a.splits.cluster) return add_cluster_and_store(place(share, tile));
            if (share.alone() || share.share.template add<Traits::kConsumers, Traits::kRoom>(
                                     tile, reinterpret_cast<float (&)[kSums]>(sum), &shared.front.word, Barrier())) {
                store(place(share, tile));
            }
        }
    }
};

template <class T, class Traits>
QLK_DEVICE void warpgroup_tiles(const GemmArguments<T>& a) {
    const auto shared = Traits::Shared::find();
    const int self = static_cast<int>(threadIdx.x);
    const TileShare share{{a.splits, static_cast<unsigned>((a.k + Traits::kDepth - 1) / Traits::kDepth)}};
    if (self == 0) {
        for (int i = 0; i < Traits::kStages; ++i) {
            mbarrier_init(shared.front.full[i], Traits::kProducers);
            mbarrier_init(shared.front.empty[i], Traits::kConsumers / 32);
        }
    }
    if (self >= Traits::kConsumers) {
        XSource<T, Traits> source{a, shared, self - Traits::kConsumers};
        if constexpr (Traits::kUneven) setmaxnreg_dec<Traits::kProducerRegisters>();
        source.begin(share);
        __syncthreads();
        source.run(share);
        griddep_wait();  // a thread of an early launch must not end before
        return;
    }
    if constexpr (Traits::kUneven) setmaxnreg_inc<Traits::kConsumerRegisters>();
    Warpgroup<T, Traits> multiplier{a, shared, self % 32, static_cast<uint32_t>(a.k / kBlock),
                                    Traits::kNested ? load_global(a.weight.nested_offset) : 0.0f};
    multiplier.begin(share, share.first_tile());
    fill_pairs<T, Traits::kConsumers>(shared.back.pairs, a.weight.levels[self % 16], self);
    if (Traits::kNested) store_shared(shared.front.constants + self, load_global(a.weight.nested_table + self));
    __syncthreads();
    multiplier.run(share);
}

// Compiled for a single warp where the code is not for sm_90a, so that launch.cu can tell.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kWarpgroupThreads = 32;
#else
constexpr int kWarpgroupThreads = 384;
#endif

// Grid: Plan::blocks() blocks. Dynamic shared memory: warpgroup_shared(kRows).
template <class T, class Traits>
__global__ void __launch_bounds__(kWarpgroupThreads, 1) warpgroup_kernel(const __grid_constant__ GemmArguments<T> a) {
    if constexpr (kWarpgroupThreads == Traits::kThreads) {
        warpgroup_tiles<T, Traits>(a);
    } else {
        trap();
    }
}

}  // namespace qlk::cuda
