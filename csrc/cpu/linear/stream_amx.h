// linear_forward for up to 32 rows of bf16 on AMX (few_rows.h takes 1 and 2).
//
// Formula: y = x W^T + u B^T + bias;  u = scaling * x A^T
//
// Layout: 16 rows of W at a time, in chunks of 128 columns: four tiles of 16 x 32. x is packed as tiles of B.
//
// Registers: C stays in four accumulator tiles over all of K.
//
// Why: decoding takes the time, so the rest hides behind it. The vector units decode into one half of an 8 KB buffer
//     while the tile unit multiplies the other half. docs/design/notes-cpu.md, "Streaming with AMX", has the cycles.
#pragma once

#include <omp.h>

#include "cpu/linear/engine_bf16.h"
#include "cpu/linear/few_rows.h"
#include "cpu/scratch.h"

namespace qlk::cpu::QLK_ISA {

constexpr int64_t kStreamRows = 32;     // most rows of x
constexpr int64_t kTileElements = 512;  // 16 x 32 bf16
// Products run kLag chunks behind the decoding; buffers are used in turn.
constexpr int64_t kLag = 1, kBuffers = 2;

class Stream {
  public:
    explicit Stream(const LinearForwardParams& params)
        : p(params), w(params.weight), chunks((w.k + 127) / 128), r_tiles((p.r + 31) / 32), wide(p.m > 16) {}

    // Returns false, without doing anything, if packed x is too large for scratch memory.
    bool run() {
        Carver shared(nullptr), each(nullptr);
        carve_shared(shared);
        carve_thread(each);
        const size_t bytes = shared.used() + p.threads * each.used();
        if (!scratch_suffices(bytes, p.threads)) return false;
        char* const base = scratch(bytes, p.threads);
        Carver area(base);
        carve_shared(area);
#pragma omp parallel num_threads(p.threads)
        {
            EngineBf16::begin_thread();
            Carver own(base + shared.used() + omp_get_thread_num() * each.used());
            const Thread mine = carve_thread(own);
#pragma omp for schedule(static)
            for (int64_t c = 0; c < chunks; ++c) {
                const bf16* const x = static_cast<const bf16*>(p.x) + c * 128;
                EngineBf16::pack_b_rows(x, w.k, static_cast<int>(p.m), std_min(128, w.k - c * 128),
                                        x_packed + c * 4 * EngineBf16::kUnit, true);
            }
            if (p.r > 0) low_rank(mine);
#pragma omp for schedule(dynamic, 2)
            for (int64_t n = p.n_begin; n < p.end(); n += 16) rows16(mine, n);
            EngineBf16::end_thread();
        }
        return true;
    }

  private:
    struct Thread {
        uint16_t* a;    // [2][4 tiles], decoded weights
        float* c;       // [16 rows of W][32]
        float* spill;   // [16 rows of W][32], an accumulator on its way to c
        float* absmax;  // [16 rows][blocks of a row]
    };

    static int64_t std_min(int64_t a, int64_t b) { return a < b ? a : b; }

    void carve_shared(Carver& area) {
        x_packed = area.take<uint16_t>(chunks * 4 * EngineBf16::kUnit);
        u_packed = area.take<uint16_t>(r_tiles * EngineBf16::kUnit);
    }

    Thread carve_thread(Carver& area) const {
        Thread mine;
        mine.a = area.take<uint16_t>(kBuffers * 4 * kTileElements);
        mine.c = area.take<float>(16 * kEdge);
        mine.spill = area.take<float>(16 * kEdge);
        mine.absmax = area.take<float>(16 * (w.k / kBlock));
        return mine;
    }

// GCC's tile intrinsics take literal tile numbers only.
#define QLK_TILE_STEP(c, a_tile, b_tile, a, b) \
    _tile_loadd(a_tile, a, 64);                \
    _tile_loadd(b_tile, b, 64);                \
    _tile_dpbf16ps(c, a_tile, b_tile)

    // Multiplies the four tiles of a chunk of 128 columns by x. Each tile of W has its own accumulator; with more than
    // 16 rows of x (wide), two tiles share a pair.
    QLK_INLINE void multiply_chunk(const uint16_t* a, const uint16_t* b) const {
        constexpr int64_t kA = kTileElements, kB = EngineBf16::kUnit;
        if (wide) {
            QLK_TILE_STEP(0, 4, 6, a, b);
            QLK_TILE_STEP(2, 4, 7, a, b + kTileElements);
            QLK_TILE_STEP(1, 5, 6, a + kA, b + kB);
            QLK_TILE_STEP(3, 5, 7, a + kA, b + kB + kTileElements);
            QLK_TILE_STEP(0, 4, 6, a + 2 * kA, b + 2 * kB);
            QLK_TILE_STEP(2, 4, 7, a + 2 * kA, b + 2 * kB + kTileElements);
            QLK_TILE_STEP(1, 5, 6, a + 3 * kA, b + 3 * kB);
            QLK_TILE_STEP(3, 5, 7, a + 3 * kA, b + 3 * kB + kTileElements);
        } else {
            QLK_TILE_STEP(0, 4, 6, a, b);
            QLK_TILE_STEP(1, 5, 7, a + kA, b + kB);
            QLK_TILE_STEP(2, 4, 6, a + 2 * kA, b + 2 * kB);
            QLK_TILE_STEP(3, 5, 7, a + 3 * kA, b + 3 * kB);
        }
    }

    // One tile of the low-rank term.
    QLK_INLINE void multiply_tile(const uint16_t* a, const uint16_t* b) const {
        QLK_TILE_STEP(0, 4, 6, a, b);
        if (wide) {
            QLK_TILE_STEP(2, 4, 7, a, b + kTileElements);
        }
    }
#undef QLK_TILE_STEP

    static QLK_INLINE uint16_t* buffer(const Thread& mine, int64_t c) {
        return mine.a + c % kBuffers * 4 * kTileElements;
    }

    static QLK_INLINE void store_row(uint16_t* out, const Words4& words) {
        for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j * kTileElements, words.v[j]);
    }

    static QLK_INLINE void clear() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    // c[16][32] = the sum of the accumulators, always in the same order.
    QLK_INLINE void collect(const Thread& mine) const {
        constexpr int kStride = kEdge * sizeof(float);
        _tile_stored(0, mine.c, kStride);
        _tile_stored(1, mine.spill, kStride);
        if (wide) {
            _tile_stored(2, mine.c + 16, kStride);
            _tile_stored(3, mine.spill + 16, kStride);
        }
        add(mine);
        if (!wide) {
            _tile_stored(2, mine.spill, kStride);
            add(mine);
            _tile_stored(3, mine.spill, kStride);
            add(mine);
        }
    }

    QLK_INLINE void add(const Thread& mine) const {
        for (int i = 0; i < 16 * kEdge; i += wide ? 16 : kEdge) {
            vstore(mine.c + i, _mm512_add_ps(vload(mine.c + i), vload(mine.spill + i)));
        }
    }

    // u = scaling * x A^T, 16 ranks at a time, stored and packed for the last steps of the main sum.
    void low_rank(const Thread& mine) const {
        bf16* const u = static_cast<bf16*>(p.u);
#pragma omp for schedule(dynamic)
        for (int64_t r0 = 0; r0 < p.r; r0 += 16) {
            const int ranks = static_cast<int>(std_min(16, p.r - r0));
            const uint16_t* const a = static_cast<const uint16_t*>(p.lora_a) + r0 * w.k;
            clear();
            for (int64_t c = 0; c < chunks; ++c) {
                uint16_t* const out = buffer(mine, c);
                for (int i = 0; i < 16; ++i) {
                    const Words4 words = weight_order(a + i * w.k + c * 128, i < ranks ? w.k - c * 128 : 0);
                    for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j * kTileElements + i * 32, words.v[j]);
                }
                multiply_chunk(out, x_packed + c * 4 * EngineBf16::kUnit);
            }
            collect(mine);
            for (int64_t m = 0; m < p.m; ++m) {
                for (int i = 0; i < ranks; ++i) u[m * p.r + r0 + i].bits = bf16_bits(p.scaling * mine.c[i * kEdge + m]);
            }
        }
#pragma omp single
        EngineBf16::pack_b_rows(u, p.r, static_cast<int>(p.m), p.r, u_packed, false);
    }

    // Columns [n, n + 16) of y: as many rows of W.
    void rows16(const Thread& mine, int64_t n) const {
        const int rows = static_cast<int>(std_min(16, p.end() - n));
        const int64_t row_blocks = w.k / kBlock, row_bytes = w.k / 2;
        decode_absmax(w, n * row_blocks, rows * row_blocks, mine.absmax);
        const bool tiny = has_tiny(mine.absmax, rows * row_blocks);
        const uint8_t* const codes = w.packed + n * row_bytes;
        const __m512i half = half_by_block();
        if (rows < 16) std::memset(mine.a, 0, kBuffers * 4 * kTileElements * sizeof(uint16_t));
        clear();
        // Codes are loaded one chunk before they are decoded. Decoded rows go to every line of a page, so a later load
        // would meet a store in flight with the same low 12 bits of address, and wait for it.
        const auto load = [&](int i, int64_t c) {
            return load_words(codes + i * row_bytes + c * 64, i < rows ? (w.k - c * 128) / 4 : 0);
        };
        __m512i ahead[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) ahead[i] = load(i, 0);
        for (int64_t c = 0; c < chunks; ++c) {
            uint16_t* const out = buffer(mine, c);
            const uint8_t* const next = codes + (c + 1) * 64;
            // If the next chunk of every row can be loaded without a mask, this chunk is whole too.
            if (rows == 16 && w.k - c * 128 >= 256) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    const float* const scale = mine.absmax + i * row_blocks + 2 * c;
                    const __m512i now = ahead[i];
                    ahead[i] = _mm512_loadu_si512(next + i * row_bytes);
                    // Prefetch the next 16 rows, a line for each line used here. Past the end it does nothing.
                    _mm_prefetch(reinterpret_cast<const char*>(codes + 16 * row_bytes + (c * 16 + i) * 64),
                                 _MM_HINT_T1);
                    store_row(out + i * 32, lookup128(now, table_pair(w.levels, scale, scale + 1, tiny), half));
                }
            } else {
                for (int i = 0; i < rows; ++i) {
                    const float* const scale = mine.absmax + i * row_blocks + 2 * c;
                    const float* const second = w.k - c * 128 >= 128 ? scale + 1 : &kNoBlock;
                    store_row(out + i * 32, lookup128(load(i, c), table_pair(w.levels, scale, second, tiny), half));
                }
            }
            if (c >= kLag) multiply_chunk(buffer(mine, c - kLag), x_packed + (c - kLag) * 4 * EngineBf16::kUnit);
        }
        for (int64_t c = chunks > kLag ? chunks - kLag : 0; c < chunks; ++c) {
            multiply_chunk(buffer(mine, c), x_packed + c * 4 * EngineBf16::kUnit);
        }
        for (int64_t t = 0; t < r_tiles; ++t) {
            const uint16_t* const b = static_cast<const uint16_t*>(p.lora_b) + n * p.r + t * 32;
            for (int i = 0; i < 16; ++i) {
                _mm512_store_si512(mine.a + i * 32, load_words(b + i * p.r, i < rows ? p.r - t * 32 : 0));
            }
            multiply_tile(mine.a, u_packed + t * EngineBf16::kUnit);
        }
        collect(mine);
        store_transposed(mine.c, p.bias ? p.bias + n : nullptr, rows, static_cast<int>(p.m),
                         static_cast<bf16*>(p.y) + n, w.n);
    }

    const LinearForwardParams& p;
    const WeightView& w;
    int64_t chunks, r_tiles;
    bool wide;
    uint16_t* x_packed = nullptr;  // [chunks][4][two tiles]
    uint16_t* u_packed = nullptr;  // [r_tiles][two tiles]
};

// Returns false, without doing anything, if this path doesn't take the case.
inline bool stream_forward(const LinearForwardParams& p) {
    if (p.m == 0 || p.m > kStreamRows || p.weight.k % kBlock != 0 || (p.r > 0 && p.dropout > 0)) return false;
    return Stream(p).run();
}

}  // namespace qlk::cpu::QLK_ISA
