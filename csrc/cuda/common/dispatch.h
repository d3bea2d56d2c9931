// Which kernel runs a product: one table, by architecture, type, M, N and K. `qlora-kernels info --dispatch N K` prints
// its choices; QLORA_KERNELS_CUDA_KERNEL names a row and forces it. Plain C++, so a build without CUDA has the table
// too.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "error.h"
#include "kernels.h"

namespace qlk::cuda {

// The most shared memory that a block may have on an architecture, 90 for sm_90 (CUDA C++ Programming Guide, "Technical
// Specifications per Compute Capability"). A kernel that needs more has no code there (compiled.cuh).
constexpr size_t most_shared(int architecture) {
    return architecture < 80                                                   ? 64 * 1024
           : architecture == 80 || architecture == 87                          ? 163 * 1024
           : architecture == 90 || (architecture >= 100 && architecture < 120) ? 227 * 1024
                                                                               : 99 * 1024;
}

// Whether blocks may form clusters that read each other's shared memory. sm_120 has them too, but its cards are small:
// what is gained there is not known.
constexpr bool has_clusters(int architecture) { return architecture >= 90 && architecture < 120; }

// The properties of a card that the choice depends on.
struct Card {
    int architecture;  // that the kernels were compiled for, 90 for sm_90
    int multiprocessors;
    size_t shared_bytes;  // the most that a block may have
    bool wgmma = true;    // compiled for sm_90a, not for sm_90
    bool clusters = true;

    // Caps shared_bytes: code that the driver compiles from an older architecture's PTX lacks the kernels that did
    // not fit there.
    static Card capped(int architecture, int multiprocessors, size_t shared_bytes) {
        // QLORA_KERNELS_CUDA_CLUSTERS=0 does without: where a card is divided, a cluster may not fit a part of it.
        const char* const allowed = std::getenv("QLORA_KERNELS_CUDA_CLUSTERS");
        return {architecture, multiprocessors, std::min(shared_bytes, most_shared(architecture)), architecture == 90,
                has_clusters(architecture) && (!allowed || std::string(allowed) != "0")};
    }
};

// The product: y = x W^T, or dx = dy W with `backward`.
struct Problem {
    int64_t m, n, k;
    DType dtype;
    bool backward;
    bool weight_aligned;  // its codes are 16-byte aligned
    bool left_aligned;    // so are the rows of x, or dy

    int64_t columns() const { return backward ? k : n; }
    int64_t depth() const { return backward ? n : k; }
};

enum class Family {
    kFew,        // rows8.cuh: up to 8 rows of x; codes looked up in shared memory, products on tensor cores
    kMiddle,     // rows64.cuh: the same for up to 64 rows, x in pieces
    kTiles,      // tiles.cuh: a tile of rows x columns for each block
    kWarpgroup,  // warpgroups.cuh: the same on Hopper's own products, codes looked up in shared memory
    kFloats,     // product.cuh: float32 units, for whatever the others don't take
};

struct Row {
    const char* name;
    Family family;
    int rows, columns;           // of a tile
    int stages;                  // steps whose copies are in flight
    int64_t most;                // chosen up to this many rows of x
    int least_bf16, least_fp16;  // oldest architectures
};

constexpr int64_t kAnyRows = INT64_MAX;

// The first row that can take the problem runs.
constexpr Row kDispatch[] = {
    // It takes 8 rows too, but all of x goes into every block before it begins.
    {"few", Family::kFew, 8, 8, 4, 4, 80, 80},
    // On sm_90a alone.
    {"warpgroup16", Family::kWarpgroup, 16, 128, 1, 16, 90, 90},
    {"warpgroup32", Family::kWarpgroup, 32, 128, 1, 32, 90, 90},
    {"warpgroup64", Family::kWarpgroup, 64, 128, 1, 64, 90, 90},
    {"warpgroup128", Family::kWarpgroup, 128, 128, 1, kAnyRows, 90, 90},
    {"middle8", Family::kMiddle, 8, 128, 2, 8, 80, 80},
    {"middle16", Family::kMiddle, 16, 128, 2, 16, 80, 80},
    // Up to 64 rows are two tiles, whose sums one block would have no registers for: every weight is decoded twice.
    {"middle32", Family::kMiddle, 32, 128, 2, 64, 80, 80},
    {"tiles16", Family::kTiles, 16, 128, 4, 16, 80, 75},
    {"tiles32", Family::kTiles, 32, 128, 4, 32, 80, 75},
    {"tiles64", Family::kTiles, 64, 128, 4, 64, 80, 75},
    // By prediction the wider tile is faster where there are enough of them to fill a card: on an H200 from about 900
    // rows on, on an A100 from about 700.
    {"tiles128", Family::kTiles, 128, 128, 4, 768, 80, 75},
    {"tiles128wide", Family::kTiles, 128, 256, 4, kAnyRows, 80, 75},
    // Three stages fit the 99 KiB of sm_86, sm_89 and sm_120; 32 rows fit the 64 KiB of sm_75.
    {"tiles128x3", Family::kTiles, 128, 128, 3, kAnyRows, 80, 75},
    {"tiles32any", Family::kTiles, 32, 128, 4, kAnyRows, 80, 75},
    {"floats", Family::kFloats, 64, 64, 1, kAnyRows, 0, 0},
};

constexpr int kTileDepth = 64;
constexpr int64_t kMostScratch = 16 << 20;

// Shared memory of a block of tiles.cuh: the stages of both operands, and two buffers of decoded weights.
constexpr size_t tiles_shared(int rows, int columns, int stages) {
    return static_cast<size_t>(stages) * (rows * 128 + columns * 32) + 2 * columns * 128;
}

// Shared memory of rows8.cuh: two levels for each byte, for 32 lanes, with a gap of 128 bytes behind each; the table of
// constants; two groups' partial sums. x takes 128 bytes for each row and block of 64 columns, its rows padded to 128:
// in the gaps, or elsewhere if there are too few.
constexpr int kFewWarps = 16;
constexpr size_t few_x_bytes(int64_t m, int64_t k) {
    const int64_t units = (k + 127) / 128 * 2 * m;
    return units > 256 ? static_cast<size_t>(units) * 128 : 0;
}
constexpr size_t few_shared(int64_t m, int64_t k) {
    return 65536 + 1024 + few_x_bytes(m, k) + static_cast<size_t>(2 * kFewWarps * 20 * 4 * m);
}

// Shared memory of rows64.cuh: the same table, with x or the sums of four slices in its gaps, 128 bytes for a row of x,
// slice and buffer; constants of eight warps, their table, their mean and a word.
constexpr int kMiddleDepth = 4 * kBlock;
constexpr int64_t kMiddleLongest = int64_t{1} << 27;  // eight rows of x stay within 2^32 bytes
constexpr int middle_rows_at_once(int rows) { return rows > 16 ? rows / 2 : rows; }
constexpr int middle_buffers(int rows) { return rows > 16 ? 2 : 4; }
constexpr size_t kMiddleShared = 65536 + 8 * 4 * 64 * 4 + 256 * 4 + 16;

// warpgroups.cuh: the depth of a step; blocks of W in a stage of x; and shared memory: 64 KiB for a step's stages and
// the rest; two levels for each byte, for 32 lanes, in rows twice as long; above 64 rows the stages, 64 KiB, behind it.
constexpr int warpgroup_depth(int rows) { return (rows <= 32 ? 8 : 4) * kBlock; }
constexpr int warpgroup_stage_blocks(int rows) { return rows <= 16 ? 4 : rows <= 32 ? 2 : 1; }
constexpr size_t warpgroup_shared(int rows) { return static_cast<size_t>(rows <= 64 ? 2 : 3) * 65536; }

struct Plan {
    Row row;
    int splits;       // blocks that share tiles, each with a part of the depth
    bool cluster;     // the blocks that share a tile are a cluster
    int64_t shared;   // tiles that these share: one; or all, whose depths are then cut as one
    int64_t tiles;    // in all; for rows8.cuh, groups of row_tiles times 16 rows of W
    int64_t whole;    // how many tiles have a block of their own while others are shared
    int row_tiles;    // rows8.cuh only: tiles of 16 rows of W in a group
    int64_t scratch;  // bytes

    int64_t blocks() const { return whole + (tiles - whole) / shared * splits; }
    unsigned blocks_of_cluster() const { return cluster ? static_cast<unsigned>(splits) : 1u; }
};

constexpr int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t ticket_bytes(int64_t tiles) { return over(tiles, 2) * 16; }

// Why a kernel cannot take a problem, or null if it can.
inline const char* refusal(const Row& row, const Problem& p, const Card& card) {
    if (row.family == Family::kFloats) return nullptr;
    if (p.dtype == DType::kFloat32) return "float32 has no tensor cores here";
    if (card.architecture < (p.dtype == DType::kBFloat16 ? row.least_bf16 : row.least_fp16)) {
        return "the architecture lacks its instructions";
    }
    if (p.k % kBlock != 0) return "K is no multiple of 64";
    if (std::max(p.n, p.k) > INT32_MAX - 4096) return "a side of the weight is beyond 32 bits";
    if (!p.weight_aligned) return "the packed weight does not lie on 16 bytes";
    if (row.family == Family::kWarpgroup && (card.architecture != 90 || !card.wgmma)) return "it is for sm_90a";
    if (row.family == Family::kFew || row.family == Family::kMiddle || row.family == Family::kWarpgroup) {
        if (p.backward) return "it computes no gradients";
        if (p.n * (p.k / kBlock) >= (int64_t{1} << 32) - 4096) return "more blocks than 32 bits count";
    }
    if (row.family == Family::kMiddle && p.k > kMiddleLongest) return "K is beyond 2^27";
    if ((row.family == Family::kMiddle || row.family == Family::kWarpgroup) && !p.left_aligned) {
        return "x does not lie on 16 bytes";
    }
    if (row.family == Family::kFew) {
        if (p.m > row.rows) return "more than 8 rows";
        if (few_shared(p.m, p.k) > card.shared_bytes) return "x does not fit into shared memory";
        return nullptr;
    }
    const size_t shared = row.family == Family::kMiddle      ? kMiddleShared
                          : row.family == Family::kWarpgroup ? warpgroup_shared(row.rows)
                                                             : tiles_shared(row.rows, row.columns, row.stages);
    return shared > card.shared_bytes ? "its stages do not fit into shared memory" : nullptr;
}

// Clocks on sm_90, as bench/compiled predicts them. No card has shown them.
struct Cost {
    int64_t step;        // of the main loop
    int64_t tile;        // to begin and to end a tile
    int64_t tile_bytes;  // of its sums

    static constexpr int64_t kTrip = 480;  // to memory and back
    int64_t part() const { return tile_bytes / 64; }

    // What sharing a tile adds. By tickets: trips for the stores, a fence, two atomic operations and the loads; one
    // block reads all parts, at 64 bytes a clock.
    int64_t ticket(int64_t parts) const { return 5 * kTrip + (1 + parts) * part(); }
    // In a cluster: two barriers and a trip between multiprocessors; each block reads as much as it has written.
    int64_t cluster() const { return 1100 + part(); }

    // All of a launch whose blocks cut the tiles' depths as one. A block may share the tile in which it begins and the
    // one in which it ends, and be the last in either.
    int64_t together(int64_t tiles, int64_t steps, int64_t blocks) const {
        const int64_t each = over(tiles * steps, blocks), parts = over(steps, each) + 1;
        return each * step + (over(tiles, blocks) + 1) * tile + ticket(parts) + 3 * kTrip + part();
    }
};

inline Cost cost_of(const Row& row) {
    const int64_t rows = row.rows;
    if (row.family == Family::kWarpgroup) {
        return {warpgroup_depth(row.rows) / kBlock * std::max<int64_t>(190, rows * 23 / 4), 1600 + 20 * rows,
                rows * row.columns * 4};
    }
    return {row.family == Family::kMiddle ? 1200 + 14 * rows : 700 + rows * 7 / 2, 1600 + 20 * rows,
            rows * row.columns * 4};
}

// How many clusters of `size` blocks are on a card at once. They stay within a group of multiprocessors (GPC): 16 each
// on Hopper, 18 in as many as make up the rest; an H200 has six and two. Cards differ, and where fewer fit, clusters
// wait for their turn.
constexpr int kMostOfCluster = 8;
inline int64_t clusters_at_once(int64_t size, int64_t multiprocessors, int64_t blocks_at_once) {
    const int64_t groups = std::max<int64_t>(multiprocessors / 16, 1), group = std::min<int64_t>(multiprocessors, 16);
    const int64_t larger = std::min((multiprocessors - groups * group) / 2, groups);
    if (size > group) return 0;
    return (groups - larger) * (group * blocks_at_once / size) + larger * ((group + 2) * blocks_at_once / size);
}

// Whether blocks may have parts of several tiles, whose depths are cut as one: rows64.cuh can, and tiles.cuh with so
// many rows.
constexpr bool cut_anywhere(int rows, int columns) { return rows >= 128 && columns == 128; }

// Chooses how blocks share the tiles of rows64.cuh, warpgroups.cuh or tiles.cuh: as tiles whose depth is split, or cut
// anywhere.
inline void share_tiles(Plan& plan, const Problem& p, const Card& card) {
    const Row& row = plan.row;
    // With few rows all tiles are shared, so that a block fills its table once. With more the sums would not fit
    // scratch.
    const bool warpgroup = row.family == Family::kWarpgroup, middle = row.rows <= 64 && row.family != Family::kTiles;
    const int64_t step = warpgroup ? warpgroup_depth(row.rows) : middle ? kMiddleDepth : kTileDepth;
    const int64_t steps = over(p.depth(), step);
    const Cost cost = cost_of(row);
    const auto take = [&](int splits, bool cluster, int64_t whole, int64_t shared) {
        const int64_t groups = (plan.tiles - whole) / shared, parts = groups * (splits + shared - 1);
        const int64_t bytes = cluster ? 0 : parts * cost.tile_bytes + ticket_bytes(plan.tiles - whole);
        // A block without a step would take a part. Tiles of one step would need another barrier between them.
        if (bytes > kMostScratch || splits > steps * shared || (shared > 1 && steps < 2)) return false;
        plan.splits = splits;
        plan.cluster = cluster;
        plan.whole = whole;
        plan.shared = shared;
        plan.scratch = bytes;
        return true;
    };
    // Tiles of a last round that doesn't fill the card are shared, by the number of blocks that finishes first. Each
    // block has a depth of at least 512.
    const int64_t at_once = row.rows <= 32 && !middle ? 2 : 1, room = card.multiprocessors * at_once;
    const int64_t rest = plan.tiles % room, whole = plan.tiles - rest;
    int64_t least = rest > 0 ? steps * cost.step + cost.tile : 0;
    for (int splits = 2; rest > 0 && splits <= 16 && steps / splits * step >= 512; ++splits) {
        const int64_t alone = over(steps, splits) * cost.step + cost.tile;
        const int64_t by_ticket = over(rest * splits, room) * (alone + cost.ticket(splits));
        if (by_ticket < least && !(middle && whole > 0) && take(splits, false, whole, 1)) least = by_ticket;
        // A cluster's blocks come and go together, so blocks that have a tile alone are in none. Wide tiles leave no
        // registers for it.
        const int64_t clusters = card.clusters && whole == 0 && row.columns == 128 && splits <= kMostOfCluster
                                     ? clusters_at_once(splits, card.multiprocessors, at_once)
                                     : 0;
        if (clusters == 0) continue;
        const int64_t by_cluster = over(rest, clusters) * (alone + cost.cluster());
        if (by_cluster < least && take(splits, true, 0, 1)) least = by_cluster;
    }
    if (middle || cut_anywhere(row.rows, row.columns)) {
        // Or treat the depths of all tiles, or of those of the last round, as one and cut that evenly.
        const int64_t tiles = middle ? plan.tiles : rest, all = tiles * steps;
        const int64_t blocks = std::clamp<int64_t>(all * step / 512, 1, std::min<int64_t>(card.multiprocessors, 255));
        const int64_t apart = (middle ? whole / room * (steps * cost.step + cost.tile) : 0) + least;
        if (blocks > 1 && tiles > 1 && all * blocks < UINT32_MAX && cost.together(tiles, steps, blocks) < apart) {
            take(static_cast<int>(blocks), false, plan.tiles - tiles, tiles);
        }
    }
}

// How a row of the table would run a problem.
inline Plan planned(const Row& row, const Problem& p, const Card& card) {
    Plan plan{row, 1, false, 1, 0, 0, 1, 0};
    if (row.family == Family::kFew) {
        // 4, 2 or 1 tiles of 16 rows at a time: the most that keeps the blocks' shares even.
        const int64_t all = over(p.n, 16);
        int64_t best = INT64_MAX;
        for (const int tiles : {4, 2, 1}) {
            const int64_t groups = over(all, tiles), rounds = over(groups, card.multiprocessors) * tiles;
            if (rounds < best) {
                best = rounds;
                plan.row_tiles = tiles;
                plan.tiles = groups;
            }
        }
        return plan;
    }
    if (row.family == Family::kFloats) {
        plan.tiles = over(p.m, 64) * over(p.columns(), 64);
        return plan;
    }
    plan.tiles = over(p.m, row.rows) * over(p.columns(), row.columns);
    if (plan.tiles > 0) share_tiles(plan, p, card);
    return plan;
}

// The table's choice.
inline Plan chosen(const Problem& p, const Card& card) {
    for (const Row& row : kDispatch) {
        if (p.m <= row.most && !refusal(row, p, card)) return planned(row, p, card);
    }
    QLK_CHECK(false, "no kernel takes the problem");
}

// The table's choice, or what QLORA_KERNELS_CUDA_KERNEL forces. Throws when that names no kernel, or one that cannot
// take the problem.
inline Plan plan(const Problem& p, const Card& card) {
    const char* const forced = std::getenv("QLORA_KERNELS_CUDA_KERNEL");
    if (forced && *forced) {
        std::string names;
        for (const Row& row : kDispatch) {
            names += (names.empty() ? "" : ", ") + std::string(row.name);
            if (std::string(forced) != row.name) continue;
            const char* const why = refusal(row, p, card);
            QLK_CHECK(!why, "QLORA_KERNELS_CUDA_KERNEL=" + std::string(forced) +
                                " cannot take M = " + std::to_string(p.m) + ", N = " + std::to_string(p.n) +
                                ", K = " + std::to_string(p.k) + (p.backward ? ", backward: " : ": ") + why);
            return planned(row, p, card);
        }
        QLK_CHECK(false, "QLORA_KERNELS_CUDA_KERNEL=" + std::string(forced) + " names no kernel; there are " + names);
    }
    return chosen(p, card);
}

}  // namespace qlk::cuda
