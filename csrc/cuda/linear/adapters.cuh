// The low-rank products of the layer on tensor cores, for 16-bit types:
//
//     u = scale * mask(x) A^T     v = scale * dy B                 down, [m, r]
//     dA = v^T mask(x)            dB = dy^T u                      gradients, [r, k] and [n, r]
//
// What costs is to read x and dy, here `big`, [m, c]; the adapters come from L2. A block reads tiles of 128 rows x 64
// columns by cp.async, kStages deep, and uses a tile for whatever is wanted of it: its product with a slice of the
// adapter (rows of u or v, each warp 16 of them), and its transpose's with rows of u or v (columns of dA or dB, each
// warp 16 of them and half of r). Ranks beyond kRank go to neighbouring blocks, which find big in L2.
//
// adapter_down_kernel makes u or v alone: a block takes 128 rows and a part of the columns, and the last one of those
// that share rows adds up. adapter_gradient_kernel makes a gradient, and v with it when it reads dy: a block takes a
// part of the rows and up to 512 columns; its part of the gradient stays in registers, its part of v goes to scratch
// after each tile of rows, and adapter_sum_kernel (parts.cuh) adds the parts of either in their order.
//
// Dropout: each thread clears what it has itself copied, before the barrier that shows it to the others. So the random
// numbers are computed once for each element, four at a time, whatever the fragments look like.
//
// Shared memory: kStages * (16384 + 128 * kRank) + 512 * kRank bytes; without a down product or a gradient less.
// 16-byte pieces are swizzled by row: neither ldmatrix nor any store has a bank conflict.
#pragma once

#include <ptx.cuh>

#include "cuda/common/dropout.cuh"
#include "cuda/common/parts.cuh"
#include "cuda/common/splits.cuh"
#include "cuda/linear/compiled.cuh"

namespace qlk::cuda {

template <class T>
struct AdapterArguments {
    const T* big;      // [m, c]: x or dy
    const T* adapter;  // down: lora_a [r, c], or with kTransposed lora_b [c, r]
    const T* low;      // gradients: u or v, [m, r]
    int64_t m, c, r;
    Dropout dropout;          // of big
    int64_t dropout_first;    // the number of big's first element in the tensor that the mask is of
    bool big_aligned;         // its rows lie on 16 bytes; otherwise they are read element by element
    bool adapter_aligned;     // likewise
    bool low_aligned;         // likewise
    int rank_tiles;           // of kRank, in the grid
    float scale;              // adapter_down_kernel
    T* down;                  // adapter_down_kernel: [m, r]
    bool down_aligned;        // its rows lie on 8 bytes
    Splits splits;            // adapter_down_kernel: of the columns
    float* down_parts;        // adapter_gradient_kernel: [splits of the columns][down_stride], of [m, r]
    int64_t down_stride;      // a multiple of 4
    float* gradient;          // [splits of the rows][gradient_stride], of dB [c, r] or dA [r, c]
    int64_t gradient_stride;  // a multiple of 4
    bool gradient_by_rank;    // dA
    bool gradient_paired;     // dB: its rows lie on 8 bytes
    bool add;                 // to what is in `gradient`
    int row_splits;           // adapter_gradient_kernel
    int across;               // adapter_gradient_kernel: tiles of 64 columns that a block has
};

template <class T, int kRank_, int kStages_, bool kDown_, bool kGradient_, bool kTransposed_>
struct AdapterTraits {
    static constexpr int kRank = kRank_, kStages = kStages_;
    static constexpr bool kDown = kDown_, kGradient = kGradient_, kTransposed = kTransposed_;
    static constexpr int kThreads = 256;
    static constexpr int kRows = 128, kColumns = 64;
    static constexpr int kAcross = kGradient ? 8 : 1;  // the most tiles across a block: 2 * kRank registers
    static constexpr int kBlocks = kGradient && kRank == 32 ? 1 : 2;  // on a multiprocessor, by their registers
    static_assert(sizeof(T) == 2);
    static_assert(kRank == 16 || kRank == 32);
    static_assert(kRows == kThreads / 32 * 16, "down: 16 rows a warp");
    static_assert(kColumns == kThreads / 64 * 16, "gradients: 16 columns and half of the rank a warp");

    struct Loop {
        T big[kStages][kRows * kColumns];
        T adapter[kStages][kDown ? kColumns * kRank : 8];
        T low[2][kGradient ? kRows * kRank : 8];  // of this tile of rows and of the next
    };
    struct Shared {
        union {
            Loop loop;
            float sums[kRows * kRank];
        };
        int word;
    };
};

// Where a 16-byte piece lies, in elements: rows of kWidth of them share 128 bytes, and those that ldmatrix reads
// together, eight one below the other, are in different groups of banks.
template <int kWidth>
QLK_DEVICE int piece_at(int row, int piece) {
    constexpr int kPieces = kWidth / 8;
    return row * kWidth + (piece ^ (row / (8 / kPieces) % kPieces)) * 8;
}

// Likewise of 4 sums: written as pairs, four rows together, and read in order.
template <int kRank>
QLK_DEVICE int sums_at(int row, int quad) {
    return row * kRank + (quad ^ (kRank == 16 ? row & 2 : (row & 3) * 2)) * 4;
}

// Eight elements one by one, zeros after the first `inside`. Called and not inlined: it is the slow way.
QLK_DEVICE_CALL void copy_elements(uint16_t* to, const uint16_t* from, int inside) {
    uint32_t word[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) word[e] = e < inside ? load_global(from + e) : 0;
    store_shared(reinterpret_cast<uint4*>(to), make_uint4(word[0] | word[1] << 16, word[2] | word[3] << 16,
                                                          word[4] | word[5] << 16, word[6] | word[7] << 16));
}

// A piece of a row, zeros where it is not inside: row or column. `matrix` is an address that may be named.
template <class T>
QLK_DEVICE void copy_piece(T* to, const T* matrix, int64_t at, bool row_inside, int64_t columns_left, bool aligned) {
    const bool inside = row_inside && columns_left > 0;
    if (aligned) {
        cp_async_16(to, inside ? matrix + at : matrix, inside ? 16 : 0);
    } else {
        copy_elements(reinterpret_cast<uint16_t*>(to), reinterpret_cast<const uint16_t*>(matrix + at),
                      !inside            ? 0
                      : columns_left < 8 ? static_cast<int>(columns_left)
                                         : 8);
    }
}

// f(i) for i from 0 to kCount - 1, dealt out to the threads.
template <int kCount, int kThreads, class F>
QLK_DEVICE void each_of(int self, F f) {
#pragma unroll
    for (int first = 0; first < kCount; first += kThreads) {
        if (kCount - first >= kThreads || self < kCount - first) f(first + self);
    }
}

template <class T, class Traits>
struct Adapter {
    static constexpr int kRank = Traits::kRank, kRows = Traits::kRows, kColumns = Traits::kColumns;
    static constexpr int kThreads = Traits::kThreads, kStages = Traits::kStages;
    using Down = float[kRank / 8][4];       // 16 rows, all of kRank
    using Gradient = float[kRank / 16][4];  // 16 columns of big, half of kRank

    const AdapterArguments<T>& a;
    typename Traits::Loop& shared;
    int64_t first_rank;
    uint64_t seed;
    int self, lane, warp;

    QLK_DEVICE void copy_big(int stage, int64_t first_row, int64_t first_column) {
        const int64_t column = first_column + self % 8 * 8;
        each_of<kRows * 8, kThreads>(self, [&](int i) {
            const int row = i / 8;
            copy_piece(&shared.big[stage][piece_at<kColumns>(row, self % 8)], a.big, (first_row + row) * a.c + column,
                       first_row + row < a.m, a.c - column, a.big_aligned);
        });
    }

    QLK_DEVICE void copy_adapter(int stage, int64_t first_column) {
        constexpr int kPieces = Traits::kTransposed ? kRank / 8 : kColumns / 8;
        each_of<kColumns * kRank / 8, kThreads>(self, [&](int i) {
            const int row = i / kPieces, piece = i % kPieces;
            T* const to = &shared.adapter[stage][piece_at<kPieces * 8>(row, piece)];
            if constexpr (Traits::kTransposed) {
                const int64_t column = first_rank + piece * 8;
                copy_piece(to, a.adapter, (first_column + row) * a.r + column, first_column + row < a.c, a.r - column,
                           a.adapter_aligned);
            } else {
                const int64_t column = first_column + piece * 8;
                copy_piece(to, a.adapter, (first_rank + row) * a.c + column, first_rank + row < a.r, a.c - column,
                           a.adapter_aligned);
            }
        });
    }

    QLK_DEVICE void copy_low(int buffer, int64_t first_row) {
        constexpr int kPieces = kRank / 8;
        each_of<kRows * kPieces, kThreads>(self, [&](int i) {
            const int row = i / kPieces, piece = i % kPieces;
            const int64_t column = first_rank + piece * 8;
            copy_piece(&shared.low[buffer][piece_at<kRank>(row, piece)], a.low, (first_row + row) * a.r + column,
                       first_row + row < a.m, a.r - column, a.low_aligned);
        });
    }

    // Dropout on the pieces that this thread has copied.
    QLK_DEVICE void mask(int stage, int64_t first_row, int64_t first_column) {
        if (!a.dropout.seed) return;
#pragma unroll 1
        for (int row = self / 8; row < kRows && first_row + row < a.m; row += kThreads / 8) {
            const int64_t at = a.dropout_first + (first_row + row) * a.c + first_column + self % 8 * 8;
            const uint32_t keep = dropout_keeps_8(seed, a.dropout.threshold, at);
            uint4* const piece = reinterpret_cast<uint4*>(&shared.big[stage][piece_at<kColumns>(row, self % 8)]);
            const auto kept = [&](uint32_t pair, int which) {
                return pair & ((keep >> which & 1 ? 0xffffu : 0) | (keep >> which & 2 ? 0xffff0000u : 0));
            };
            const uint4 all = load_shared(piece);
            store_shared(piece, make_uint4(kept(all.x, 0), kept(all.y, 2), kept(all.z, 4), kept(all.w, 6)));
        }
    }

    // sum += big * adapter of one stage.
    QLK_DEVICE void multiply_down(int stage, Down& sum) {
        const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
#pragma unroll
        for (int depth = 0; depth < kColumns / 16; ++depth) {
            uint32_t left[4];
            ldmatrix_x4<false>(left,
                               &shared.big[stage][piece_at<kColumns>(warp * 16 + lane % 16, depth * 2 + lane / 16)]);
#pragma unroll
            for (int j = 0; j < kRank / 8; j += 2) {
                // Two tiles of 8 ranks: depth 0-7 and 8-15 of the first, then of the second.
                uint32_t right[4];
                if constexpr (Traits::kTransposed) {
                    ldmatrix_x4<true>(right,
                                      &shared.adapter[stage][piece_at<kRank>(depth * 16 + middle * 8 + low, j + high)]);
                } else {
                    ldmatrix_x4<false>(
                        right, &shared.adapter[stage][piece_at<kColumns>((j + high) * 8 + low, depth * 2 + middle)]);
                }
                mma_16x8x16<T>(sum[j], left, right[0], right[1]);
                mma_16x8x16<T>(sum[j + 1], left, right[2], right[3]);
            }
        }
    }

    // sum += big^T * low of one stage.
    QLK_DEVICE void multiply_gradient(int stage, int buffer, Gradient& sum) {
        const int columns = warp % 4 * 2, ranks = warp / 4 * (kRank / 16);  // in pieces
#pragma unroll
        for (int depth = 0; depth < kRows; depth += 32) {
            uint32_t left[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                ldmatrix_x4<true>(left[i], &shared.big[stage][piece_at<kColumns>(
                                               depth + i * 16 + lane / 16 * 8 + lane % 8, columns + lane / 8 % 2)]);
            }
#pragma unroll
            for (int j = 0; j < kRank / 16; ++j) {
                uint32_t right[4];  // the four eighths of the depth
                ldmatrix_x4<true>(right, &shared.low[buffer][piece_at<kRank>(depth + lane, ranks + j)]);
                mma_16x8x16<T>(sum[j], left[0], right[0], right[1]);
                mma_16x8x16<T>(sum[j], left[1], right[2], right[3]);
            }
        }
    }

    QLK_DEVICE static void clear(float (&sum)[4]) { sum[0] = sum[1] = sum[2] = sum[3] = 0.0f; }
};

template <class T, class Traits>
QLK_DEVICE Adapter<T, Traits> adapter_of(const AdapterArguments<T>& a, typename Traits::Loop& shared, int rank_tile) {
    return {a,
            shared,
            static_cast<int64_t>(rank_tile) * Traits::kRank,
            a.dropout.seed ? static_cast<uint64_t>(load_global(a.dropout.seed)) : 0,
            static_cast<int>(threadIdx.x),
            static_cast<int>(threadIdx.x % 32),
            static_cast<int>(threadIdx.x / 32)};
}

// u or v: a grid of tiles of rows, then splits of the columns, then tiles of ranks.
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    adapter_down_kernel(const __grid_constant__ AdapterArguments<T> a) {
    if constexpr (!kRuns<T, sizeof(typename Traits::Shared)>) return trap();
    griddep_launch();
    constexpr int kRank = Traits::kRank, kColumns = Traits::kColumns, kStages = Traits::kStages;
    auto& shared = shared_memory<typename Traits::Shared>();
    const int rank_tile = static_cast<int>(blockIdx.x % a.rank_tiles);
    const int split = static_cast<int>(blockIdx.x / a.rank_tiles % a.splits.count);
    const int64_t row_tile = blockIdx.x / a.rank_tiles / a.splits.count, first_row = row_tile * Traits::kRows;
    auto adapter = adapter_of<T, Traits>(a, shared.loop, rank_tile);
    const int self = adapter.self, lane = adapter.lane;

    const int64_t steps = (a.c + kColumns - 1) / kColumns;
    const int64_t begin = steps * split / a.splits.count, end = steps * (split + 1) / a.splits.count;
    const auto copy = [&](int64_t step, int stage) {
        if (step < end) {
            adapter.copy_big(stage, first_row, step * kColumns);
            adapter.copy_adapter(stage, step * kColumns);
        }
        cp_async_commit();
    };
    typename Adapter<T, Traits>::Down sum;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) adapter.clear(sum[j]);
    for (int i = 0; i < kStages - 1; ++i) copy(begin + i, i);
    int stage = 0;
    for (int64_t step = begin; step < end; ++step) {
        cp_async_wait<kStages - 2>();
        adapter.mask(stage, first_row, step * kColumns);
        __syncthreads();
        copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
        adapter.multiply_down(stage, sum);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // From fragments to rows, four neighbours a thread.
    __syncthreads();  // nobody reads the operands any more, whose place the sums take
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
        const int quad = j * 2 + lane % 4 / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = adapter.warp * 16 + half * 8 + lane / 4;
            store_shared(reinterpret_cast<float2*>(&shared.sums[sums_at<kRank>(row, quad) + lane % 2 * 2]),
                         make_float2(sum[j][half * 2], sum[j][half * 2 + 1]));
        }
    }
    __syncthreads();
    constexpr int kQuads = Traits::kRows * kRank / 4;
    const auto each_quad = [&](auto f) {
#pragma unroll
        for (int i = 0; i < kQuads / Traits::kThreads; ++i) {
            const int at = self + i * Traits::kThreads, row = at / (kRank / 4), quad = at % (kRank / 4);
            if (first_row + row < a.m) f(at, first_row + row, quad, &shared.sums[sums_at<kRank>(row, quad)]);
        }
    };
    if (a.splits.count > 1) {
        const int64_t tile = row_tile * a.rank_tiles + rank_tile;
        float4* const parts = a.splits.partial + tile * a.splits.count * kQuads;
        each_quad([&](int at, int64_t, int, const float* mine) {
            store_exchanged(parts + split * kQuads + at, load_shared(reinterpret_cast<const float4*>(mine)));
        });
        if (!comes_last(a.splits, tile, a.splits.count, &shared.word)) return;
        each_quad([&](int at, int64_t, int, float* mine) {
            float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            add_parts(all, parts + at, a.splits.count, kQuads);
            store_shared(reinterpret_cast<float4*>(mine), all);
        });
    }
    each_quad([&](int, int64_t row, int quad, const float* mine) {
        const float4 all = load_shared(reinterpret_cast<const float4*>(mine));
        const int64_t rank = adapter.first_rank + quad * 4;
        store_four(a.down + row * a.r + rank, all, a.scale, a.r - rank, a.down_aligned);
    });
}

// dA or dB, with v when it is wanted: a grid of splits of the rows, then of the columns, then tiles of ranks.
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    adapter_gradient_kernel(const __grid_constant__ AdapterArguments<T> a) {
    if constexpr (!kRuns<T, sizeof(typename Traits::Shared)>) return trap();
    constexpr int kRank = Traits::kRank, kRows = Traits::kRows, kColumns = Traits::kColumns;
    constexpr int kStages = Traits::kStages;
    auto& shared = shared_memory<typename Traits::Shared>();
    const int rank_tile = static_cast<int>(blockIdx.x % a.rank_tiles);
    const int row_split = static_cast<int>(blockIdx.x / a.rank_tiles % a.row_splits);
    const int64_t column_split = blockIdx.x / a.rank_tiles / a.row_splits;
    const int64_t first_column = column_split * a.across * kColumns;
    auto adapter = adapter_of<T, Traits>(a, shared.loop, rank_tile);
    const int lane = adapter.lane, warp = adapter.warp;

    const int64_t tiles = (a.m + kRows - 1) / kRows;
    const int begin = static_cast<int>(tiles * row_split / a.row_splits);
    const int end = static_cast<int>(tiles * (row_split + 1) / a.row_splits);
    const auto row_of = [](int tile) { return static_cast<int64_t>(tile) * kRows; };
    // What is copied next. u or v of a tile of rows comes with its first tile of columns; it takes the place of the
    // last but one, which has been read when a block has kStages - 1 tiles across.
    int copied_tile = begin, copied_across = 0;
    const auto copy = [&](int stage) {
        if (copied_tile < end) {
            adapter.copy_big(stage, row_of(copied_tile), first_column + copied_across * kColumns);
            if constexpr (Traits::kDown) adapter.copy_adapter(stage, first_column + copied_across * kColumns);
            if (copied_across == 0) adapter.copy_low(copied_tile % 2, row_of(copied_tile));
            if (++copied_across == a.across) copied_across = 0, ++copied_tile;
        }
        cp_async_commit();
    };
    typename Adapter<T, Traits>::Gradient gradient[Traits::kAcross];
#pragma unroll
    for (int part = 0; part < Traits::kAcross; ++part) {
#pragma unroll
        for (int j = 0; j < kRank / 16; ++j) adapter.clear(gradient[part][j]);
    }
    typename Adapter<T, Traits>::Down down;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) adapter.clear(down[j]);
    for (int i = 0; i < kStages - 1; ++i) copy(i);
    int stage = 0, tile = begin, across = 0;
#pragma unroll 1
    while (tile < end) {
        cp_async_wait<kStages - 2>();
        adapter.mask(stage, row_of(tile), first_column + across * kColumns);
        __syncthreads();
        copy(stage == 0 ? kStages - 1 : stage - 1);
        if constexpr (Traits::kDown) adapter.multiply_down(stage, down);
        // Each has its own registers, and so its own code; the rest of the loop is there once.
#pragma unroll
        for (int part = 0; part < Traits::kAcross; ++part) {
            if (part == across) adapter.multiply_gradient(stage, tile % 2, gradient[part]);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (++across < a.across) continue;
        if constexpr (Traits::kDown) {
            float* const parts = a.down_parts + column_split * a.down_stride;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t row = row_of(tile) + warp * 16 + half * 8 + lane / 4;
#pragma unroll
                for (int j = 0; j < kRank / 8; ++j) {
                    const int64_t rank = adapter.first_rank + j * 8 + lane % 4 * 2;
                    store_two(parts + row * a.r + rank, down[j][half * 2], down[j][half * 2 + 1],
                              row < a.m ? a.r - rank : 0, a.r % 2 == 0);
                }
            }
#pragma unroll
            for (int j = 0; j < kRank / 8; ++j) adapter.clear(down[j]);
        }
        across = 0, ++tile;
    }

    float* const parts = a.gradient + row_split * a.gradient_stride;
#pragma unroll
    for (int part = 0; part < Traits::kAcross; ++part) {
        if (part >= a.across) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t column = first_column + part * kColumns + warp % 4 * 16 + half * 8 + lane / 4;
            if (column >= a.c) continue;
#pragma unroll
            for (int j = 0; j < kRank / 16; ++j) {
                const int64_t rank = adapter.first_rank + warp / 4 * (kRank / 2) + j * 8 + lane % 4 * 2;
                float first = gradient[part][j][half * 2], second = gradient[part][j][half * 2 + 1];
                if (a.gradient_by_rank) {
                    float* const to = parts + rank * a.c + column;
                    if (rank < a.r) store_global(to, a.add ? load_exchanged(to) + first : first);
                    if (rank + 1 < a.r) store_global(to + a.c, a.add ? load_exchanged(to + a.c) + second : second);
                } else {
                    float* const to = parts + column * a.r + rank;
                    if (a.add && rank < a.r) first += load_exchanged(to);
                    if (a.add && rank + 1 < a.r) second += load_exchanged(to + 1);
                    store_two(to, first, second, a.r - rank, a.gradient_paired);
                }
            }
        }
    }
}

}  // namespace qlk::cuda
