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
    // A warp's products of a step come in turns: a turn has 16 of depth and 16 columns.
    static constexpr int kPieces = Traits::kDepth / 16 / Traits::kSlices, kTurnsOfPiece = kAcrossTiles / 2;
    static constexpr int kTurns = kPieces * kTurnsOfPiece;

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
    const T* left_next = nullptr;            // first of kLeftCopies pieces, 32 rows apart
    const uint8_t* codes_next = nullptr;     // first of kCodeCopies half blocks, 128 blocks of weights apart
    uint32_t left_at = 0, right_at = 0;      // bytes from the start of a stage, and of a buffer of weights
    uint32_t packed_at = 0, decoded_at = 0;  // the same for the codes that this thread decodes, and their weights

    // What exists of these: each bit is one of
    //   kLeftRow << i: the row of the i-th piece of the left operand
    //   kCodeColumns << i: the columns of the i-th half block that is copied
    //   kConstantColumn: those of the block that is decoded
    //   kBy16: forward; codes of 16 constants are fetched at once
    unsigned flags = 0;
    static constexpr unsigned kLeftRow = 1, kCodeColumns = 16, kConstantColumn = 64, kBy16 = 128;
    // The constant of the block that this thread decodes next.
    int64_t constant_next = 0;   // its block
    uint4 codes = {0, 0, 0, 0};  // its code is the lowest byte; or, without double quantization, its bits
    float nested = 0.0f;

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
        const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
        left_at = sizeof(T) * swizzled<Traits::kDepth>(down() + lane % 16, slice() * kPieces * 2 + high);
        right_at = sizeof(T) *
                   (kBackward ? swizzled<kWeightWidth>(slice() * kPieces * 16 + middle * 8 + low, across() / 8 + high)
                              : swizzled<kWeightWidth>(across() + high * 8 + low, slice() * kPieces * 2 + middle));
        left_at = opaque(left_at);
        right_at = opaque(right_at);
    }

    // Where this thread's codes are, and where their weights go. Words and halves are one XOR apart.
    QLK_DEVICE void locate_weights() {
        const int unit = decoded(), half = Traits::kWords == 8 ? 0 : self % 2;
        packed_at = opaque(code_slot(unit, half) * 16);
        decoded_at = opaque(sizeof(T) * swizzled<kWeightWidth>(unit / kRowBlocks, unit % kRowBlocks * 8 + half * 4));
    }

    // Blocks of a step that lie in one row of W. Backward they are numbered row after row, so that a request for
    // constants finds those of a row in one sector.
    static constexpr int kRowBlocks = kBackward ? Traits::kColumns / kBlock : 1;
    // The block that this thread decodes, or half of it.
    QLK_DEVICE int decoded() const { return Traits::kWords == 8 ? self : self / 2; }

    // Sets the running addresses to this block's first step.
    QLK_DEVICE void start() {
        locate_fragments();
        locate_weights();
        const int row = self / 8, unit = self / 2;
        left_next = a.left + (first_row + row) * depth + first_step * Traits::kDepth + self % 8 * 8;
        flags = 0;
#pragma unroll
        for (int i = 0; i < kLeftCopies; ++i) flags |= first_row + row + i * 32 < a.m ? kLeftRow << i : 0;
        const int64_t blocks = a.k / kBlock;  // in a row of W
        if constexpr (kBackward) {
            const int64_t block = first_column / kBlock + unit % kRowBlocks;
            codes_next = a.weight.packed + (row_of(first_step, unit) * blocks + block) * (kBlock / 2) + self % 2 * 16;
            flags |= block < blocks ? kCodeColumns : 0;
            const int64_t column = first_column / kBlock + decoded() % kRowBlocks;
            constant_next = row_of(first_step, decoded()) * blocks + column;
            flags |= column < blocks ? kConstantColumn : 0;
        } else {
            codes_next = a.weight.packed + ((first_column + unit) * blocks + first_step) * (kBlock / 2) + self % 2 * 16;
#pragma unroll
            for (int i = 0; i < kCodeCopies; ++i) {
                flags |= first_column + unit + i * (Traits::kThreads / 2) < a.n ? kCodeColumns << i : 0;
            }
            constant_next = (first_column + decoded()) * blocks + first_step;
            flags |= first_column + decoded() < a.n ? kConstantColumn : 0;
            const bool aligned = blocks % 16 == 0 && reinterpret_cast<uintptr_t>(a.weight.absmax_code) % 16 == 0;
            flags |= !a.weight.absmax && aligned ? kBy16 : 0;
        }
    }

    // Backward: the row of W of a block in a step. Both sides of W fit into 32 bits (dispatch.h).
    QLK_DEVICE static int64_t row_of(int step, int unit) { return step * Traits::kDepth + unit / kRowBlocks; }
    QLK_DEVICE bool row_exists(int step, int unit) const {
        return !kBackward || step * Traits::kDepth + unit / kRowBlocks < static_cast<int>(a.n);
    }

    // Starts the copies of a step's left operand and codes. What lies outside the matrix becomes zeros, and is not
    // read. Without jumps, so that the copies can be spread among products.
    QLK_DEVICE void copy_step(bool wanted, int step, int stage) {
        const int row = self / 8, piece = self % 8;
        const bool left =
            wanted && a.left_aligned && (Traits::kRows * 8 >= Traits::kThreads || self < Traits::kRows * 8);
        const bool inside = !kBackward || step * Traits::kDepth + piece * 8 < static_cast<int>(depth);
        T* const left_to = shared.left[stage] + swizzled<Traits::kDepth>(row, piece);
        const T* left_from = left_next;
#pragma unroll
        for (int i = 0; i < kLeftCopies; ++i) {
            const bool valid = inside && (flags & kLeftRow << i);
            cp_async_16_if(left, left_to + i * 32 * Traits::kDepth, left_from, valid ? 16 : 0);
            left_from += 32 * depth;
        }
        left_next += Traits::kDepth;
        // 128 blocks further. Backward these are other rows of W; how many, the tile's width says.
        const int64_t apart = a.k / 2 * (Traits::kThreads / 2 / kRowBlocks);
        const uint8_t* from = codes_next;
#pragma unroll
        for (int i = 0; i < kCodeCopies; ++i) {
            const int unit = self / 2 + i * (Traits::kThreads / 2);
            const bool valid = kBackward ? flags & kCodeColumns && row_exists(step, unit) : flags & kCodeColumns << i;
            cp_async_16_if(wanted, &shared.codes[stage][code_slot(unit, self % 2)], from, valid ? 16 : 0);
            from += apart;
        }
        codes_next += kBackward ? a.k / 2 * Traits::kDepth : kBlock / 2;
    }

    // The left operand of a step element by element, where its rows are not aligned.
    QLK_DEVICE void copy_elements(int step, int stage) {
#pragma unroll 1
        for (int i = self; i < Traits::kRows * Traits::kDepth; i += Traits::kThreads) {
            const int at_row = i / Traits::kDepth, e = i % Traits::kDepth;
            const int64_t at = static_cast<int64_t>(step) * Traits::kDepth + e;
            const bool inside = first_row + at_row < a.m && at < depth;
            store_shared(&shared.left[stage][swizzled<Traits::kDepth>(at_row, e / 8) + e % 8],
                         inside ? load_global(a.left + (first_row + at_row) * depth + at) : from_float<T>(0.0f));
        }
    }

    // Slot of a half block. 8 neighbouring units, read together, lie in 8 different groups of banks.
    QLK_DEVICE static int code_slot(int unit, int half) { return unit * 2 + (half ^ (unit >> 2 & 1)); }

    // Fetches the constant at constant_next, of a step of the whole depth, for the next step to look up. Outside the
    // matrix it fetches nothing: those columns are not stored, and those rows get the constant 0.
    QLK_DEVICE void fetch_constant(int step, bool wanted) {
        const bool exists = wanted && (flags & kConstantColumn);
        if (flags & kBy16) {
            if (step % 16 == 0 && exists) {
                codes = load_global(reinterpret_cast<const uint4*>(a.weight.absmax_code + constant_next));
                nested = load_global(a.weight.nested_absmax + static_cast<uint64_t>(constant_next) / kNestedBlock);
            } else {
                next_of_16();
            }
        } else if (!row_exists(step, decoded())) {
            codes.x = 0;
            nested = 0.0f;
        } else if (exists) {
            if (a.weight.absmax) {
                codes.x = __float_as_uint(load_global(a.weight.absmax + constant_next));
            } else {
                codes.x = load_global(a.weight.absmax_code + constant_next);
                nested = load_global(a.weight.nested_absmax + static_cast<uint64_t>(constant_next) / kNestedBlock);
            }
        }
        constant_next += kBackward ? a.k : 1;
    }

    QLK_DEVICE void next_of_16() {
        codes.x = codes.x >> 8 | codes.y << 24;
        codes.y = codes.y >> 8 | codes.z << 24;
        codes.z = codes.z >> 8 | codes.w << 24;
        codes.w >>= 8;
    }

    // The first fetch. A part of the depth may begin anywhere among 16 steps.
    QLK_DEVICE void fetch_first_constant() {
        if (!(flags & kBy16)) return fetch_constant(first_step, true);
        const int skipped = first_step % 16;
        constant_next -= skipped;
        fetch_constant(first_step - skipped, true);
#pragma unroll 1
        for (int i = 0; i < skipped; ++i) next_of_16();
        constant_next += skipped;
    }

    QLK_DEVICE float table_entry() const {
        return a.weight.absmax ? __uint_as_float(codes.x) : load_global(a.weight.nested_table + (codes.x & 0xff));
    }

    // A step's constant itself, from its table entry.
    QLK_DEVICE float decode_constant(int step, float entry) const {
        // Rows past the end of W meet zeros; an offset that rounds to infinity would turn these into NaN.
        const float more = row_exists(step, decoded()) ? offset : 0.0f;
        return a.weight.absmax ? entry : __fadd_rn(__fmul_rn(entry, nested), more);
    }

    // This thread's codes of a step, the first 32 or the other 32 of a block.
    QLK_DEVICE uint4 load_codes(int stage, int half) const {
        const auto* const from = reinterpret_cast<const unsigned char*>(shared.codes[stage]);
        return load_shared(reinterpret_cast<const uint4*>(from + (packed_at ^ half * 16)));
    }

    // Stores the weights of one of this thread's kWords words of a step.
    QLK_DEVICE void store_word(const uint4& weights, int buffer, int which) {
        auto* const to = reinterpret_cast<unsigned char*>(shared.weights[buffer]);
        store_shared(reinterpret_cast<uint4*>(to + (decoded_at ^ which * 16)), weights);
    }

    // First row and column of this warp's outputs in the tile, and its slice of a step's depth.
    QLK_DEVICE int down() const { return warp % Traits::kWarpsDown * Traits::kWarpRows; }
    QLK_DEVICE int across() const { return warp / Traits::kWarpsDown % Traits::kWarpsAcross * Traits::kWarpColumns; }
    QLK_DEVICE int slice() const { return Traits::kSlices == 1 ? 0 : warp / (8 / Traits::kSlices); }

    // Operands of 16 of this slice's depth, the piece-th: 16 rows of the left one, 16 columns of weights.
    QLK_DEVICE void load_left(uint32_t (&to)[4], int stage, int piece, int i) const {
        const auto* const from = reinterpret_cast<const unsigned char*>(shared.left[stage]);
        ldmatrix_x4<false>(to, from + (left_at ^ piece * 32) + i * 16 * Traits::kDepth * sizeof(T));
    }
    QLK_DEVICE void load_right(uint32_t (&to)[4], int buffer, int piece, int j) const {
        // Two tiles of 8 columns: depth 0-7 and 8-15 of the first, then of the second.
        const auto* const from = reinterpret_cast<const unsigned char*>(shared.weights[buffer]);
        if constexpr (kBackward) {
            ldmatrix_x4<true>(to, from + (right_at ^ j * 16) + piece * 16 * Traits::kColumns * sizeof(T));
        } else {
            ldmatrix_x4<false>(to, from + (right_at ^ piece * 32) + j * 8 * Traits::kDepth * sizeof(T));
        }
    }

    // sum += left[rows, 16] * weights for 16 of this slice's depth, the piece-th. From one stage and one buffer.
    QLK_DEVICE void multiply(int stage, int buffer, int piece) {
        uint32_t left[kDownTiles][4];
#pragma unroll
        for (int i = 0; i < kDownTiles; ++i) load_left(left[i], stage, piece, i);
#pragma unroll
        for (int j = 0; j < kAcrossTiles; j += 2) {
            uint32_t right[4];
            load_right(right, buffer, piece, j);
#pragma unroll
            for (int i = 0; i < kDownTiles; ++i) {
                mma_16x8x16<T>(sum[i][j], left[i], right[0], right[1]);
                mma_16x8x16<T>(sum[i][j + 1], left[i], right[2], right[3]);
            }
        }
    }

    // A turn's operands, and the next turn's.
    struct Operands {
        uint32_t left[kDownTiles][4], right[2][4];
    };

    QLK_DEVICE void load_first(Operands& f, int stage, int buffer) const {
#pragma unroll
        for (int i = 0; i < kDownTiles; ++i) load_left(f.left[i], stage, 0, i);
        load_right(f.right[0], buffer, 0, 0);
    }

    // A turn's products, and the loads of the next turn's operands, from that turn's stage and buffer.
    QLK_DEVICE void multiply_turn(Operands& f, int turn, int stage, int buffer) {
        const int next = (turn + 1) % kTurns, piece = next / kTurnsOfPiece, j = turn % kTurnsOfPiece * 2;
        load_right(f.right[next % 2], buffer, piece, next % kTurnsOfPiece * 2);
        const uint32_t (&right)[4] = f.right[turn % 2];
#pragma unroll
        for (int i = 0; i < kDownTiles; ++i) {
            mma_16x8x16<T>(sum[i][j], f.left[i], right[0], right[1]);
            mma_16x8x16<T>(sum[i][j + 1], f.left[i], right[2], right[3]);
            if (next % kTurnsOfPiece == 0) load_left(f.left[i], stage, piece, i);
        }
    }

    // In tiles_finish.cuh.
    QLK_DEVICE void copy_low_rank(int stage, int64_t first, int pieces);
    QLK_DEVICE void low_rank(int stage);
    QLK_DEVICE void apply_dropout();
    QLK_DEVICE void add_slices(float4* room);
    QLK_DEVICE void store(T* staged);
    QLK_DEVICE void add_cluster_and_store(float* whole);

    // After which turn a step's other work is done, so that decoding is spread among products and what was loaded has
    // arrived. Chosen by what the compiler makes of them: it moves decoding up as far as it can.
    static constexpr int kTableTurn = kTurns == 4 ? 0 : 1;
    static_assert(kTurns == 4 || kTurns == 8 || kTurns == 16);
    QLK_DEVICE static int turn_of(int word) {
        return kTurns == 4 ? (word == 0 ? 0 : 1) : kTurns == 8 ? 2 + word * 4 / 3 : 3 + (word * 3 + 1) / 2;
    }

    // A step: products from its stage and buffer, and between them what comes next. A card's tensor cores would wait
    // for whatever lies between a barrier and the next product. So the last turn's products, whose operands are in
    // registers by then, come after it.
    QLK_DEVICE void run_step(Operands& f, int step, int stage, int next_stage) {
        const int last_stage = stage == 0 ? Traits::kStages - 1 : stage - 1;
        const int ahead = step + Traits::kStages - 1;
        float entry = 0.0f;
        BlockTable<T> table;
        uint4 packed = {0, 0, 0, 0};
#pragma unroll
        for (int turn = 0; turn < kTurns - 1; ++turn) {
            multiply_turn(f, turn, stage, step % 2);
            // After the last step this decodes what nothing reads.
            if (turn == 0) {
                if (!a.left_aligned && ahead < steps) copy_elements(first_step + ahead, last_stage);
                copy_step(ahead < steps, first_step + ahead, last_stage);
                cp_async_commit();
                entry = table_entry();
                packed = load_codes(next_stage, 0);
            }
            if (turn == kTableTurn) {
                entry = decode_constant(first_step + step + 1, entry);
                fetch_constant(first_step + step + 2, step + 2 < steps);
                table.fill(a.weight.levels, entry);
            }
#pragma unroll
            for (int word = 0; word < Traits::kWords; ++word) {
                if (turn != turn_of(word)) continue;
                if (word == 4) packed = load_codes(next_stage, 1);
                const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
                store_word(table.decode(words[word % 4]), (step + 1) % 2, word);
            }
        }
        // The copies of the step after the next one, whose codes are then decoded.
        cp_async_wait<Traits::kStages - 3>();
        __syncthreads();
        multiply_turn(f, kTurns - 1, next_stage, (step + 1) % 2);
    }

    // Decodes the first step. There are no products yet.
    QLK_DEVICE void decode_first() {
        BlockTable<T> table;
        table.fill(a.weight.levels, decode_constant(first_step, table_entry()));
#pragma unroll
        for (int half = 0; half < Traits::kWords / 4; ++half) {
            const uint4 packed = load_codes(0, half);
            const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) store_word(table.decode(words[i]), 0, half * 4 + i);
        }
    }

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
        start();
        for (int step = 0; step < Traits::kStages - 1; ++step) {
            if (step < steps) {
                copy_step(true, first_step + step, step);
                if (!a.left_aligned) copy_elements(first_step + step, step);
            }
            cp_async_commit();
        }
        fetch_first_constant();
        if constexpr (kBackward) {
            griddep_wait();
            if (first_step == 0) low_rank(Traits::kStages - 1);
        }
        cp_async_wait<Traits::kStages - 2>();
        __syncthreads();
        decode_first();
        fetch_constant(first_step + 1, 1 < steps);
        cp_async_wait<Traits::kStages - 3>();
        __syncthreads();
        Operands operands;
        load_first(operands, 0, 0);
        int stage = 0;
        for (int step = 0; step < steps; ++step) {
            const int next_stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
            run_step(operands, step, stage, next_stage);
            stage = next_stage;
        }
    }

    // After run(): what remains of the sums.
    QLK_DEVICE void finish() {
        locate();
        if constexpr (!kBackward) {
            griddep_wait();
            if (first_step == 0) low_rank(0);
        }
    }
};

}  // namespace qlk::cuda
