// Blocks that share a tile, each with a part of the depth. The sums of all are added in the order of the parts, so that
// the same inputs give the same bits.
//
// Where these blocks form a cluster (sm_90), each adds its share of the outputs, out of the shared memory of all. A
// cluster's blocks are on the device at the same time, so they can wait for each other.
//
// Elsewhere the last block to arrive adds all sums, which the others have left in scratch. No block waits, so it does
// not matter which blocks run together. Tickets need not start as zeros: a ticket has the launch's own number in its
// upper bits, and any other content means that no block has arrived. The last block clears the number, because a
// captured graph replays its launches with the same one.
#pragma once

#include <ptx_sm90.cuh>

#include "cuda/common/compiled.cuh"

namespace qlk::cuda {

struct Splits {
    float4* partial;             // a part is [sums / 4][threads]; `count` + `tiles` - 1 of them for `tiles`
    unsigned long long* ticket;  // [all tiles]
    unsigned long long launch;   // the launch's number; its lowest byte is 0
    int count;                   // blocks that share `tiles`, at most 255
    int tiles = 1;               // how many tiles they share
    int whole = 0;               // tiles that come first, with a block each; add_splits doesn't count them
    bool cluster = false;        // the blocks of a tile are a cluster; then there are neither parts nor tickets
};

// The barrier of the threads that bring sums.
struct BlockBarrier {
    QLK_DEVICE void operator()() const { __syncthreads(); }
};

// Whether this block is the last of `parts` to arrive at a tile. If so, it sees what the others stored by
// store_exchanged before they arrived. All threads that `barrier` is for call it. word: in shared memory, not used for
// anything else meanwhile.
template <class Barrier = BlockBarrier>
QLK_DEVICE bool comes_last(const Splits& splits, int64_t tile, int parts, int* word, Barrier barrier = {}) {
    unsigned long long* const ticket = splits.ticket + tile;
    // What the ticket holds comes in while the block's stores go out.
    const unsigned long long seen = threadIdx.x == 0 ? load_exchanged(ticket) : 0;
    barrier();
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
    barrier();
    return load_shared(word) != 0;
}

// Every thread of the block brings its sums for part `part` of `parts` of a tile. In the last block to arrive they
// become the sums of all parts, and the result is true; the other blocks are done with the tile. place(i): index of
// part i among all parts in scratch. word: as in comes_last. kRoom: registers for
// other blocks' parts on their way; 0 for as many as most kernels have.
template <int kThreads, int kRoom = 0, int kSums, class Place, class Barrier = BlockBarrier>
QLK_DEVICE bool add_parts_of(const Splits& splits, int64_t tile, int part, int parts, Place place, float (&sum)[kSums],
                             int* word, Barrier barrier = {}) {
    static_assert(kSums % 4 == 0);
    if (parts == 1) return true;
    const auto at = [&](int which, int i) {
        return splits.partial + (place(which) * (kSums / 4) + i) * kThreads + static_cast<int>(threadIdx.x);
    };
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
        store_exchanged(at(part, i), make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    }
    if (!comes_last(splits, tile, parts, word, barrier)) return false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0.0f;
    // As many parts at a time as registers hold, where smaller tiles have two blocks on a multiprocessor.
    constexpr int kUnderWay = (kRoom > 0 ? kRoom : kSums >= 32 ? 128 : 64) / kSums;
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

// Adds the sums of a cluster's blocks, which share a tile of kQuads * kThreads times four sums. Each thread of the
// block has put its sums where slot(at) says, float4 number `at` of all. For this block's share of these numbers the
// totals are handed to store(at, total). All threads of the cluster call it, and may end afterwards.
template <int kThreads, int kQuads, class Slot, class Store>
QLK_DEVICE void add_cluster(const Splits& splits, Slot slot, Store store) {
    if constexpr (kClusters) {
        const int blocks = splits.count, rank = static_cast<int>(cluster_rank());
        // Shares are whole rows of 32 numbers, a warp's, so that a warp's results fill sectors.
        constexpr int kRows = kQuads * kThreads / 32;
        const int first = kRows * rank / blocks * 32 + static_cast<int>(threadIdx.x);
        const int end = kRows * (rank + 1) / blocks * 32;
        constexpr int kOwn = (kQuads + 1) / 2;  // at most, as there are two blocks or more
        constexpr int kUnderWay = kOwn <= 2 ? 8 : 4;
        float4 all[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) all[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        cluster_arrive();
        cluster_wait();
#pragma unroll 1
        for (int from = 0; from < blocks; from += kUnderWay) {
            float4 more[kUnderWay][kOwn];
#pragma unroll
            for (int which = 0; which < kUnderWay; ++which) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    more[which][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    const int at = first + i * kThreads;
                    if (from + which < blocks && at < end) {
                        more[which][i] = load_shared(cluster_map(slot(at), static_cast<unsigned>(from + which)));
                    }
                }
            }
#pragma unroll
            for (int which = 0; which < kUnderWay; ++which) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    all[i].x += more[which][i].x;
                    all[i].y += more[which][i].y;
                    all[i].z += more[which][i].z;
                    all[i].w += more[which][i].w;
                }
            }
        }
        cluster_arrive();  // this block has read what it needs
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (first + i * kThreads < end) store(first + i * kThreads, all[i]);
        }
        cluster_wait();  // the others have too, so this one's shared memory may go
    }
}

// How `count` blocks share some tiles: the tiles' depths are put one after another and cut anywhere, so that all blocks
// have equal work however many tiles there are ("Stream-K", Osama et al., arXiv 2301.03598). Tiles are numbered from
// the first that this block shares. A step is one of `steps` along a tile's depth.
struct Share {
    const Splits& splits;
    unsigned steps;

    QLK_DEVICE unsigned count() const { return static_cast<unsigned>(splits.count); }
    QLK_DEVICE unsigned index() const { return blockIdx.x - static_cast<unsigned>(splits.whole); }
    QLK_DEVICE unsigned self() const { return index() % count(); }
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
    // A tile's number among all that are shared.
    QLK_DEVICE unsigned number(unsigned tile) const {
        return index() / count() * static_cast<unsigned>(splits.tiles) + tile;
    }

    // add_parts_of for one of these tiles. From one part to the next along the depths either the block or the tile
    // changes, or both: the sum of their numbers is a part's place.
    template <int kThreads, int kRoom = 0, int kSums, class Barrier = BlockBarrier>
    QLK_DEVICE bool add(unsigned tile, float (&sum)[kSums], int* word, Barrier barrier = {}) const {
        const unsigned first = owner(tile * steps), last = owner((tile + 1) * steps - 1);
        const unsigned tiles = static_cast<unsigned>(splits.tiles), group = index() / count();
        const int64_t of_first = static_cast<int64_t>(group) * (count() + tiles - 1) + first + tile;
        const auto place = [&](int part) { return of_first + part; };
        return add_parts_of<kThreads, kRoom>(splits, number(tile), static_cast<int>(self() - first),
                                             static_cast<int>(last - first + 1), place, sum, word, barrier);
    }
};

}  // namespace qlk::cuda
