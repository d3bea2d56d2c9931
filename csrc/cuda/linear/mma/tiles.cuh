// The layer's products on tensor cores, for 16-bit types and many rows:
//
//     forward    y = u B^T + x W^T + bias            columns: N   depth: K
//     backward   dx = mask(v A) + dy W               columns: K   depth: N
//
// A thread block makes kRows x kColumns outputs, 8 warps in a grid of kWarpsDown x kWarpsAcross, once for each of
// kSlices parts of the depth of every step. Each step of 64 along depth needs kColumns blocks of 64 weights, from one
// packed copy in its natural order: forward, kColumns rows of W by 64 columns; backward, 64 rows by kColumns columns,
// which ldmatrix transposes on the way. Codes and the left operand come by cp.async, kStages deep. Each thread decodes
// a block at a time: with 128 columns four warps decode the codes of the next step to shared memory while all eight
// multiply this one's, and the other four take the step after, so that each scheduler has one warp of either kind; with
// 256 columns all decode in every step. One barrier a step: after it, this step's weights are decoded, the copies of
// the next have landed, and what the last step read may be overwritten.
//
// Why slices: with 128 columns and all of the depth a warp would have 64 x 32 outputs, or 32 x 32, and a step of 128 x
// 128 move 136 KiB through shared memory, most of it operands that two to four warps read alike: 1088 clocks, more than
// its products take. Warps of 64 x 64 outputs and half of the depth read two thirds of that: 104 KiB, 832 clocks. In
// the end both slices' sums are added through shared memory, once a tile. 256 columns, where the outputs fill the card,
// need no slices for such warps, and move 96 KiB for as much work.
//
// Why decode in the main loop: at 128 rows a weight costs 0.1 clock of an SM's tensor cores (sm_90's mma.sync) and 0.04
// of its integer units, which run beside them. Panels in L2 would spare the repeats in every row of blocks, and pay
// with 4 bytes of L2 traffic a weight.
//
// The low-rank part is 64 of r at a time more of depth. Forward it goes last: the launch may begin while the one
// before, which makes u, still runs, and waits for it there. Backward it goes first, behind the first copies, so that
// dropout's mask can be put on it alone. Where there are few tiles, or few in the last round, several blocks share one,
// each with a part of the depth (splits.cuh), the first with the low-rank part.
//
// Shared memory: kStages * (kRows * 128 + kColumns * 32) + 2 * kColumns * 128 bytes. 16-byte pieces are swizzled by
// row: neither ldmatrix nor any store has a bank conflict.
#pragma once

#include "cuda/common/bias.cuh"
#include "cuda/common/decode.cuh"
#include "cuda/common/dropout.cuh"
#include "cuda/common/splits.cuh"
#include "cuda/linear/compiled.cuh"
#include "cuda/linear/dispatch.h"

namespace qlk::cuda {

template <class T>
struct GemmArguments {
    DeviceWeight weight;
    int64_t n, k;
    const T* left;       // x [m, k] or dy [m, n]
    const T* low_left;   // u or v [m, r]
    const T* low_right;  // lora_b [n, r] or lora_a [r, k]
    Bias<T> bias;        // forward alone
    Dropout dropout;     // backward alone
    T* out;              // [m, n] or [m, k]
    int64_t m, r;
    bool left_aligned;  // its rows lie on 16 bytes; otherwise they are read element by element
    bool out_aligned;   // likewise, written
    bool low_aligned;   // rows of low_left and low_right lie on 16 bytes
    Splits splits;      // along the depth
};

template <class T, bool kBackward_, int kRows_, int kColumns_, int kWarpsDown_, int kStages_>
struct GemmTraits {
    static constexpr bool kBackward = kBackward_;
    static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpsDown = kWarpsDown_, kStages = kStages_;
    static constexpr int kThreads = 256;
    static constexpr bool kSplits = kColumns == 128;  // the wide tiles run where they fill the card
    static constexpr int kDepth = kTileDepth;
    // Warps that have the same outputs, each by a part of every step's depth.
    static constexpr int kSlices = kColumns == 128 && kRows >= 64 ? 2 : 1;
    static constexpr int kWarpsAcross = 8 / kWarpsDown / kSlices;
    static constexpr int kWarpRows = kRows / kWarpsDown;
    static constexpr int kWarpColumns = kColumns / kWarpsAcross;
    static constexpr int kUnits = kColumns * kDepth / kBlock;  // blocks of weights in a step
    static constexpr int kPitch = kColumns + 8;                // of the results in shared memory
    static_assert(sizeof(T) == 2);
    static_assert(kDepth == kBlock, "a row of a forward tile is one block of weights");
    static constexpr int kTeams = kThreads / kUnits;  // which take turns in decoding
    static_assert(kUnits * kTeams == kThreads && kUnits % 32 == 0, "a thread decodes a block");
    static_assert(kWarpRows % (16 * kSlices) == 0 && kWarpColumns % 16 == 0);
    static_assert(kSlices <= 2, "add_slices adds two; of more, the order of sums would matter");

    struct Loop {
        T left[kStages][kRows * kDepth];
        uint4 codes[kStages][kUnits * 2];
        T weights[2][kColumns * kDepth];
    };
    union Shared {
        Loop loop;
        float4 sums[kSlices == 1 ? 1 : kRows * kColumns / 4];  // what each slice has of the other's outputs
        T out[kRows * kPitch];
    };
    static_assert(sizeof(Shared) == tiles_shared(kRows, kColumns, kStages));
};

// Where a 16-byte piece of a row lies, in elements. Rows of 64 elements have 8 pieces, of 128 elements 16.
template <int kWidth>
QLK_DEVICE int swizzled(int row, int piece) {
    return row * kWidth + (piece ^ (row & 7)) * 8;
}

template <class T, class Traits>
struct Gemm {
    using Shared = typename Traits::Shared;
    static constexpr bool kBackward = Traits::kBackward;
    static constexpr int kDownTiles = Traits::kWarpRows / 16, kAcrossTiles = Traits::kWarpColumns / 8;
    static constexpr int kOwnTiles = kDownTiles / Traits::kSlices;  // of kDownTiles, when the slices have been added
    static constexpr int kWeightWidth = kBackward ? Traits::kColumns : Traits::kDepth;

    const GemmArguments<T>& a;
    typename Traits::Loop& shared;
    int64_t first_row, first_column, depth;
    int first_step, steps;  // of this block
    float offset;           // of the constants
    int self, lane, warp;
    float sum[kDownTiles][kAcrossTiles][4];

    // Where this thread copies from next, and decodes next; running, since computing them anew would cost as many
    // instructions as the products.
    static constexpr int kLeftCopies = (Traits::kRows * 8 + Traits::kThreads - 1) / Traits::kThreads;
    static constexpr int kCodeCopies = Traits::kUnits * 2 / Traits::kThreads;
    const T* left_next = nullptr;         // the first of kLeftCopies pieces, 32 rows apart
    unsigned left_rows = 0;               // a bit for each: whether the row is one
    const uint8_t* codes_next = nullptr;  // the first of kCodeCopies halves of blocks, 128 blocks of weights apart
    unsigned code_columns = 0;            // a bit for each: whether it lies within the columns
    int code_row = 0;                     // backward: the row of W
    int64_t constant_next = 0;            // the block whose constant comes next
    int constant_row = 0;                 // backward: its row
    bool constant_column = false;         // whether it lies within the columns
    uint32_t left_at = 0, right_at = 0;   // bytes in a stage, and in a buffer of weights

    // Who this thread is. Called again behind the main loop, where what the loop needs of it would otherwise be made
    // anew in every step.
    QLK_DEVICE void locate() {
        self = static_cast<int>(anew(threadIdx.x));
        lane = self % 32;
        warp = self / 32;
    }

    // Where ldmatrix reads for this lane: swizzled() of the first of its rows and pieces. Pieces are told apart by
    // three bits of the address, so that the others of a row are an exclusive or away, and other rows a sum.
    QLK_DEVICE void aim() {
        constexpr int kPieces = Traits::kDepth / 16 / Traits::kSlices;
        const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
        left_at = sizeof(T) * swizzled<Traits::kDepth>(down() + lane % 16, slice() * kPieces * 2 + high);
        right_at = sizeof(T) *
                   (kBackward ? swizzled<kWeightWidth>(slice() * kPieces * 16 + middle * 8 + low, across() / 8 + high)
                              : swizzled<kWeightWidth>(across() + high * 8 + low, slice() * kPieces * 2 + middle));
        left_at = anew(left_at);
        right_at = anew(right_at);
    }

    QLK_DEVICE void start() {
        aim();
        const int row = self / 8, unit = self / 2;
        left_next = a.left + (first_row + row) * depth + first_step * Traits::kDepth + self % 8 * 8;
        left_rows = 0;
#pragma unroll
        for (int i = 0; i < kLeftCopies; ++i) left_rows |= (first_row + row + i * 32 < a.m ? 1u : 0u) << i;
        const int64_t blocks = a.k / kBlock;  // of a row of W
        code_columns = 0;
        const int decoding = self % Traits::kUnits, team = self / Traits::kUnits;
        if constexpr (kBackward) {
            code_row = first_step * Traits::kDepth + unit % Traits::kDepth;
            const int64_t block = first_column / kBlock + unit / Traits::kDepth;
            codes_next =
                a.weight.packed + (static_cast<int64_t>(code_row) * blocks + block) * (kBlock / 2) + self % 2 * 16;
#pragma unroll
            for (int i = 0; i < kCodeCopies; ++i) {
                code_columns |= (block + i * (Traits::kThreads / 2 / Traits::kDepth) < blocks ? 1u : 0u) << i;
            }
            constant_row = (first_step + team) * Traits::kDepth + decoding % Traits::kDepth;
            const int64_t column = first_column / kBlock + decoding / Traits::kDepth;
            constant_next = constant_row * blocks + column;
            constant_column = column < blocks;
        } else {
            code_row = constant_row = 0;
            codes_next = a.weight.packed + ((first_column + unit) * blocks + first_step) * (kBlock / 2) + self % 2 * 16;
#pragma unroll
            for (int i = 0; i < kCodeCopies; ++i) {
                code_columns |= (first_column + unit + i * (Traits::kThreads / 2) < a.n ? 1u : 0u) << i;
            }
            constant_next = (first_column + decoding) * blocks + first_step + team;
            constant_column = first_column + decoding < a.n;
        }
    }

    QLK_DEVICE void copy_step(int step, int stage) {
        // What lies outside is zeros; its address, which is not read, stays inside.
        const int row = self / 8, piece = self % 8;
        if (a.left_aligned) {
            if (Traits::kRows * 8 >= Traits::kThreads || self < Traits::kRows * 8) {
                const bool inside = !kBackward || step * Traits::kDepth + piece * 8 < static_cast<int>(depth);
                T* const to = &shared.left[stage][swizzled<Traits::kDepth>(row, piece)];
                const T* from = left_next;
#pragma unroll
                for (int i = 0; i < kLeftCopies; ++i) {
                    const bool valid = inside && (left_rows >> i & 1);
                    cp_async_16(to + i * 32 * Traits::kDepth, valid ? from : a.left, valid ? 16 : 0);
                    from += 32 * depth;
                }
            }
            left_next += Traits::kDepth;
        } else {
#pragma unroll 1
            for (int i = self; i < Traits::kRows * Traits::kDepth; i += Traits::kThreads) {
                const int at_row = i / Traits::kDepth, e = i % Traits::kDepth;
                const int64_t at = static_cast<int64_t>(step) * Traits::kDepth + e;
                const bool inside = first_row + at_row < a.m && at < depth;
                store_shared(&shared.left[stage][swizzled<Traits::kDepth>(at_row, e / 8) + e % 8],
                             inside ? load_global(a.left + (first_row + at_row) * depth + at) : from_float<T>(0.0f));
            }
        }
        const bool inside = !kBackward || code_row < a.n;
        // 128 blocks on: forward as many rows of W, backward two blocks along them.
        const int64_t apart =
            kBackward ? Traits::kThreads / 2 / Traits::kDepth * (kBlock / 2) : a.k / 2 * (Traits::kThreads / 2);
        const uint8_t* from = codes_next;
#pragma unroll
        for (int i = 0; i < kCodeCopies; ++i) {
            const bool valid = inside && (code_columns >> i & 1);
            cp_async_16(&shared.codes[stage][code_slot(self / 2 + i * (Traits::kThreads / 2), self % 2)],
                        valid ? from : a.weight.packed, valid ? 16 : 0);
            from += apart;
        }
        if constexpr (kBackward) {
            codes_next += a.k / 2 * Traits::kDepth;
            code_row += Traits::kDepth;
        } else {
            codes_next += kBlock / 2;
        }
    }

    // 8 neighbouring units, read together, lie in 8 different groups of banks.
    QLK_DEVICE static int code_slot(int unit, int half) { return unit * 2 + (half ^ (unit >> 2 & 1)); }

    // A block's constant on its way: asked for two turns before it is needed, looked up in its table one before.
    struct Constant {
        uint32_t code;  // or, without double quantization, the constant's bits
        float nested;
    };

    // Asks for this thread's next; outside, nothing: columns that are not stored, or rows whose constant is 0.
    QLK_DEVICE Constant ask(bool wanted) {
        Constant c{0, 0.0f};
        if (wanted && constant_column && (!kBackward || constant_row < a.n)) {
            if (a.weight.absmax) {
                c.code = __float_as_uint(load_global(a.weight.absmax + constant_next));
            } else {
                c.code = load_global(a.weight.absmax_code + constant_next);
                c.nested = load_global(a.weight.nested_absmax + constant_next / kNestedBlock);
            }
        }
        if constexpr (kBackward) {
            constant_next += a.k * Traits::kTeams;
            constant_row += Traits::kDepth * Traits::kTeams;
        } else {
            constant_next += Traits::kTeams;
        }
        return c;
    }

    QLK_DEVICE float entry(const Constant& c) const {
        return a.weight.absmax ? __uint_as_float(c.code) : load_global(a.weight.nested_table + c.code);
    }

    QLK_DEVICE float constant(const Constant& c, float entry) const {
        // Rows beyond W meet zeros, and an offset that rounds to infinity would make NaN of them. The number of the row
        // has moved on since it was asked for.
        const bool beyond = kBackward && constant_row - Traits::kDepth * Traits::kTeams >= a.n;
        return a.weight.absmax ? entry : __fadd_rn(__fmul_rn(entry, c.nested), beyond ? 0.0f : offset);
    }

    // Decodes the block of weights that is this thread's in a step.
    QLK_DEVICE void decode(int stage, int buffer, float absmax) {
        const int unit = self % Traits::kUnits;
        const int row = kBackward ? unit % Traits::kDepth : unit;
        const int first_piece = kBackward ? unit / Traits::kDepth * 8 : 0;
        BlockTable<T> table;
        table.fill(a.weight.levels, absmax);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 codes = load_shared(&shared.codes[stage][code_slot(unit, half)]);
            const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                T* const to = &shared.weights[buffer][swizzled<kWeightWidth>(row, first_piece + half * 4 + i)];
                store_shared(reinterpret_cast<uint4*>(to), table.decode(words[i]));
            }
        }
    }

    // Where this warp's outputs begin in the tile, and its part of a step's depth.
    QLK_DEVICE int down() const { return warp % Traits::kWarpsDown * Traits::kWarpRows; }
    QLK_DEVICE int across() const { return warp / Traits::kWarpsDown % Traits::kWarpsAcross * Traits::kWarpColumns; }
    QLK_DEVICE int slice() const { return Traits::kSlices == 1 ? 0 : warp / (8 / Traits::kSlices); }

    // sum += left[rows, 16] * weights, of one stage and one buffer: the piece-th 16 of this slice's depth.
    QLK_DEVICE void multiply(int stage, int buffer, int piece) {
        const auto* const left_from = reinterpret_cast<const unsigned char*>(shared.left[stage]);
        const auto* const right_from = reinterpret_cast<const unsigned char*>(shared.weights[buffer]);
        uint32_t left[kDownTiles][4];
#pragma unroll
        for (int i = 0; i < kDownTiles; ++i) {
            ldmatrix_x4<false>(left[i], left_from + (left_at ^ piece * 32) + i * 16 * Traits::kDepth * sizeof(T));
        }
#pragma unroll
        for (int j = 0; j < kAcrossTiles; j += 2) {
            // Two tiles of 8 columns: depth 0-7 and 8-15 of the first, then of the second.
            uint32_t right[4];
            if constexpr (kBackward) {
                ldmatrix_x4<true>(right, right_from + (right_at ^ j * 16) + piece * 16 * Traits::kColumns * sizeof(T));
            } else {
                ldmatrix_x4<false>(right, right_from + (right_at ^ piece * 32) + j * 8 * Traits::kDepth * sizeof(T));
            }
#pragma unroll
            for (int i = 0; i < kDownTiles; ++i) {
                mma_16x8x16<T>(sum[i][j], left[i], right[0], right[1]);
                mma_16x8x16<T>(sum[i][j + 1], left[i], right[2], right[3]);
            }
        }
    }

    // 16 times `pieces` of r, from `first` on, to shared memory: low_left's to a stage, low_right's to the first buffer
    // of weights. What lies outside is zeros. u and v may have been written since this kernel began.
    QLK_DEVICE void copy_low_rank(int stage, int64_t first, int pieces) {
        constexpr int kAcross = kWeightWidth / 8;  // pieces of 16 bytes in a row of weights
        const auto right_at = [&](int row, int64_t at, int64_t& from) {
            from = kBackward ? (first + row) * a.k + first_column + at : (first_column + row) * a.r + first + at;
            return kBackward ? first + row < a.r && first_column + at < a.k
                             : first_column + row < a.n && first + at < a.r;
        };
        if (a.low_aligned) {
#pragma unroll 1
            for (int i = self; i < Traits::kRows * Traits::kDepth / 8; i += Traits::kThreads) {
                const int row = i / (Traits::kDepth / 8), piece = i % (Traits::kDepth / 8);
                if (piece >= pieces * 2) continue;
                const bool inside = first_row + row < a.m && first + piece * 8 < a.r;
                const int64_t from = inside ? (first_row + row) * a.r + first + piece * 8 : 0;
                cp_async_16(&shared.left[stage][swizzled<Traits::kDepth>(row, piece)], a.low_left + from,
                            inside ? 16 : 0);
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
            store_shared(
                &shared.left[stage][swizzled<Traits::kDepth>(row, at / 8) + at % 8],
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

    // u B^T, or v A with dropout's mask on it: all of it into the sums of the first slice, by way of a stage that no
    // copy is under way to.
    QLK_DEVICE void low_rank(int stage) {
        for (int64_t first = 0; first < a.r; first += Traits::kDepth) {
            const int64_t left = a.r - first;
            const int pieces = static_cast<int>(left < Traits::kDepth ? (left + 15) / 16 : Traits::kDepth / 16);
            __syncthreads();  // nobody reads what is there any more
            copy_low_rank(stage, first, pieces);
            __syncthreads();
#pragma unroll 1
            for (int piece = 0; slice() == 0 && piece < pieces; ++piece) multiply(stage, 0, piece);
        }
        if (kBackward && a.dropout.seed && a.r > 0 && slice() == 0) drop();
    }

    // Dropout's mask on the sums. Two lanes have the four neighbours of a counter, in two rows: one makes the words of
    // the one row, the other those of the other.
    QLK_DEVICE void drop() {
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

    // Both slices' sums together: of their rows each has the half of its number in the end, in the first kOwnTiles of
    // `sum`, and gives the other the rest.
    QLK_DEVICE void add_slices(float4* room) {
        if constexpr (Traits::kSlices == 2) {
            const auto at = [&](int slice, int i, int j) {
                const int pair = warp % (8 / Traits::kSlices);  // of warps with the same outputs
                return room + (((pair * 2 + slice) * kOwnTiles + i) * kAcrossTiles + j) * 32 + lane;
            };
            __syncthreads();  // nobody reads the operands any more, whose place the sums take
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

    QLK_DEVICE void run() {
#pragma unroll
        for (int i = 0; i < kDownTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kAcrossTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
            }
        }
        const int team = self / Traits::kUnits;  // decodes the steps whose number is its own modulo kTeams
        start();
        for (int step = 0; step < Traits::kStages - 1; ++step) {
            if (step < steps) copy_step(first_step + step, step);
            cp_async_commit();
        }
        Constant next = ask(team < steps);
        if constexpr (kBackward) {
            griddep_wait();
            if (first_step == 0) low_rank(Traits::kStages - 1);
        }
        cp_async_wait<Traits::kStages - 2>();
        __syncthreads();
        if (team == 0) {
            decode(0, 0, constant(next, entry(next)));
            next = ask(Traits::kTeams < steps);
        }
        int stage = 0;
        for (int step = 0; step < steps; ++step) {
            const int next_stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
            const int last_stage = stage == 0 ? Traits::kStages - 1 : stage - 1;
            // The copies of the next step, whose codes are about to be decoded.
            cp_async_wait<Traits::kStages - 3>();
            __syncthreads();
            const bool decodes = step + 1 < steps && team == (step + 1) % Traits::kTeams;
            const float looked_up = decodes ? entry(next) : 0.0f;
            if (step + Traits::kStages - 1 < steps) copy_step(first_step + step + Traits::kStages - 1, last_stage);
            cp_async_commit();
            if (decodes) {
                decode(next_stage, (step + 1) % 2, constant(next, looked_up));
                next = ask(step + 1 + Traits::kTeams < steps);
            }
            constexpr int kPieces = Traits::kDepth / 16 / Traits::kSlices;
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) multiply(stage, step % 2, piece);
            stage = next_stage;
        }
        if constexpr (!kBackward) {
            griddep_wait();
            locate();
            if (first_step == 0) low_rank(0);
        }
    }

    QLK_DEVICE void store(T* staged) {
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
        __syncthreads();  // nobody reads the operands any more, whose place the results take
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
};

// Tiles that one block has alone come first. Blocks of one tile come one after another; tiles go down the rows first:
// those that run together share their weights in L2.
template <class T, class Traits>
QLK_DEVICE void gemm_tile(const GemmArguments<T>& a) {
    auto& shared = shared_memory<typename Traits::Shared>();
    const unsigned down = static_cast<unsigned>((a.m + Traits::kRows - 1) / Traits::kRows);
    const unsigned whole = static_cast<unsigned>(a.splits.whole);
    const bool alone = blockIdx.x < whole;
    const unsigned count = alone ? 1 : static_cast<unsigned>(a.splits.count), shared_from = alone ? 0 : whole;
    const unsigned tile = shared_from + (blockIdx.x - shared_from) / count;
    const int split = static_cast<int>((blockIdx.x - shared_from) % count);
    const int64_t depth = Traits::kBackward ? a.n : a.k;
    const int64_t steps = (depth + Traits::kDepth - 1) / Traits::kDepth;
    const int first_step = static_cast<int>(steps * split / count);
    Gemm<T, Traits> gemm{a,
                         shared.loop,
                         static_cast<int64_t>(tile % down) * Traits::kRows,
                         static_cast<int64_t>(tile / down) * Traits::kColumns,
                         depth,
                         first_step,
                         static_cast<int>(steps * (split + 1) / count) - first_step,
                         a.weight.absmax ? 0.0f : load_global(a.weight.nested_offset),
                         static_cast<int>(threadIdx.x),
                         static_cast<int>(threadIdx.x % 32),
                         static_cast<int>(threadIdx.x / 32),
                         {}};
    gemm.run();
    gemm.add_slices(shared.sums);
    if constexpr (Traits::kSplits) {
        // A barrier stands before the word is written, and another before the results are.
        using Sums = float[sizeof(gemm.sum) / sizeof(float) / Traits::kSlices];
        if (!alone && !add_splits<Traits::kThreads>(a.splits, tile - whole, split, reinterpret_cast<Sums&>(gemm.sum),
                                                    reinterpret_cast<int*>(&shared))) {
            return;
        }
    }
    gemm.store(shared.out);
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) gemm_kernel(const __grid_constant__ GemmArguments<T> a) {
    if constexpr (kRuns<T, sizeof(typename Traits::Shared)>) {
        gemm_tile<T, Traits>(a);
    } else {
        trap();
    }
}

}  // namespace qlk::cuda
