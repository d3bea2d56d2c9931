#include "cuda/linear/adapters.h"

#include <algorithm>

#include "cuda/common/aligned.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/splits.h"
#include "cuda/linear/adapters.cuh"
#include "cuda/linear/overlap.h"

namespace qlk::cuda {
namespace {

constexpr int64_t kRows = 128, kColumns = 64;  // of a tile

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t four(int64_t count) { return parts_of(count, 4) * 4; }

// What a block of one instantiation needs.
struct Shape {
    int rank, stages;  // ranks at a time, stages of copies
    int blocks;        // per multiprocessor, as far as registers allow
    size_t shared;     // bytes
};

template <class Traits>
constexpr Shape shape_of() {
    return {Traits::kRank, Traits::kStages, Traits::kBlocks, sizeof(typename Traits::Shared)};
}

template <class T>
Card card_of(int device) {
    return Card::capped(compiled_for(adapter_sum_kernel<T>, device), multiprocessors(device), shared_limit(device));
}

// Whether a card can run blocks of that shape.
template <class T>
bool takes(const Card& card, const Shape& shape) {
    return card.architecture >= (std::is_same_v<T, bf16> ? 80 : 75) && shape.shared <= card.shared_bytes;
}

// 32 ranks at a time where there are more than 16 and a block may have up to 96 KiB of shared memory.
template <class T, bool kDown, bool kGradient>
using Narrow = AdapterTraits<T, 16, 3, kDown, kGradient, true>;
template <class T, bool kDown, bool kGradient>
using Wide = AdapterTraits<T, 32, 4, kDown, kGradient, true>;
template <class T, bool kDown, bool kGradient>
Shape shape(int64_t r, const Card& card) {
    constexpr Shape narrow = shape_of<Narrow<T, kDown, kGradient>>(), wide = shape_of<Wide<T, kDown, kGradient>>();
    return r > narrow.rank && wide.shared <= card.shared_bytes ? wide : narrow;
}

int64_t blocks_at_once(const Shape& shape, const Card& card) {
    return card.multiprocessors * (2 * shape.shared <= card.shared_bytes ? shape.blocks : 1);
}

struct DownPlan {
    int64_t row_tiles;
    int rank_tiles, splits;
    int64_t ticket_bytes, bytes;
};

// Splits the columns until all multiprocessors have blocks, each with at least two steps.
DownPlan down_plan(int64_t m, int64_t c, int64_t r, const Shape& shape, const Card& card) {
    DownPlan plan{};
    plan.row_tiles = parts_of(m, kRows);
    plan.rank_tiles = static_cast<int>(parts_of(r, shape.rank));
    const int64_t tiles = plan.row_tiles * plan.rank_tiles, tile_bytes = kRows * shape.rank * 4;
    const int64_t most = std::min(parts_of(c, kColumns) / 2, (kMostScratch - tiles * 8 - 128) / (tiles * tile_bytes));
    plan.splits = static_cast<int>(std::clamp<int64_t>(std::min(blocks_at_once(shape, card) / tiles, most), 1, 255));
    if (plan.splits > 1) {
        plan.ticket_bytes = parts_of(tiles * 8, 128) * 128;
        plan.bytes = plan.ticket_bytes + tiles * plan.splits * tile_bytes;
    }
    return plan;
}

struct GradientPlan {
    int64_t rows;  // in a launch; 0: it doesn't fit into the scratch
    int across, rank_tiles, column_splits, row_splits;
    int64_t down_bytes, bytes;  // of scratch: the parts of v, and everything
};

// Splitting the columns costs a copy of v for each part, splitting the rows a copy of the gradient. Picks what takes
// the fewest steps among the plans that fit into the scratch. A step is 16 KiB of a block's reading; copies count as
// the steps that would read as much; a launch counts 8. More launches are tried as long as they help.
GradientPlan gradient_plan(int64_t m, int64_t c, int64_t r, bool down, const Shape& shape, const Card& card) {
    constexpr int64_t kLaunch = 8, kStep = kRows * kColumns * 2;
    GradientPlan best{};
    int64_t best_cost = INT64_MAX;
    const int64_t rank_tiles = parts_of(r, shape.rank), blocks = blocks_at_once(shape, card);
    const int64_t gradient_bytes = four(c * r) * 4;
    for (int64_t wanted = 1;; wanted *= 2) {
        const int64_t row_tiles = parts_of(parts_of(m, wanted), kRows), rows = std::min(m, row_tiles * kRows);
        const int64_t launches = parts_of(m, rows), before = best_cost;
        for (int across = 8; across >= 1; --across) {
            const int64_t column_splits = parts_of(c, across * kColumns);
            const int64_t down_bytes = down ? column_splits * four(rows * r) * 4 : 0;
            if (down_bytes > kMostScratch) break;
            int64_t row_splits = std::min(blocks / (column_splits * rank_tiles), row_tiles);
            row_splits = std::max<int64_t>(std::min(row_splits, (kMostScratch - down_bytes) / gradient_bytes), 1);
            // adapter_gradient_kernel's condition once a third tile of rows takes the place of the first.
            const int64_t tiles_each = parts_of(row_tiles, row_splits);
            if (tiles_each > 2 && across < shape.stages - 1) break;
            const int64_t bytes = down_bytes + (row_splits > 1 ? row_splits * gradient_bytes : 0);
            const int64_t rounds = parts_of(column_splits * rank_tiles * row_splits, blocks);
            // Parts are written and read; so is the gradient, by every launch after the first.
            const int64_t again = (launches - 1) * 2 * gradient_bytes;
            const int64_t cost =
                launches * ((rounds * tiles_each * across + kLaunch) * kStep + 2 * bytes / blocks) + again / blocks;
            if (cost >= best_cost) continue;
            best_cost = cost;
            best = {rows,
                    across,
                    static_cast<int>(rank_tiles),
                    static_cast<int>(column_splits),
                    static_cast<int>(row_splits),
                    down_bytes,
                    bytes};
        }
        if (row_tiles == 1 || (best.rows > 0 && best_cost == before)) return best;
    }
}

template <class T, class Traits>
void down_launch(AdapterArguments<T> a, const Card& card, void* scratch, const Stream& stream, Start start) {
    constexpr Shape shape = shape_of<Traits>();
    const DownPlan plan = down_plan(a.m, a.c, a.r, shape, card);
    QLK_CHECK(plan.bytes == 0 || scratch != nullptr, "blocks that share rows of u or v need scratch");
    char* const room = static_cast<char*>(scratch);
    a.rank_tiles = plan.rank_tiles;
    a.splits = {reinterpret_cast<float4*>(room + plan.ticket_bytes), reinterpret_cast<unsigned long long*>(room),
                plan.splits > 1 ? next_launch() : 0, plan.splits};
    launch_overlapping(adapter_down_kernel<T, Traits>, plan.row_tiles * plan.splits * plan.rank_tiles, Traits::kThreads,
                       shape.shared, stream, a, start);
}

// Launches u or v alone, if the card can run it.
template <class T, bool kTransposed>
bool down(AdapterArguments<T> a, void* scratch, const Stream& stream, Start start) {
    const Card card = card_of<T>(stream.device);
    const Shape chosen = shape<T, true, false>(a.r, card);
    if (!takes<T>(card, chosen)) return false;
    a.big_aligned = lies_on(a.big, 16) && a.c % 8 == 0;
    a.adapter_aligned = lies_on(a.adapter, 16) && (kTransposed ? a.r : a.c) % 8 == 0;
    a.down_aligned = lies_on(a.down, 8) && a.r % 4 == 0;
    if (chosen.rank == 16) {
        down_launch<T, AdapterTraits<T, 16, 3, true, false, kTransposed>>(a, card, scratch, stream, start);
    } else {
        down_launch<T, AdapterTraits<T, 32, 4, true, false, kTransposed>>(a, card, scratch, stream, start);
    }
    return true;
}

template <class T, class Traits>
bool gradient_launch(AdapterArguments<T> a, const Card& card, void* scratch, const Stream& stream, Start start) {
    constexpr Shape shape = shape_of<Traits>();
    const GradientPlan plan = gradient_plan(a.m, a.c, a.r, Traits::kDown, shape, card);
    if (plan.rows == 0) return false;
    QLK_CHECK(plan.bytes == 0 || scratch != nullptr, "the parts of a gradient need scratch");
    const int64_t rows_in_all = a.m;
    float* const gradient = a.gradient;
    const T *const big = a.big, *const low = a.low;
    T* const v = a.down;
    char* const room = static_cast<char*>(scratch);
    a.rank_tiles = plan.rank_tiles;
    a.row_splits = plan.row_splits;
    a.across = plan.across;
    for (int64_t first = 0; first < rows_in_all; first += plan.rows) {
        a.m = std::min(plan.rows, rows_in_all - first);
        a.big = big + first * a.c;
        a.low = low + first * a.r;
        a.dropout_first = first * a.c;
        a.row_splits = static_cast<int>(std::min<int64_t>(plan.row_splits, parts_of(a.m, kRows)));
        AdapterSumArguments<T> sum{};
        sum.add = first > 0;
        if (Traits::kDown) {
            a.down_parts = reinterpret_cast<float*>(room);
            a.down_stride = four(a.m * a.r);
            sum.down_parts = a.down_parts;
            sum.down_stride = a.down_stride;
            sum.down_count = a.m * a.r;
            sum.down_splits = plan.column_splits;
            sum.scale = a.scale;
            sum.down = v + first * a.r;
            sum.down_aligned = lies_on(sum.down, 8);
        }
        a.add = sum.add && a.row_splits == 1;
        if (a.row_splits > 1) {
            a.gradient = reinterpret_cast<float*>(room + plan.down_bytes);
            a.gradient_stride = four(a.c * a.r);
            sum.gradient_parts = a.gradient;
            sum.gradient_stride = a.gradient_stride;
            sum.gradient_count = a.c * a.r;
            sum.gradient_splits = a.row_splits;
            sum.gradient = gradient;
            sum.gradient_aligned = lies_on(gradient, 16);
        } else {
            a.gradient = gradient;
        }
        a.gradient_paired = a.r % 2 == 0 && lies_on(a.gradient, 8);
        const int64_t fours = (sum.down_stride + sum.gradient_stride) / 4;
        const Start last = first + plan.rows >= rows_in_all ? start : Start::kInOrder;
        launch(adapter_gradient_kernel<T, Traits>,
               static_cast<int64_t>(plan.column_splits) * a.row_splits * plan.rank_tiles, Traits::kThreads,
               shape.shared, stream, a);
        if (fours > 0) {
            launch_overlapping(adapter_sum_kernel<T>, parts_of(fours, kAdapterSumThreads), kAdapterSumThreads, 0,
                               stream, sum, last);
        }
    }
    return true;
}

// Launches a gradient, and v too with kDown, if the card can run it.
template <class T, bool kDown>
bool gradient(AdapterArguments<T> a, void* scratch, const Stream& stream, Start start) {
    const Card card = card_of<T>(stream.device);
    const Shape chosen = shape<T, kDown, true>(a.r, card);
    if (!takes<T>(card, chosen)) return false;
    a.big_aligned = lies_on(a.big, 16) && a.c % 8 == 0;
    a.adapter_aligned = lies_on(a.adapter, 16) && a.r % 8 == 0;
    a.low_aligned = lies_on(a.low, 16) && a.r % 8 == 0;
    return chosen.rank == 16
               ? gradient_launch<T, AdapterTraits<T, 16, 3, kDown, true, true>>(a, card, scratch, stream, start)
               : gradient_launch<T, AdapterTraits<T, 32, 4, kDown, true, true>>(a, card, scratch, stream, start);
}

template <class T>
int64_t scratch_of(int64_t m, int64_t n, int64_t k, int64_t r, bool backward, int device) {
    const Card card = card_of<T>(device);
    const auto down = [&](int64_t c) {
        const Shape chosen = shape<T, true, false>(r, card);
        return takes<T>(card, chosen) ? down_plan(m, c, r, chosen, card).bytes : 0;
    };
    const auto gradient = [&](int64_t c, bool with_v) {
        const Shape chosen = with_v ? shape<T, true, true>(r, card) : shape<T, false, true>(r, card);
        return takes<T>(card, chosen) ? gradient_plan(m, c, r, with_v, chosen, card).bytes : 0;
    };
    if (m == 0 || r == 0) return 0;
    return backward ? std::max({down(n), gradient(n, true), gradient(n, false), gradient(k, false)}) : down(k);
}

}  // namespace

template <class T>
bool adapter_down(const T* x, const T* lora_a, T* u, int64_t m, int64_t k, int64_t r, float scale,
                  const Dropout& dropout, void* scratch, const Stream& stream, Start start) {
    if constexpr (sizeof(T) == 2) {
        AdapterArguments<T> a{x, lora_a, nullptr, m, k, r, dropout};
        a.down = u;
        a.scale = scale;
        return down<T, false>(a, scratch, stream, start);
    } else {
        return false;
    }
}

template <class T>
bool adapter_up_gradient(const T* dy, const T* lora_b, const T* u, T* v, float* db, int64_t m, int64_t n, int64_t r,
                         float scale, void* scratch, const Stream& stream, Start start) {
    if constexpr (sizeof(T) == 2) {
        AdapterArguments<T> a{dy, lora_b, u, m, n, r, Dropout{nullptr, 0}};
        a.down = v;
        a.scale = scale;
        a.gradient = db;
        if (v && db && gradient<T, true>(a, scratch, stream, start)) return true;
        return (!v || down<T, true>(a, scratch, stream, db ? Start::kInOrder : start)) &&
               (!db || gradient<T, false>(a, scratch, stream, start));
    } else {
        return false;
    }
}

template <class T>
bool adapter_down_gradient(const T* x, const T* v, float* da, int64_t m, int64_t k, int64_t r, const Dropout& dropout,
                           void* scratch, const Stream& stream) {
    if constexpr (sizeof(T) == 2) {
        AdapterArguments<T> a{x, nullptr, v, m, k, r, dropout};
        a.gradient = da;
        a.gradient_by_rank = true;
        return gradient<T, false>(a, scratch, stream, Start::kInOrder);
    } else {
        return false;
    }
}

int64_t adapter_scratch(int64_t m, int64_t n, int64_t k, int64_t r, DType dtype, bool backward, int device) {
    switch (dtype) {
        case DType::kFloat32: return 0;
        case DType::kBFloat16: return scratch_of<bf16>(m, n, k, r, backward, device);
        case DType::kFloat16: return scratch_of<fp16>(m, n, k, r, backward, device);
    }
    QLK_CHECK(false, "adapter_scratch of dtype code " + std::to_string(static_cast<int>(dtype)));
}

#define QLK_ADAPTERS(T)                                                                                              \
    template bool adapter_down<T>(const T*, const T*, T*, int64_t, int64_t, int64_t, float, const Dropout&, void*,   \
                                  const Stream&, Start);                                                             \
    template bool adapter_up_gradient<T>(const T*, const T*, const T*, T*, float*, int64_t, int64_t, int64_t, float, \
                                         void*, const Stream&, Start);                                               \
    template bool adapter_down_gradient<T>(const T*, const T*, float*, int64_t, int64_t, int64_t, const Dropout&,    \
                                           void*, const Stream&)
QLK_ADAPTERS(float);
QLK_ADAPTERS(bf16);
QLK_ADAPTERS(fp16);
#undef QLK_ADAPTERS

}  // namespace qlk::cuda
