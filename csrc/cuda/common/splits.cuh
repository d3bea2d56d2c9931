// Blocks that share a tile, each with a part of the depth. The last to arrive adds the sums of all, always in the order
// of the parts, so that the same inputs give the same bits.
//
// No block waits, so it does not matter which blocks run together. Tickets need not start as zeros: a ticket has the
// launch's own number in its upper bits, and any other content means that no block has arrived. The last block clears
// the number, because a captured graph replays its launches with the same one.
#pragma once

#include <ptx.cuh>

namespace qlk::cuda {

struct Splits {
    float4* partial;             // [parts][sums / 4][threads]
    unsigned long long* ticket;  // [tiles]
    unsigned long long launch;   // the launch's number; its lowest byte is 0
    int count;                   // blocks that share `tiles`, at most 255
    int tiles = 1;               // how many tiles they share
    int whole = 0;               // tiles that come first, with a block each; add_splits doesn't count them
};

// Whether this block is the last of `parts` to arrive at a tile. If so, it sees what the others stored by
// store_exchanged before they arrived. All threads of the block call it. word: in shared memory, not used for anything
// else meanwhile.
QLK_DEVICE bool comes_last(const Splits& splits, int64_t tile, int parts, int* word) {
    unsigned long long* const ticket = splits.ticket + tile;
    // What the ticket holds comes in while the block's stores go out.
    const unsigned long long seen = threadIdx.x == 0 ? load_exchanged(ticket) : 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_acq_rel();  // for the stores of all threads of the block, which the barrier has ordered before
        // The first block replaces what an earlier launch has left. If that has changed since, then because another
        // block of this launch was first. So no block tries more than twice, however many arrive together.
        const bool first = (seen & ~0xffull) != splits.launch && atomicCAS(ticket, seen, splits.launch | 1) == seen;
        const unsigned long long before = first ? splits.launch : atom_add_acquire(ticket, 1ull);
        const bool last = static_cast<int>(before & 0xff) == parts - 1;
        if (last) atomicExch(ticket, 0ull);
        store_shared(word, last ? 1 : 0);
    }
    __syncthreads();
    return load_shared(word) != 0;
}

// Every thread of the block brings its sums for part `part` of `parts` of a tile. In the last block to arrive they
// become the sums of all parts, and the result is true; the other blocks are done with the tile. place(i): index of
// part i among all parts in scratch. word: as in comes_last.
template <int kThreads, int kSums, class Place>
QLK_DEVICE bool add_parts_of(const Splits& splits, int64_t tile, int part, int parts, Place place, float (&sum)[kSums],
                             int* word) {
    static_assert(kSums % 4 == 0);
    if (parts == 1) return true;
    const auto at = [&](int which, int i) {
        return splits.partial + (place(which) * (kSums / 4) + i) * kThreads + static_cast<int>(threadIdx.x);
    };
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
        store_exchanged(at(part, i), make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    }
    if (!comes_last(splits, tile, parts, word)) return false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0.0f;
    // As many parts at a time as registers hold, where smaller tiles have two blocks on a multiprocessor.
    constexpr int kUnderWay = (kSums >= 32 ? 128 : 64) / kSums;
#pragma unroll 1
    for (int first = 0; first < parts; first += kUnderWay) {
        float4 more[kUnderWay][kSums / 4];
#pragma unroll
        for (int which = 0; which < kUnderWay; ++which) {
#pragma unroll
            for (int i = 0; i < kSums / 4; ++i) {
                more[which][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (first + which < parts) more[which][i] = load_exchanged(at(first + which, i));
            }
        }
#pragma unroll
        for (int which = 0; which < kUnderWay; ++which) {
#pragma unroll
            for (int i = 0; i < kSums / 4; ++i) {
                sum[4 * i] += more[which][i].x;
                sum[4 * i + 1] += more[which][i].y;
                sum[4 * i + 2] += more[which][i].z;
                sum[4 * i + 3] += more[which][i].w;
            }
        }
    }
    return true;
}

// add_parts_of for blocks that share a single tile.
template <int kThreads, int kSums>
QLK_DEVICE bool add_splits(const Splits& splits, int64_t tile, int split, float (&sum)[kSums], int* word) {
    const auto place = [&](int which) { return tile * splits.count + which; };
    return add_parts_of<kThreads>(splits, tile, split, splits.count, place, sum, word);
}

// How `count` blocks share some tiles: the tiles' depths are put one after another and cut anywhere, so that all blocks
// have equal work however many tiles there are ("Stream-K", Osama et al., arXiv 2301.03598). Tiles are numbered from
// the first that this block shares. A step is one of `steps` along a tile's depth.
struct Share {
    const Splits& splits;
    unsigned steps;

    QLK_DEVICE unsigned count() const { return static_cast<unsigned>(splits.count); }
    QLK_DEVICE unsigned self() const { return blockIdx.x % count(); }
    // The planner makes sure that these products fit into 32 bits.
    QLK_DEVICE unsigned all() const { return steps * static_cast<unsigned>(splits.tiles); }
    QLK_DEVICE unsigned begin_of(unsigned block) const { return all() * block / count(); }
    // The block that has a step: the last one that begins at or before it.
    QLK_DEVICE unsigned owner(unsigned step) const { return ((step + 1) * count() - 1) / all(); }

    QLK_DEVICE unsigned first_tile() const { return begin_of(self()) / steps; }
    QLK_DEVICE bool reaches(unsigned tile) const { return tile * steps < begin_of(self() + 1); }
    // This block's part of a tile's steps.
    QLK_DEVICE unsigned from(unsigned tile) const { return max(begin_of(self()), tile * steps) - tile * steps; }
    QLK_DEVICE unsigned to(unsigned tile) const { return min(begin_of(self() + 1), (tile + 1) * steps) - tile * steps; }
    // A tile's number among all tiles.
    QLK_DEVICE unsigned number(unsigned tile) const {
        return blockIdx.x / count() * static_cast<unsigned>(splits.tiles) + tile;
    }

    // add_parts_of for one of these tiles. A block shares at most two tiles with others. Its part of the tile in which
    // it begins is stored under the block's number; its part of the tile in which it ends comes after all of those.
    template <int kThreads, int kSums>
    QLK_DEVICE bool add(unsigned tile, float (&sum)[kSums], int* word) const {
        const unsigned first = owner(tile * steps), last = owner((tile + 1) * steps - 1);
        const int64_t of_first = static_cast<int64_t>(blockIdx.x) - self() + first;
        const bool began_before = begin_of(first) < tile * steps;
        const auto place = [&](int part) { return of_first + part + (part == 0 && began_before ? gridDim.x : 0); };
        return add_parts_of<kThreads>(splits, number(tile), static_cast<int>(self() - first),
                                      static_cast<int>(last - first + 1), place, sum, word);
    }
};

}  // namespace qlk::cuda
