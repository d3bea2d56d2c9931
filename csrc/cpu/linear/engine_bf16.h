// The bf16 engine: products of bf16 pairs into float32.
//
// Formula: C += A B, by AMX tiles (TDPBF16PS) or by AVX-512 (VDPBF16PS)
//
// Layout, as TDPBF16PS wants it, in units of 32 steps of the reduction:
//     A   [step / 32][32 i][32 p]: two tiles of 16 rows x 64 bytes
//     B   [step / 32][2][16 pairs of p][16 j][2]: two tiles of 16 columns ("VNNI")
//
// Registers: AMX holds C in four tiles, A in two, B in two. AVX-512 holds 8 rows of C by 16 or 32 columns.
//
// Why: no product needs a transposed copy of W. Forward, decoded rows of W are rows of A as they are. Backward, two
//     rows of W interleaved before the lookup give rows of B.
#pragma once

#include "cpu/linear/engine_f32.h"
#include "cpu/linear/nf4_bf16.h"
#include "cpu/linear/store.h"

namespace qlk::cpu::QLK_ISA {

struct EngineBf16 {
    using T = bf16;
    using Elem = uint16_t;
    // Names, arguments and layouts are those of EngineF32, unless something else is said here.
    static bool special(const float* absmax, int64_t count) { return has_tiny(absmax, count); }
    static constexpr int64_t kUnit = 32 * kEdge;  // elements in 32 steps of A or B
    // Steps between two visits to C: a panel of W is 16 KB forward, 32 KB backward. Longer ones push the other operand
    // out of the first-level cache: 512 steps were 14% slower at 512 rows, 128 steps 14% too (AMX, one core).
    static constexpr int64_t kDepthForward = 256;
    static constexpr int64_t kDepthBackward = 128;
    static constexpr bool kPrefetchLeft = false;  // it made no difference

    static int64_t pad_weight(int64_t k) { return (k + 127) / 128 * 128; }
    static int64_t pad_plain(int64_t r) { return (r + 31) / 32 * 32; }
    static const Elem* a_at(const Elem* a, int64_t p) { return a + p * kEdge; }
    static const Elem* panel_block(const Elem* panel, int64_t depth, int jb) {
        return panel + jb * pad_plain(depth) * kEdge;
    }

    static void pack_a_rows(const bf16* src, int64_t ld, int rows, int64_t depth, Elem* dst, bool as_weight) {
        for (int i = 0; i < kEdge; ++i) {
            const Elem* const row = reinterpret_cast<const Elem*>(src + i * ld);
            Elem* const out = dst + i * 32;
            if (as_weight) {
                for (int64_t p = 0; p < depth; p += 128) {
                    const Words4 words = weight_order(row + p, i < rows ? depth - p : 0);
                    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(out + (p / 32 + j) * kUnit, words.v[j]);
                }
            } else {
                for (int64_t p = 0; p < depth; p += 32) {
                    _mm512_storeu_si512(out + p / 32 * kUnit, load_words(row + p, i < rows ? depth - p : 0));
                }
            }
        }
    }

    static void pack_a_columns(const bf16* src, int64_t ld, int columns, int64_t depth, Elem* dst) {
        for (int64_t p = 0; p < pad_plain(depth); ++p) {
            Elem* const out = dst + p / 32 * kUnit + p % 32;
            for (int i = 0; i < kEdge; ++i) out[i * 32] = p < depth && i < columns ? src[p * ld + i].bits : 0;
        }
    }

    static void decode_a(const WeightView& w, const float* absmax, int64_t absmax_ld, int64_t row, int rows, int64_t k,
                         int64_t depth, bool tiny, Elem* dst) {
        const bool fast = w.k % kBlock == 0;
        const __m512i half = half_by_block();
        for (int64_t p = 0; p < depth; p += 128) {
            Elem* const out = dst + p / 32 * kUnit;
            const int64_t count = depth - p < 128 ? depth - p : 128;
            for (int i = 0; i < rows; ++i) {
                Words4 words;
                if (fast) {
                    const uint8_t* const codes = w.packed + ((row + i) * w.k + k + p) / 2;
                    const float* const scale = absmax + i * absmax_ld + p / kBlock;
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kDepthForward / 2), _MM_HINT_T0);
                    words = count == 128 ? lookup128(_mm512_loadu_si512(codes),
                                                     table_pair(w.levels, scale, scale + 1, tiny), half)
                                         : lookup128(load_words(codes, count / 4),
                                                     table_pair(w.levels, scale, &kNoBlock, tiny), half);
                } else {
                    alignas(64) Elem line[128];
                    decode_slowly(w, (row + i) * w.k + k + p, count, line);
                    words = weight_order(line, 128);
                }
                for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j * kUnit + i * 32, words.v[j]);
            }
            for (int i = rows; i < kEdge; ++i) {
                for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j * kUnit + i * 32, _mm512_setzero_si512());
            }
        }
    }

    static void pack_b_rows(const bf16* src, int64_t ld, int rows, int64_t depth, Elem* dst, bool as_weight) {
        const Elem* const first = reinterpret_cast<const Elem*>(src);
        for (int tile = 0; tile < (rows > 16 ? 2 : 1); ++tile) {
            const int64_t unit = as_weight ? 128 : 32;
            for (int64_t p = 0; p < depth; p += unit) {
                __m512 lines[4][16];
                for (int j = 0; j < 16; ++j) {
                    const int row = 16 * tile + j;
                    const int64_t count = row < rows ? depth - p : 0;
                    const Elem* const at = first + row * ld + p;
                    if (as_weight) {
                        const Words4 words = weight_order(at, count);
                        for (int q = 0; q < 4; ++q) lines[q][j] = _mm512_castsi512_ps(words.v[q]);
                    } else {
                        lines[0][j] = _mm512_castsi512_ps(load_words(at, count));
                    }
                }
                for (int q = 0; q < unit / 32; ++q) {
                    transpose16(lines[q]);
                    Elem* const out = dst + (p / 32 + q) * kUnit + tile * kUnit / 2;
                    for (int pair = 0; pair < 16; ++pair) _mm512_storeu_ps(out + pair * 32, lines[q][pair]);
                }
            }
        }
    }

    static void pack_b_columns(const bf16* src, int64_t ld, int64_t depth, int columns, Elem* dst) {
        const Elem* const first = reinterpret_cast<const Elem*>(src);
        for (int64_t p = 0; p < pad_plain(depth); p += 2) {
            const Elem* const row = first + p * ld;
            interleave(row, p < depth ? columns : 0, row + ld, p + 1 < depth ? columns : 0, depth, p, dst);
        }
    }

    static void decode_b(const WeightView& w, const float* absmax, int64_t absmax_ld, int64_t row, int64_t depth,
                         int64_t k, int columns, bool tiny, Elem* dst) {
        if (w.k % kBlock != 0) {
            for (int64_t p = 0; p < pad_plain(depth); p += 2) {
                Elem line[2][kPanel];
                const int here[2] = {p < depth ? columns : 0, p + 1 < depth ? columns : 0};
                for (int i = 0; i < 2; ++i) {
                    if (here[i] > 0) decode_slowly(w, (row + p + i) * w.k + k, columns, line[i]);
                }
                interleave(line[0], here[0], line[1], here[1], depth, p, dst);
            }
            return;
        }
        // Word 2 l comes from row p, word 2 l + 1 from row p + 1.
        const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i half = half_by_parity();
        const int64_t row_bytes = w.k / 2;
        for (int64_t p = 0; p < pad_plain(depth); p += 2) {
            const uint8_t* const codes = w.packed + (row + p) * row_bytes + k / 2;
            const float* const scale = absmax + p * absmax_ld;
#if defined(__AMX_BF16__)
            _mm_prefetch(reinterpret_cast<const char*>(codes + 16 * row_bytes), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(codes + 17 * row_bytes), _MM_HINT_T0);
#else
            // The same columns in the panel below, a product earlier than they are needed: 16 rows ahead, decoding took
            // twice as long (Zen 4).
            const uint8_t* const below = codes + kDepthBackward * row_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(below), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(below + row_bytes), _MM_HINT_T1);
#endif
            for (int g = 0; g < kPanel / kBlock; ++g) {
                Words4 words;
                if (p < depth && g * kBlock < columns) {
                    const bool second = p + 1 < depth;
                    const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * g));
                    const __m256i two =
                        second ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + row_bytes + 32 * g))
                               : _mm256_setzero_si256();
                    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1);
                    words = lookup128(_mm512_permutexvar_epi16(zip, both),
                                      table_pair(w.levels, scale + g, second ? scale + absmax_ld + g : &kNoBlock, tiny),
                                      half);
                } else {
                    for (int j = 0; j < 4; ++j) words.v[j] = _mm512_setzero_si512();
                }
                for (int j = 0; j < 4; ++j) _mm512_store_si512(b_row(dst, depth, p, 4 * g + j), words.v[j]);
            }
        }
    }

    // From the order of lookup128, in which a backward panel's columns are within each 64, back to W's.
    static void unpack_row(const float* c, int64_t stride, int row, float* out) {
        for (int g = 0; g < kPanel / kBlock; ++g) {
            const float* const first = c + 2 * g * stride + row * kEdge;
            // Element 4 l + q of the group is word l of vector q ^ 1.
            const __m512 e1 = _mm512_loadu_ps(first), e0 = _mm512_loadu_ps(first + 16);
            const __m512 e3 = _mm512_loadu_ps(first + stride), e2 = _mm512_loadu_ps(first + stride + 16);
            const __m512d t0 = _mm512_castps_pd(_mm512_unpacklo_ps(e0, e1)),
                          t1 = _mm512_castps_pd(_mm512_unpacklo_ps(e2, e3));
            const __m512d t2 = _mm512_castps_pd(_mm512_unpackhi_ps(e0, e1)),
                          t3 = _mm512_castps_pd(_mm512_unpackhi_ps(e2, e3));
            const __m512 u0 = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t1)),
                         u1 = _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t1));
            const __m512 u2 = _mm512_castpd_ps(_mm512_unpacklo_pd(t2, t3)),
                         u3 = _mm512_castpd_ps(_mm512_unpackhi_pd(t2, t3));
            const __m512 a = _mm512_shuffle_f32x4(u0, u1, 0x44), b = _mm512_shuffle_f32x4(u0, u1, 0xee);
            const __m512 x = _mm512_shuffle_f32x4(u2, u3, 0x44), y = _mm512_shuffle_f32x4(u2, u3, 0xee);
            _mm512_storeu_ps(out + g * kBlock, _mm512_shuffle_f32x4(a, x, 0x88));
            _mm512_storeu_ps(out + g * kBlock + 16, _mm512_shuffle_f32x4(a, x, 0xdd));
            _mm512_storeu_ps(out + g * kBlock + 32, _mm512_shuffle_f32x4(b, y, 0x88));
            _mm512_storeu_ps(out + g * kBlock + 48, _mm512_shuffle_f32x4(b, y, 0xdd));
        }
    }

    static void pack_row(const float* line, float* c, int64_t stride, int row) {
        for (int k = 0; k < kPanel; ++k) {
            const int tile = k / kBlock * 4 + (k % 4 ^ 1);
            c[tile / 2 * stride + row * kEdge + tile % 2 * 16 + k % kBlock / 4] = line[k];
        }
    }

#if defined(__AMX_BF16__)
    static void begin_thread() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    static void end_thread() { _tile_release(); }

    static void multiply(const Elem* a, const Elem* b, int64_t depth, float* c, int i_tiles, int j_tiles,
                         bool accumulate) {
        if (i_tiles == 2) {
            j_tiles == 2 ? tiles<2, 2>(a, b, depth, c, accumulate) : tiles<2, 1>(a, b, depth, c, accumulate);
        } else {
            j_tiles == 2 ? tiles<1, 2>(a, b, depth, c, accumulate) : tiles<1, 1>(a, b, depth, c, accumulate);
        }
    }

  private:
    // Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B. Two by two, each loaded tile serves two products of 16 cycles.
    template <int kI, int kJ>
    static QLK_INLINE void tiles(const Elem* a, const Elem* b, int64_t depth, float* c, bool accumulate) {
        constexpr int kStride = kEdge * sizeof(float);
        if (accumulate) {
            _tile_loadd(0, c, kStride);
            if (kJ == 2) _tile_loadd(1, c + 16, kStride);
            if (kI == 2) _tile_loadd(2, c + 16 * kEdge, kStride);
            if (kI == 2 && kJ == 2) _tile_loadd(3, c + 16 * kEdge + 16, kStride);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t p = 0; p < depth; p += 32, a += kUnit, b += kUnit) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (kJ == 2) {
                _tile_loadd(7, b + kUnit / 2, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (kI == 2) {
                _tile_loadd(5, a + kUnit / 2, 64);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (kI == 2 && kJ == 2) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, kStride);
        if (kJ == 2) _tile_stored(1, c + 16, kStride);
        if (kI == 2) _tile_stored(2, c + 16 * kEdge, kStride);
        if (kI == 2 && kJ == 2) _tile_stored(3, c + 16 * kEdge + 16, kStride);
    }
#else
    static void begin_thread() {}
    static void end_thread() {}

    static void multiply(const Elem* a, const Elem* b, int64_t depth, float* c, int i_tiles, int j_tiles,
                         bool accumulate) {
        for (int i = 0; i < 16 * i_tiles; i += 8) {
            j_tiles == 2 ? rows8<2>(a + i * 32, b, depth, c + i * kEdge, accumulate)
                         : rows8<1>(a + i * 32, b, depth, c + i * kEdge, accumulate);
        }
    }

  private:
    template <int kJ>
    static QLK_INLINE void rows8(const Elem* a, const Elem* b, int64_t depth, float* c, bool accumulate) {
        __m512 sum[8][kJ];
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < kJ; ++j) {
                sum[i][j] = accumulate ? _mm512_loadu_ps(c + i * kEdge + 16 * j) : _mm512_setzero_ps();
            }
        }
        for (int64_t p = 0; p < depth; p += 32, a += kUnit, b += kUnit) {
            for (int pair = 0; pair < 16; ++pair) {
                __m512i right[kJ];
                for (int j = 0; j < kJ; ++j) right[j] = _mm512_load_si512(b + j * kUnit / 2 + pair * 32);
                for (int i = 0; i < 8; ++i) {
                    int32_t two;
                    std::memcpy(&two, a + i * 32 + 2 * pair, sizeof two);
                    const __m512i left = _mm512_set1_epi32(two);
                    for (int j = 0; j < kJ; ++j) {
                        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
                    }
                }
            }
        }
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < kJ; ++j) _mm512_storeu_ps(c + i * kEdge + 16 * j, sum[i][j]);
        }
    }
#endif

    // Where columns 16 tile to 16 tile + 15 of the pair of rows (p, p + 1) of a backward panel are kept.
    static QLK_INLINE Elem* b_row(Elem* panel, int64_t depth, int64_t p, int tile) {
        return panel + tile / 2 * pad_plain(depth) * kEdge + p / 32 * kUnit + tile % 2 * kUnit / 2 + p % 32 / 2 * 32;
    }

    // Interleaves two rows of up to 128 columns to pairs, in the order of lookup128.
    static QLK_INLINE void interleave(const Elem* one, int one_count, const Elem* two, int two_count, int64_t depth,
                                      int64_t p, Elem* dst) {
        const __m512i ramp = _mm512_set_epi16(60, 60, 56, 56, 52, 52, 48, 48, 44, 44, 40, 40, 36, 36, 32, 32, 28, 28,
                                              24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
        for (int g = 0; g < kPanel / kBlock; ++g) {
            const int at = g * kBlock;
            const __m512i a0 = load_words(one + at, one_count - at),
                          a1 = load_words(one + at + 32, one_count - at - 32);
            const __m512i b0 = load_words(two + at, two_count - at),
                          b1 = load_words(two + at + 32, two_count - at - 32);
            for (int j = 0; j < 4; ++j) {
                const __m512i index = _mm512_add_epi16(ramp, _mm512_set1_epi16(static_cast<short>(j ^ 1)));
                const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_permutex2var_epi16(a0, index, a1),
                                                              _mm512_permutex2var_epi16(b0, index, b1));
                _mm512_store_si512(b_row(dst, depth, p, 4 * g + j), words);
            }
        }
    }

    // Decodes any run of up to 128 elements of the flat weight, zeros after it.
    static void decode_slowly(const WeightView& w, int64_t begin, int64_t count, Elem* line) {
        float values[128] = {0};
        decode_flat<bf16>(w, begin, begin + count, values);
        from_float(values, reinterpret_cast<bf16*>(line), 128);
    }
};

}  // namespace qlk::cpu::QLK_ISA
