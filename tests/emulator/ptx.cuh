// Twins of csrc/cuda/device/ptx.cuh: the same names, with the semantics of the PTX ISA in plain C++.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

inline uint4 ld_global_once_16(const void* address, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kLoad, address, 16, s);
    uint4 v;
    std::memcpy(&v, address, 16);
    return v;
}
inline uint2 ld_global_once_8(const void* address, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kLoad, address, 8, s);
    uint2 v;
    std::memcpy(&v, address, 8);
    return v;
}

inline void st_global_16(void* address, uint4 v, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kStore, address, 16, s);
    std::memcpy(address, &v, 16);
}

inline void cp_async_16(void* shared, const void* global, uint32_t valid = 16, emu::Site s = emu::Site::here()) {
    emu::copy_async(shared, global, 16, valid, s);
}
inline void cp_async_16_if(bool wanted, void* shared, const void* global, uint32_t valid = 16,
                           emu::Site s = emu::Site::here()) {
    if (wanted) emu::copy_async(shared, global, 16, valid, s);
}
inline void cp_async_commit(emu::Site s = emu::Site::here()) { emu::copy_commit(s); }
template <int kPending>
void cp_async_wait(emu::Site s = emu::Site::here()) {
    emu::copy_wait(kPending, s);
}

inline void bar_sync(int id, int threads, emu::Site s = emu::Site::here()) { emu::barrier(id, threads, s); }
inline void bar_arrive(int id, int threads, emu::Site s = emu::Site::here()) { emu::barrier_arrive(id, threads, s); }

inline void fence_acq_rel(emu::Site s = emu::Site::here()) { emu::fence(s); }
template <class T>
T atom_add_acquire(T* address, T value, emu::Site s = emu::Site::here()) {
    const T before = emu::atomic(address, [=](T old) { return static_cast<T>(old + value); }, s);
    emu::acquire();
    return before;
}

inline void griddep_wait(emu::Site s = emu::Site::here()) { emu::grid_wait(s); }
inline void griddep_launch(emu::Site s = emu::Site::here()) { emu::grid_launch(s); }

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector, emu::Site s = emu::Site::here()) {
    emu::count("prmt", s);
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t pick = selector >> (4 * i) & 15;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        d |= byte << (8 * i);
    }
    return d;
}

template <uint8_t kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, emu::Site s = emu::Site::here()) {
    emu::count("lop3", s);
    uint32_t d = 0;
    for (int i = 0; i < 32; ++i) {
        const int row = static_cast<int>((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1));
        d |= static_cast<uint32_t>(kTable >> row & 1) << i;
    }
    return d;
}

inline uint32_t cvt_bf16x2(float low, float high, emu::Site s = emu::Site::here()) {
    emu::count("cvt", s);
    return static_cast<uint32_t>(emu::round_bf16(high).bits) << 16 | emu::round_bf16(low).bits;
}

inline uint32_t cvt_fp16x2(float low, float high, emu::Site s = emu::Site::here()) {
    emu::count("cvt", s);
    return static_cast<uint32_t>(emu::round_half(high).bits) << 16 | emu::round_half(low).bits;
}

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&d)[4], const void* row, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kShared, emu::Kind::kLoad, row, 16, s);
    struct Row {
        uint16_t element[8];
    };
    struct Four {
        uint32_t word[4];
    };
    Row mine;
    std::memcpy(&mine, row, 16);
    const Four result = emu::warp_op<Four>(
        "ldmatrix", 0xffffffffu, mine,
        [](uint32_t, const auto& rows, auto& out) {
            for (int lane = 0; lane < 32; ++lane) {
                for (int matrix = 0; matrix < 4; ++matrix) {
                    const int a = lane / 4, b = lane % 4 * 2;
                    const auto at = [&](int i, int j) -> uint32_t {
                        return kTransposed ? rows[matrix * 8 + j].element[i] : rows[matrix * 8 + i].element[j];
                    };
                    out[lane].word[matrix] = at(a, b) | at(a, b + 1) << 16;
                }
            }
        },
        s);
    for (int i = 0; i < 4; ++i) d[i] = result.word[i];
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emu::Site s = emu::Site::here()) {
    struct Input {
        uint32_t a[4], b[2];
        float c[4];
    };
    struct Output {
        float d[4];
    };
    const Input input{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    const Output output = emu::warp_op<Output>(
        "mma", 0xffffffffu, input,
        [](uint32_t, const auto& in, auto& out) {
            const auto half = [](uint32_t word, int which) {
                return to_float(from_bits<T>(static_cast<uint16_t>(word >> (16 * which))));
            };
            float left[16][16], right[16][8];
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                for (int e = 0; e < 2; ++e) {
                    for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][2 * t + e + i / 2 * 8] = half(in[lane].a[i], e);
                    for (int i = 0; i < 2; ++i) right[2 * t + e + i * 8][g] = half(in[lane].b[i], e);
                }
            }
            // How a card rounds within a product is not specified. Here it is once, at the end.
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                    double sum = in[lane].c[i];
                    for (int k = 0; k < 16; ++k) {
                        sum += static_cast<double>(left[row][k]) * static_cast<double>(right[k][column]);
                    }
                    out[lane].d[i] = static_cast<float>(sum);
                }
            }
        },
        s);
    for (int i = 0; i < 4; ++i) d[i] = output.d[i];
}

}  // namespace qlk::cuda
