// Brings x to shared memory for warpgroups.cuh, in the order in which W's codes lie in registers.
//
// Layout: a thread takes units: of a row of x, and of a block's 64 columns the eights that begin at 16t + 8h, for t = 0
// to 3
//     and h its half. Word w of each of these four pieces has depth 2t and 2t + 1 of eight; together they are piece
//     4h + w of the row's eight pieces in shared memory. So the order changes in registers, for nothing.
#pragma once

#include "cuda/linear/wgmma/warpgroups_layout.cuh"

namespace qlk::cuda {

// One thread's state and work. Traits: WarpgroupTraits.
template <class T, class Traits>
struct XSource {
    static constexpr int kUnits = Traits::kUnits, kDeep = Traits::kDeep;

    const GemmArguments<T>& a;
    const typename Traits::Shared shared;
    int self;  // among the threads that bring x

    // What is loaded next: a stage of a tile, and a unit of that.
    unsigned tile = 0, block = 0, end = 0;  // tile, block of its rows, end of this thread block's part
    int unit = 0;
    const T* from[kUnits] = {};  // this thread's pieces in its rows, at block 0
    unsigned left = 0;           // stages to be stored

    uint4 pieces[kDeep][4];  // units on their way

    // A unit's row, half of a block's columns, and block in the stage.
    QLK_DEVICE int row(int i) const { return (self + i * Traits::kProducers) / 2 % Traits::kRows; }
    QLK_DEVICE int half() const { return self % 2; }
    QLK_DEVICE int within(int i) const { return (self + i * Traits::kProducers) / (2 * Traits::kRows); }

    QLK_DEVICE void locate(const TileShare& share) {
        const unsigned down = static_cast<unsigned>((a.m + Traits::kRows - 1) / Traits::kRows);
        const int64_t first = static_cast<int64_t>(share.number(tile) % down) * Traits::kRows;
        block = share.from(tile) * Traits::kBlocks;
        end = share.to(tile) * Traits::kBlocks;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            // Rows past the end of x read its last row; their sums are not stored.
            const int64_t at = first + row(i) < a.m ? first + row(i) : a.m - 1;
            from[i] = a.left + at * a.k + half() * 8;
        }
    }

    // Loads the pieces of this thread's next unit, zeros past K, and moves on. Past the last stage it does nothing.
    QLK_DEVICE void load(const TileShare& share, uint4 (&to)[4]) {
        if (block == end) {
            ++tile;
            if (!share.reaches(tile)) return;
            locate(share);
        }
        const int64_t column = static_cast<int64_t>(block + within(unit)) * kBlock;
        const T* const at = (kUnits > 1 && unit == 1 ? from[kUnits - 1] : from[0]) + column;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            to[t] = make_uint4(0, 0, 0, 0);
            if (column < a.k) to[t] = load_global(reinterpret_cast<const uint4*>(at + t * 16));
        }
        if (++unit == kUnits) {
            unit = 0;
            block += Traits::kStageBlocks;
        }
    }

    QLK_DEVICE void store(int stage, int unit, const uint4 (&four)[4]) {
        uint4* const to = shared.x()[stage][within(unit)] + row(unit) * 8;
        const auto put = [&](int w, uint32_t p, uint32_t q, uint32_t r, uint32_t s) {
            store_shared(to + ((half() * 4 + w) ^ row(unit) % 8), make_uint4(p, q, r, s));
        };
        put(0, four[0].x, four[1].x, four[2].x, four[3].x);
        put(1, four[0].y, four[1].y, four[2].y, four[3].y);
        put(2, four[0].z, four[1].z, four[2].z, four[3].z);
        put(3, four[0].w, four[1].w, four[2].w, four[3].w);
    }

    QLK_DEVICE void begin(const TileShare& share) {
        tile = share.first_tile();
        locate(share);
        left = share.steps() * (Traits::kBlocks / Traits::kStageBlocks);
#pragma unroll
        for (int i = 0; i < kDeep; ++i) load(share, pieces[i]);
    }

    // All stages of this thread block.
    QLK_DEVICE void run(const TileShare& share) {
        Stage stage{0, 0};
        int stored = 0;  // units of the stage
#pragma unroll 1
        while (left > 0) {
#pragma unroll
            for (int i = 0; i < kDeep; ++i) {
                if (left == 0) break;
                // The phase before the first: an unused stage is empty.
                if (stored == 0) mbarrier_wait(shared.front.empty[stage.index], stage.parity ^ 1);
                store(stage.index, stored, pieces[i]);
                load(share, pieces[i]);
                if (++stored < kUnits) continue;
                stored = 0;
                fence_proxy_async();
                mbarrier_arrive(shared.front.full[stage.index]);
                stage.advance(Traits::kStages);
                --left;
            }
        }
    }
};

}  // namespace qlk::cuda
