// The pipeline of tiles.cuh: copies, decoding and products of one tile. docs/design/notes-cuda.md has the reasoning.
#pragma once

#include "cuda/common/decode.cuh"
#include "cuda/linear/mma/tiles_layout.cuh"

namespace qlk::cuda {

// One thread's state and work for one tile. Traits: GemmTraits.
template <class T, class Traits>
struct Gemm {
    using Shared = typename Traits::Shared;
    static constexpr bool kBackward = Traits::kBackward;
    // Products of 16 x 8 outputs that a warp has, down its rows and across its columns.
    static constexpr int kDownTiles = Traits::kWarpRows / 16, kAcrossTiles = Traits::kWarpColumns / 8;
    static constexpr int kOwnTiles =
        kDownTiles / Traits::kSlices;  // what a warp keeps of kDownTiles once the slices are added
    static constexpr int kWeightWidth = kBackward ? Traits::kColumns : Traits::kDepth;  // of a decoded row, elements

    const GemmArguments<T>& a;
    typename Traits::Loop& shared;
    int64_t first_row, first_column;  // of the tile, in the result
    int64_t depth;                    // K, or N in backward
    int first_step, steps;            // this block's part of the depth, in steps of kDepth
    float offset;                     // mean of the constants, when they are double-quantized
    int self, lane, warp;             // thread in the block, lane in the warp, warp in the block
    float sum[kDownTiles][kAcrossTiles][4];

    // Where this thread copies from next and decodes next. Kept as running addresses: computing them at every step
    // would cost as many instructions as the products.
    static constexpr int kLeftCopies = (Traits::kRows * 8 + Traits::kThreads - 1) / Traits::kThreads;
    static constexpr int kCodeCopies = Traits::kUnits * 2 / Traits::kThreads;
    const T* left_next = nullptr;         // first of kLeftCopies pieces, 32 rows apart
    unsigned left_rows = 0;               // bit i: piece i's row exists
    const uint8_t* codes_next = nullptr;  // first of kCodeCopies half blocks, 128 blocks of weights apart
    unsigned code_columns = 0;            // bit i: half block i lies within the columns
    int code_row = 0;                     // backward: its row of W
    int64_t constant_next = 0;            // block whose constant is fetched next
    int constant_row = 0;                 // backward: its row of W
    bool constant_column = false;         // it lies within the columns
    uint32_t left_at = 0, right_at = 0;   // bytes from the start of a stage, and of a buffer of weights

    // This thread's indices. Called again after the main loop: otherwise the compiler would recompute at every step
    // what the loop needs of them.
    QLK_DEVICE void locate() {
        self = static_cast<int>(opaque(threadIdx.x));
        lane = self % 32;
        warp = self / 32;
    }

    // Where ldmatrix reads for this lane: swizzled() of its first row and piece. Pieces of a row differ in three bits
    // of the address, so another piece is one XOR away, and another row one addition.
    QLK_DEVICE void locate_fragments() {
        constexpr int kPieces = Traits::kDepth / 16 / Traits::kSlices;
        const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
        left_at = sizeof(T) * swizzled<Traits::kDepth>(down() + lane % 16, slice() * kPieces * 2 + high);
        right_at = sizeof(T) *
                   (kBackward ? swizzled<kWeightWidth>(slice() * kPieces * 16 + middle * 8 + low, across() / 8 + high)
                              : swizzled<kWeightWidth>(across() + high * 8 + low, slice() * kPieces * 2 + middle));
        left_at = opaque(left_at);
        right_at = opaque(right_at);
    }

    // Sets the running addresses to this block's first step.
    QLK_DEVICE void start() {
        locate_fragments();
        const int row = self / 8, unit = self / 2;
        left_next = a.left + (first_row + row) * depth + first_step * Traits::kDepth + self % 8 * 8;
        left_rows = 0;
#pragma unroll
        for (int i = 0; i < kLeftCopies; ++i) left_rows |= (first_row + row + i * 32 < a.m ? 1u : 0u) << i;
        const int64_t blocks = a.k / kBlock;  // in a row of W
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

    // Starts the copies of a step's left operand and codes. What lies outside the matrix becomes zeros; its address is
    // not read, but stays inside.
    QLK_DEVICE void copy_step(int step, int stage) {
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
        // 128 blocks further: forward that is 128 rows of W, backward two blocks along a row.
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

    // Slot of a half block. 8 neighbouring units, read together, lie in 8 different groups of banks.
    QLK_DEVICE static int code_slot(int unit, int half) { return unit * 2 + (half ^ (unit >> 2 & 1)); }

    // A block's constant on its way. It is fetched two turns before it is needed, and looked up in its table one turn
    // before.
    struct Constant {
        uint32_t code;  // without double quantization, the constant's bits
        float nested;
    };

    // Fetches this thread's next constant. Outside the matrix it fetches nothing: those columns are not stored, and
    // those rows get the constant 0.
    QLK_DEVICE Constant fetch_constant(bool wanted) {
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

    QLK_DEVICE float table_entry(const Constant& c) const {
        return a.weight.absmax ? __uint_as_float(c.code) : load_global(a.weight.nested_table + c.code);
    }

    // The constant itself, from its table entry.
    QLK_DEVICE float decode_constant(const Constant& c, float entry) const {
        // Rows past the end of W meet zeros; an offset that rounds to infinity would turn these into NaN. constant_row
        // has moved on since the constant was fetched.
        const bool beyond = kBackward && constant_row - Traits::kDepth * Traits::kTeams >= a.n;
        return a.weight.absmax ? entry : __fadd_rn(__fmul_rn(entry, c.nested), beyond ? 0.0f : offset);
    }

    // Decodes this thread's block of weights in a step to shared memory.
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

    // First row and column of this warp's outputs in the tile, and its slice of a step's depth.
    QLK_DEVICE int down() const { return warp % Traits::kWarpsDown * Traits::kWarpRows; }
    QLK_DEVICE int across() const { return warp / Traits::kWarpsDown % Traits::kWarpsAcross * Traits::kWarpColumns; }
    QLK_DEVICE int slice() const { return Traits::kSlices == 1 ? 0 : warp / (8 / Traits::kSlices); }

    // sum += left[rows, 16] * weights for 16 of this slice's depth, the piece-th. From one stage and one buffer.
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

    // In tiles_finish.cuh.
    QLK_DEVICE void copy_low_rank(int stage, int64_t first, int pieces);
    QLK_DEVICE void low_rank(int stage);
    QLK_DEVICE void apply_dropout();
    QLK_DEVICE void add_slices(float4* room);
    QLK_DEVICE void store(T* staged);
    QLK_DEVICE void add_cluster_and_store(float* whole);

    // All of the tile's sums. One barrier a step: after it, this step's weights are decoded, the next step's copies
    // have landed, and what the last step read may be overwritten.
    QLK_DEVICE void run() {
#pragma unroll
        for (int i = 0; i < kDownTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kAcrossTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
            }
        }
        const int team = self / Traits::kUnits;  // decodes every kTeams-th step
        start();
        for (int step = 0; step < Traits::kStages - 1; ++step) {
            if (step < steps) copy_step(first_step + step, step);
            cp_async_commit();
        }
        Constant next = fetch_constant(team < steps);
        if constexpr (kBackward) {
            griddep_wait();
            if (first_step == 0) low_rank(Traits::kStages - 1);
        }
        cp_async_wait<Traits::kStages - 2>();
        __syncthreads();
        if (team == 0) {
            decode(0, 0, decode_constant(next, table_entry(next)));
            next = fetch_constant(Traits::kTeams < steps);
        }
        int stage = 0;
        for (int step = 0; step < steps; ++step) {
            const int next_stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
            const int last_stage = stage == 0 ? Traits::kStages - 1 : stage - 1;
            // The next step's copies, whose codes are about to be decoded.
            cp_async_wait<Traits::kStages - 3>();
            __syncthreads();
            const bool decodes = step + 1 < steps && team == (step + 1) % Traits::kTeams;
            const float looked_up = decodes ? table_entry(next) : 0.0f;
            if (step + Traits::kStages - 1 < steps) copy_step(first_step + step + Traits::kStages - 1, last_stage);
            cp_async_commit();
            if (decodes) {
                decode(next_stage, (step + 1) % 2, decode_constant(next, looked_up));
                next = fetch_constant(step + 1 + Traits::kTeams < steps);
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
};

}  // namespace qlk::cuda
