// The twins of csrc/cuda/ptx.cuh: the same names, with the semantics of the PTX ISA in plain C++.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

inline uint4 ld_global_once_16(const void* address, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kLoad, address, 16, s);
    uint4 v;
    std::memcpy(&v, address, 16);
    return v;
}

inline void st_global_16(void* address, uint4 v, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kStore, address, 16, s);
    std::memcpy(address, &v, 16);
}

inline void cp_async_16(void* shared, const void* global, uint32_t valid = 16, emu::Site s = emu::Site::here()) {
    emu::copy_async(shared, global, 16, valid, s);
}
inline void cp_async_commit(emu::Site s = emu::Site::here()) { emu::copy_commit(s); }
template <int kPending>
void cp_async_wait(emu::Site s = emu::Site::here()) {
    emu::copy_wait(kPending, s);
}

inline void bar_sync(int id, int threads, emu::Site s = emu::Site::here()) { emu::barrier(id, threads, s); }
inline void bar_arrive(int id, int threads, emu::Site s = emu::Site::here()) { emu::barrier_arrive(id, threads, s); }

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

}  // namespace qlk::cuda
