// What the kernels of adapters.cuh are made of: arguments, shape, copies to shared memory and products of one tile.
#pragma once

#include <ptx.cuh>

#include "cuda/common/dropout.cuh"
#include "cuda/common/splits.cuh"

namespace qlk::cuda {

// Matrices are row-major. Sizes and strides are in elements. A field that names a kernel is used by that one alone.
template <class T>
struct AdapterArguments {
    const T* big;             // [m, c]: x or dy
    const T* adapter;         // down: lora_a [r, c], or with kTransposed lora_b [c, r]
    const T* low;             // gradients: u or v, [m, r]
    int64_t m, c, r;          // rows of x; columns of big, k or n; rank
    Dropout dropout;          // mask on big
    int64_t dropout_first;    // index of big's first element in the tensor that the mask belongs to
    bool big_aligned;         // rows of big are 16-byte aligned; otherwise they are read element by element
    bool adapter_aligned;     // the same for adapter
    bool low_aligned;         // the same for low
    int rank_tiles;           // slices of kRank ranks in the grid
    float scale;              // adapter_down_kernel: scaling / (1 - p)
    T* down;                  // adapter_down_kernel: [m, r]
    bool down_aligned;        // rows of down are 8-byte aligned
    Splits splits;            // adapter_down_kernel: blocks that share rows, each with a part of the columns
    float* down_parts;        // adapter_gradient_kernel: parts of v, [splits of the columns][down_stride]
    int64_t down_stride;      // a multiple of 4
    float* gradient;          // [splits of the rows][gradient_stride]: parts of dB [c, r] or dA [r, c]
    int64_t gradient_stride;  // a multiple of 4
    bool gradient_by_rank;    // the gradient is dA
    bool gradient_paired;     // dB: its rows are 8-byte aligned
    bool add;                 // add to what `gradient` holds
    int row_splits;           // adapter_gradient_kernel: blocks that share columns, each with a part of the rows
    int across;               // adapter_gradient_kernel: tiles of 64 columns of a block, up to kAcross
};

// T: bf16 or fp16.
// kRank_: ranks of a block, 16 or 32.
// kStages_: tiles of big in shared memory or on their way there.
// kDown_: u or v is computed.
// kGradient_: dA or dB is computed.
// kTransposed_: the adapter is lora_b [c, r], not lora_a [r, c].
template <class T, int kRank_, int kStages_, bool kDown_, bool kGradient_, bool kTransposed_>
struct AdapterTraits {
    static constexpr int kRank = kRank_, kStages = kStages_;
    static constexpr bool kDown = kDown_, kGradient = kGradient_, kTransposed = kTransposed_;
    static constexpr int kThreads = 256;
    static constexpr int kRows = 128, kColumns = 64;
    static constexpr int kAcross = kGradient ? 8 : 1;  // most tiles across a block; its sums take 2 * kRank registers
    static constexpr int kBlocks = kGradient && kRank == 32 ? 1 : 2;  // per multiprocessor, as registers allow
    static_assert(sizeof(T) == 2);
    static_assert(kRank == 16 || kRank == 32);
    static_assert(kRows == kThreads / 32 * 16, "down: 16 rows a warp");
    static_assert(kColumns == kThreads / 64 * 16, "gradients: 16 columns and half of the rank a warp");

    struct Loop {
        T big[kStages][kRows * kColumns];
        T adapter[kStages][kDown ? kColumns * kRank : 8];
        T low[2][kGradient ? kRows * kRank : 8];  // for this tile of rows and the next
    };
    struct Shared {
        union {
            Loop loop;
            float sums[kRows * kRank];
        };
        int word;  // for comes_last
    };
};

// Offset, in elements, of a 16-byte piece in rows of kWidth elements. Eight pieces one below the other, which ldmatrix
// reads together, lie in different groups of banks.
template <int kWidth>
QLK_DEVICE int piece_at(int row, int piece) {
    constexpr int kPieces = kWidth / 8;
    return row * kWidth + (piece ^ (row / (8 / kPieces) % kPieces)) * 8;
}

// Offset of 4 sums in rows of kRank. They are written as pairs, four rows together, and read in order: no bank
// conflicts either way.
template <int kRank>
QLK_DEVICE int sums_at(int row, int quad) {
    return row * kRank + (quad ^ (kRank == 16 ? row & 2 : (row & 3) * 2)) * 4;
}

// Copies eight elements one by one, zeros after the first `inside`. Not inlined: it is the slow way.
QLK_DEVICE_CALL void copy_elements(uint16_t* to, const uint16_t* from, int inside) {
    uint32_t word[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) word[e] = e < inside ? load_global(from + e) : 0;
    store_shared(reinterpret_cast<uint4*>(to), make_uint4(word[0] | word[1] << 16, word[2] | word[3] << 16,
                                                          word[4] | word[5] << 16, word[6] | word[7] << 16));
}

// Copies a 16-byte piece of a row: matrix[at] and on, zeros outside. row_inside: the row exists. columns_left: elements
// up to the row's end. aligned: the piece is 16-byte aligned.
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

// Calls f(i) for i from 0 to kCount - 1, dealt out to the threads. self: this thread.
template <int kCount, int kThreads, class F>
QLK_DEVICE void each_of(int self, F f) {
#pragma unroll
    for (int first = 0; first < kCount; first += kThreads) {
        if (kCount - first >= kThreads || self < kCount - first) f(first + self);
    }
}

// One thread's state and work. Traits: AdapterTraits.
template <class T, class Traits>
struct Adapter {
    static constexpr int kRank = Traits::kRank, kRows = Traits::kRows, kColumns = Traits::kColumns;
    static constexpr int kThreads = Traits::kThreads, kStages = Traits::kStages;
    using Down = float[kRank / 8][4];       // 16 rows, all of kRank
    using Gradient = float[kRank / 16][4];  // 16 columns of big, half of kRank

    const AdapterArguments<T>& a;
    typename Traits::Loop& shared;
    int64_t first_rank;    // of the block's kRank
    uint64_t seed;         // of dropout
    int self, lane, warp;  // thread in the block, lane in the warp, warp in the block

    // Starts the copies of a tile of big to a stage.
    QLK_DEVICE void copy_big(int stage, int64_t first_row, int64_t first_column) {
        const int64_t column = first_column + self % 8 * 8;
        each_of<kRows * 8, kThreads>(self, [&](int i) {
            const int row = i / 8;
            copy_piece(&shared.big[stage][piece_at<kColumns>(row, self % 8)], a.big, (first_row + row) * a.c + column,
                       first_row + row < a.m, a.c - column, a.big_aligned);
        });
    }

    // Starts the copies of the adapter for 64 columns of big to a stage.
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

    // Starts the copies of u or v for a tile of rows.
    QLK_DEVICE void copy_low(int buffer, int64_t first_row) {
        constexpr int kPieces = kRank / 8;
        each_of<kRows * kPieces, kThreads>(self, [&](int i) {
            const int row = i / kPieces, piece = i % kPieces;
            const int64_t column = first_rank + piece * 8;
            copy_piece(&shared.low[buffer][piece_at<kRank>(row, piece)], a.low, (first_row + row) * a.r + column,
                       first_row + row < a.m, a.r - column, a.low_aligned);
        });
    }

    // Dropout on the pieces of big that this thread has copied itself.
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

    // sum += big * adapter, from one stage.
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

    // sum += big^T * low, from one stage.
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
                uint32_t right[4];  // four parts of 8 of the depth
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

}  // namespace qlk::cuda
