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

// The properties of a card that the choice depends on.
struct Card {
    int architecture;  // that the kernels were compiled for, 90 for sm_90
    int multiprocessors;
    size_t shared_bytes;  // the most that a block may have

    // Caps shared_bytes: code that the driver compiles from an older architecture's PTX lacks the kernels that did
    // not fit there.
    static Card capped(int architecture, int multiprocessors, size_t shared_bytes) {
        return {architecture, multiprocessors, std::min(shared_bytes, most_shared(architecture))};
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
    kFew,     // rows8.cuh: up to 8 rows of x; codes looked up in shared memory, products on tensor cores
    kMiddle,  // rows64.cuh: the same for up to 64 rows, x in pieces
    kTiles,   // tiles.cuh: a tile of rows x columns for each block
    kFloats,  // product.cuh: float32 units, for whatever the others don't take
};

struct Row {
    const char* name;
    Family family;
    int rows, columns;           // of a tile
    int stages;                  // steps whose copies are in flight
    int64_t most;                // chosen up to this many rows of x
    int least_bf16, least_fp16;  // oldest architectures
    bool forced;                 // runs only where QLORA_KERNELS_CUDA_KERNEL names it, and doesn't share its tiles
};

constexpr int64_t kAnyRows = INT64_MAX;

// The first row that can take the problem runs.
constexpr Row kDispatch[] = {
    // It takes 8 rows too, but all of x goes into every block before it begins.
    {"few", Family::kFew, 8, 8, 4, 4, 80, 80, false},
    {"middle8", Family::kMiddle, 8, 128, 2, 8, 80, 80, false},
    {"middle16", Family::kMiddle, 16, 128, 2, 16, 80, 80, false},
    // Up to 64 rows are two tiles, whose sums one block would have no registers for: every weight is decoded twice.
    {"middle32", Family::kMiddle, 32, 128, 2, 64, 80, 80, false},
    {"tiles16", Family::kTiles, 16, 128, 4, 16, 80, 75, false},
    {"tiles32", Family::kTiles, 32, 128, 4, 32, 80, 75, false},
    {"tiles64", Family::kTiles, 64, 128, 4, 64, 80, 75, false},
    // On every card predicted to take longer than the next: all its warps decode at once, and the tensor cores wait.
    {"tiles128wide", Family::kTiles, 128, 256, 4, kAnyRows, 80, 75, true},
    {"tiles128", Family::kTiles, 128, 128, 4, kAnyRows, 80, 75, false},
    // Three stages fit the 99 KiB of sm_86, sm_89 and sm_120; 32 rows fit the 64 KiB of sm_75.
    {"tiles128x3", Family::kTiles, 128, 128, 3, kAnyRows, 80, 75, false},
    {"tiles32any", Family::kTiles, 32, 128, 4, kAnyRows, 80, 75, false},
    {"floats", Family::kFloats, 64, 64, 1, kAnyRows, 0, 0, false},
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

struct Plan {
    Row row;
    int splits;       // blocks that share tiles, each with a part of the depth
    int64_t shared;   // tiles that these share: one; or all, whose depths are then cut as one
    int64_t tiles;    // in all; for rows8.cuh, groups of row_tiles times 16 rows of W
    int64_t whole;    // how many tiles have a block of their own while others are shared
    int row_tiles;    // rows8.cuh only: tiles of 16 rows of W in a group
    int64_t scratch;  // bytes

    int64_t blocks() const { return whole + (tiles - whole) / shared * splits; }
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
    if (row.family == Family::kFew || row.family == Family::kMiddle) {
        if (p.backward) return "it computes no gradients";
        if (p.n * (p.k / kBlock) >= (int64_t{1} << 32) - 4096) return "more blocks than 32 bits count";
    }
    if (row.family == Family::kMiddle && p.k > kMiddleLongest) return "K is beyond 2^27";
    if (row.family == Family::kMiddle && !p.left_aligned) return "x does not lie on 16 bytes";
    if (row.family == Family::kFew) {
        if (p.m > row.rows) return "more than 8 rows";
        if (few_shared(p.m, p.k) > card.shared_bytes) return "x does not fit into shared memory";
        return nullptr;
    }
    const size_t shared =
        row.family == Family::kMiddle ? kMiddleShared : tiles_shared(row.rows, row.columns, row.stages);
    return shared > card.shared_bytes ? "its stages do not fit into shared memory" : nullptr;
}

// How a row of the table would run a problem.
inline Plan planned(const Row& row, const Problem& p, const Card& card) {
    Plan plan{row, 1, 1, 0, 0, 1, 0};
    const int64_t sms = card.multiprocessors;
    if (row.family == Family::kFew) {
        // 4, 2 or 1 tiles of 16 rows at a time: the most that keeps the blocks' shares even.
        const int64_t all = over(p.n, 16);
        int64_t best = INT64_MAX;
        for (const int tiles : {4, 2, 1}) {
            const int64_t groups = over(all, tiles), rounds = over(groups, sms) * tiles;
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
    if (row.forced || plan.tiles == 0) return plan;
    const bool middle = row.family == Family::kMiddle;
    const int64_t step = middle ? kMiddleDepth : kTileDepth, steps = over(p.depth(), step);
    const int64_t tile_bytes = static_cast<int64_t>(row.rows) * row.columns * 4;
    const auto take = [&](int splits, int64_t whole, int64_t shared, int64_t parts) {
        const int64_t bytes = parts * tile_bytes + ticket_bytes(plan.tiles - whole);
        if (bytes > kMostScratch) return false;
        plan.splits = splits;
        plan.whole = whole;
        plan.shared = shared;
        plan.scratch = bytes;
        return true;
    };
    // In steps. Starting and ending a tile takes as long as 256 of depth: reasoned, not measured on a card.
    const int64_t begin = 256 / step, room = sms * (row.rows <= 32 && !middle ? 2 : 1);
    // Tiles of a last round that doesn't fill the card are shared, by the number of blocks that finishes first. Each
    // block has a depth of at least 512.
    const int64_t rest = plan.tiles % room, whole = plan.tiles - rest;
    int64_t least = rest > 0 ? steps + begin : 0;
    for (int splits = 2; rest > 0 && splits <= 16 && steps / splits * step >= 512; ++splits) {
        const int64_t time = over(rest * splits, room) * (over(steps, splits) + begin);
        if (time < least && !(middle && whole > 0) && take(splits, whole, 1, rest * splits)) least = time;
    }
    if (middle) {
        // Or treat all tiles' depths as one and cut that evenly.
        const int64_t all = plan.tiles * steps,
                      blocks = std::clamp<int64_t>(all * step / 512, 1, std::min(sms, int64_t{255}));
        const int64_t apart = whole / room * (steps + begin) + least;
        const int64_t together = over(all, blocks) + (over(plan.tiles, blocks) + 1) * begin;
        if (blocks > 1 && together < apart && all * blocks < UINT32_MAX) {
            take(static_cast<int>(blocks), 0, plan.tiles, 2 * blocks);
        }
    }
    return plan;
}

// The table's choice.
inline Plan chosen(const Problem& p, const Card& card) {
    for (const Row& row : kDispatch) {
        if (!row.forced && p.m <= row.most && !refusal(row, p, card)) return planned(row, p, card);
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
