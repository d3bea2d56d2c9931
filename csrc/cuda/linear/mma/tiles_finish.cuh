// Around the pipeline of tiles.cuh: the low-rank part, the sums of the slices, the results.
#pragma once

#include "cuda/linear/mma/store_four.cuh"
#include "cuda/linear/mma/tiles_pipeline.cuh"

namespace qlk::cuda {

// Copies 16 * `pieces` columns of the low-rank operands, from rank `first`, to shared memory: low_left to a stage,
// low_right to the first buffer of weights. What lies outside becomes zeros. u and v may have been written since
// this kernel began.
template <class T, class Traits>
QLK_DEVICE void Gemm<T, Traits>::copy_low_rank(int stage, int64_t first, int pieces) {
    constexpr int kAcross = kWeightWidth / 8;  // 16-byte pieces in a row of weights
    const auto right_at = [&](int row, int64_t at, int64_t& from) {
        from = kBackward ? (first + row) * a.k + first_column + at : (first_column + row) * a.r + first + at;
        return kBackward ? first + row < a.r && first_column + at < a.k : first_column + row < a.n && first + at < a.r;
    };
    if (a.low_aligned) {
#pragma unroll 1
        for (int i = self; i < Traits::kRows * Traits::kDepth / 8; i += Traits::kThreads) {
            const int row = i / (Traits::kDepth / 8), piece = i % (Traits::kDepth / 8);
            if (piece >= pieces * 2) continue;
            const bool inside = first_row + row < a.m && first + piece * 8 < a.r;
            const int64_t from = inside ? (first_row + row) * a.r + first + piece * 8 : 0;
            cp_async_16(&shared.left[stage][swizzled<Traits::kDepth>(row, piece)], a.low_left + from, inside ? 16 : 0);
        }
#pragma unroll 1
        for (int i = self; i < Traits::kColumns * Traits::kDepth / 8; i += Traits::kThreads) {
            const int row = i / kAcross, piece = i % kAcross;
            if ((kBackward ? row : piece * 8) >= pieces * 16) continue;
            int64_t from;
            const bool inside = right_at(row, piece * 8, from);
            cp_async_16(&shared.weights[0][swizzled<kWeightWidth>(row, piece)], a.low_right + (inside ? from : 0),
                        inside ? 16 : 0);
        }
        cp_async_commit();
        cp_async_wait<0>();
        return;
    }
#pragma unroll 1
    for (int i = self; i < Traits::kRows * Traits::kDepth; i += Traits::kThreads) {
        const int row = i / Traits::kDepth, at = i % Traits::kDepth;
        if (at >= pieces * 16) continue;
        const bool inside = first_row + row < a.m && first + at < a.r;
        store_shared(&shared.left[stage][swizzled<Traits::kDepth>(row, at / 8) + at % 8],
                     inside ? load_changing(a.low_left + (first_row + row) * a.r + first + at) : from_float<T>(0.0f));
    }
#pragma unroll 1
    for (int i = self; i < Traits::kColumns * Traits::kDepth; i += Traits::kThreads) {
        const int row = i / kWeightWidth, at = i % kWeightWidth;
        if ((kBackward ? row : at) >= pieces * 16) continue;
        int64_t from;
        const bool inside = right_at(row, at, from);
        store_shared(&shared.weights[0][swizzled<kWeightWidth>(row, at / 8) + at % 8],
                     inside ? load_global(a.low_right + from) : from_float<T>(0.0f));
    }
}

// Adds u B^T, or v A with dropout's mask on it, to the sums of the first slice. Uses a stage that no copy is
// writing.
template <class T, class Traits>
QLK_DEVICE void Gemm<T, Traits>::low_rank(int stage) {
    for (int64_t first = 0; first < a.r; first += Traits::kDepth) {
        const int64_t left = a.r - first;
        const int pieces = static_cast<int>(left < Traits::kDepth ? (left + 15) / 16 : Traits::kDepth / 16);
        __syncthreads();  // all reads of the stage are done
        copy_low_rank(stage, first, pieces);
        __syncthreads();
#pragma unroll 1
        for (int piece = 0; slice() == 0 && piece < pieces; ++piece) multiply(stage, 0, piece);
    }
    if (kBackward && a.dropout.seed && a.r > 0 && slice() == 0) apply_dropout();
}

// Dropout's mask on the sums. A counter of Philox covers four neighbours, which two lanes hold, in two rows: each
// lane computes the words of one row.
template <class T, class Traits>
QLK_DEVICE void Gemm<T, Traits>::apply_dropout() {
    const uint64_t seed = static_cast<uint64_t>(load_global(a.dropout.seed));
    const int odd = lane & 1;
#pragma unroll
    for (int i = 0; i < kDownTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kAcrossTiles; ++j) {
            const int64_t row = first_row + down() + i * 16 + lane / 4 + odd * 8;
            const int64_t column = first_column + across() + j * 8 + lane % 4 / 2 * 4;
            const uint32_t mine = dropout_keeps_4(seed, a.dropout.threshold, (row * a.k + column) / 4);
            const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
            const uint32_t low = (odd ? other : mine) >> odd * 2, high = (odd ? mine : other) >> odd * 2;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (!(low >> e & 1)) sum[i][j][e] = 0.0f;
                if (!(high >> e & 1)) sum[i][j][2 + e] = 0.0f;
            }
        }
    }
}

// Adds the sums of both slices. Each slice ends up with half of the rows, in the first kOwnTiles of `sum`, and hands
// the other half over. room: the shared memory for that.
template <class T, class Traits>
QLK_DEVICE void Gemm<T, Traits>::add_slices(float4* room) {
    if constexpr (Traits::kSlices == 2) {
        const auto at = [&](int slice, int i, int j) {
            const int pair = warp % (8 / Traits::kSlices);  // which pair of warps with the same outputs
            return room + (((pair * 2 + slice) * kOwnTiles + i) * kAcrossTiles + j) * 32 + lane;
        };
        __syncthreads();  // all reads of the operands are done; the sums take their place
#pragma unroll
        for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kAcrossTiles; ++j) {
                float (&first)[4] = sum[i][j], (&second)[4] = sum[kOwnTiles + i][j];
                float give[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    give[e] = slice() == 0 ? second[e] : first[e];
                    first[e] = slice() == 0 ? first[e] : second[e];
                }
                store_shared(at(slice() ^ 1, i, j), make_float4(give[0], give[1], give[2], give[3]));
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kAcrossTiles; ++j) {
                const float4 more = load_shared(at(slice(), i, j));
                sum[i][j][0] += more.x;
                sum[i][j][1] += more.y;
                sum[i][j][2] += more.z;
                sum[i][j][3] += more.w;
            }
        }
    }
}

// Adds the bias, rounds, and writes the tile through shared memory, so that stores are 16 bytes wide.
template <class T, class Traits>
QLK_DEVICE void Gemm<T, Traits>::store(T* staged) {
    const int first = down() + slice() * kOwnTiles * 16;
    if (!kBackward && a.bias.any()) {
#pragma unroll
        for (int j = 0; j < kAcrossTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int64_t column = first_column + across() + j * 8 + lane % 4 * 2 + e;
                const float more = column < a.n ? a.bias.at(column) : 0.0f;
#pragma unroll
                for (int i = 0; i < kOwnTiles; ++i) {
                    sum[i][j][e] += more;
                    sum[i][j][2 + e] += more;
                }
            }
        }
    }
    __syncthreads();  // all reads of the operands are done; the results take their place
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kAcrossTiles; ++j) {
            uint32_t* const to = reinterpret_cast<uint32_t*>(staged + (first + lane / 4 + i * 16) * Traits::kPitch +
                                                             across() + lane % 4 * 2 + j * 8);
            store_shared(to, pack_pair<T>(sum[i][j][0], sum[i][j][1]));
            store_shared(to + 8 * Traits::kPitch / 2, pack_pair<T>(sum[i][j][2], sum[i][j][3]));
        }
    }
    __syncthreads();
    const int64_t columns = kBackward ? a.k : a.n;
    for (int i = self; i < Traits::kRows * (Traits::kColumns / 8); i += Traits::kThreads) {
        const int row = i / (Traits::kColumns / 8), piece = i % (Traits::kColumns / 8);
        if (first_row + row >= a.m || first_column + piece * 8 >= columns) continue;
        const T* const from = staged + row * Traits::kPitch + piece * 8;
        T* const to = a.out + (first_row + row) * columns + first_column + piece * 8;
        if (a.out_aligned) {
            st_global_16(to, load_shared(reinterpret_cast<const uint4*>(from)));
        } else {
#pragma unroll 1
            for (int e = 0; e < 8 && first_column + piece * 8 + e < columns; ++e) {
                store_global(to + e, load_shared(from + e));
            }
        }
    }
}

// The tile's sums of all blocks of a cluster, each of which stores its share of the results. whole: room for this
// block's sums, row by row. Four neighbours a lane, so a warp's store covers a row of the tile.
template <class T, class Traits>
QLK_DEVICE void Gemm<T, Traits>::add_cluster_and_store(float* whole) {
    const int first = down() + slice() * kOwnTiles * 16;
    __syncthreads();  // all reads of the operands, or of the slices' sums, are done; these sums take their place
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kAcrossTiles; ++j) {
            float* const to = whole + (first + lane / 4 + i * 16) * Traits::kPitch + across() + lane % 4 * 2 + j * 8;
            store_shared(reinterpret_cast<float2*>(to), make_float2(sum[i][j][0], sum[i][j][1]));
            store_shared(reinterpret_cast<float2*>(to + 8 * Traits::kPitch), make_float2(sum[i][j][2], sum[i][j][3]));
        }
    }
    constexpr int kFours = Traits::kColumns / 4;  // in a row
    const auto slot = [&](int at) {
        return reinterpret_cast<const float4*>(whole + at / kFours * Traits::kPitch + at % kFours * 4);
    };
    const int64_t columns = kBackward ? a.k : a.n;
    add_cluster<Traits::kThreads, Traits::kRows * kFours / Traits::kThreads>(a.splits, slot, [&](int at, float4 all) {
        store_four<!kBackward>(a, columns, first_row + at / kFours, first_column + at % kFours * 4, all);
    });
}

}  // namespace qlk::cuda
