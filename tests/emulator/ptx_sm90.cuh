// Twins of csrc/cuda/device/ptx_sm90.cuh: the same names, with the semantics of the PTX ISA in plain C++.
#pragma once

#include <ptx.cuh>

namespace qlk::cuda {

using emu::Swizzle;

// Offset in the block's shared memory, which starts at a multiple of 1024, as on a card.
inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - emu::shared_bytes());
}

template <class T>
T* shared_pointer(uint32_t address) {
    return reinterpret_cast<T*>(emu::shared_bytes() + address);
}

// ------------------------------------------------------------------------------------------------------- matrices

inline uint32_t movmatrix_transposed(uint32_t a, emu::Site s = emu::Site::here()) {
    return emu::warp_op<uint32_t>(
        "movmatrix", 0xffffffffu, a,
        [](uint32_t, const auto& in, auto& out) {
            const auto at = [&](int i, int j) { return in[i * 4 + j / 2] >> (16 * (j % 2)) & 0xffff; };
            for (int lane = 0; lane < 32; ++lane) {
                const int row = lane / 4, column = lane % 4 * 2;
                out[lane] = at(column, row) | at(column + 1, row) << 16;
            }
        },
        s);
}

template <bool kTransposed>
void stmatrix_x4(void* row, const uint32_t (&a)[4], emu::Site s = emu::Site::here()) {
    struct Four {
        uint32_t word[4];
    };
    struct Row {
        uint16_t element[8];
    };
    emu::access(emu::Space::kShared, emu::Kind::kStore, row, 16, s);
    const Four mine{{a[0], a[1], a[2], a[3]}};
    const Row result = emu::warp_op<Row>(
        "stmatrix", 0xffffffffu, mine,
        [](uint32_t, const auto& in, auto& out) {
            for (int lane = 0; lane < 32; ++lane) {
                const int matrix = lane / 8, i = lane % 8;
                for (int j = 0; j < 8; ++j) {
                    const int r = kTransposed ? j : i, c = kTransposed ? i : j;
                    out[lane].element[j] = static_cast<uint16_t>(in[r * 4 + c / 2].word[matrix] >> (16 * (c % 2)));
                }
            }
        },
        s);
    std::memcpy(row, &result, 16);
}

// ------------------------------------------------------------------------------------------------------ mbarriers

struct alignas(8) MBarrier {
    uint64_t opaque;
};

inline void mbarrier_init(MBarrier& b, uint32_t arrivals, emu::Site s = emu::Site::here()) {
    emu::mbarrier_init(&b, arrivals, s);
}
inline void mbarrier_invalidate(MBarrier& b, emu::Site s = emu::Site::here()) { emu::mbarrier_invalidate(&b, s); }
inline void mbarrier_arrive(MBarrier& b, emu::Site s = emu::Site::here()) { emu::mbarrier_arrive(&b, 1, 0, s); }
inline void mbarrier_arrive_expect(MBarrier& b, uint32_t bytes, emu::Site s = emu::Site::here()) {
    emu::mbarrier_arrive(&b, 1, bytes, s);
}
inline void mbarrier_arrive_at(MBarrier& b, unsigned rank, emu::Site s = emu::Site::here()) {
    emu::mbarrier_arrive(emu::cluster_map(&b, rank, s), 1, 0, s);
}
inline bool mbarrier_test(MBarrier& b, uint32_t parity, emu::Site s = emu::Site::here()) {
    if (emu::mbarrier_test(&b, parity, s)) return true;
    emu::spin(s);  // a thread that asks in a loop lets others run
    return emu::mbarrier_test(&b, parity, s);
}
inline void mbarrier_wait(MBarrier& b, uint32_t parity, emu::Site s = emu::Site::here()) {
    emu::mbarrier_wait(&b, parity, s);
}
inline void fence_mbarrier_init(emu::Site s = emu::Site::here()) { emu::mbarrier_fence(s); }
inline void fence_proxy_async(emu::Site s = emu::Site::here()) { emu::proxy_fence(s); }

// ---------------------------------------------------------------------------------------------------- bulk copies

struct alignas(64) TensorMap {
    emu::Tensor tensor;
};

template <class T>
TensorMap make_tensor_map(T* memory, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows,
                          uint32_t box_columns, Swizzle swizzle) {
    static_assert(sizeof(T) == 2);
    const TensorMap map{{const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(memory)),
                         sizeof(T),
                         {columns, rows},
                         row_bytes,
                         {box_columns, box_rows},
                         swizzle}};
    emu::check(map.tensor);
    return map;
}

inline void tensor_load(void* shared, const TensorMap& map, int column, int row, MBarrier& b,
                        emu::Site s = emu::Site::here()) {
    emu::tensor_load(shared, map.tensor, column, row, &b, 0, s);
}
inline void tensor_load_multicast(void* shared, const TensorMap& map, int column, int row, MBarrier& b, uint16_t blocks,
                                  emu::Site s = emu::Site::here()) {
    emu::tensor_load(shared, map.tensor, column, row, &b, blocks, s);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, MBarrier& b, emu::Site s = emu::Site::here()) {
    emu::bulk_load(shared, global, bytes, &b, 0, s);
}
inline void tensor_store(const TensorMap& map, int column, int row, const void* shared,
                         emu::Site s = emu::Site::here()) {
    emu::tensor_store(map.tensor, column, row, shared, s);
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes, emu::Site s = emu::Site::here()) {
    emu::bulk_store(global, shared, bytes, s);
}
inline void bulk_commit(emu::Site s = emu::Site::here()) { emu::bulk_commit(s); }
template <int kPending>
void bulk_wait(emu::Site s = emu::Site::here()) {
    emu::bulk_wait(kPending, false, s);
}
template <int kPending>
void bulk_wait_read(emu::Site s = emu::Site::here()) {
    emu::bulk_wait(kPending, true, s);
}

// ------------------------------------------------------------------------------------------------------- clusters

inline unsigned cluster_rank() { return emu::cluster_rank(); }
inline void cluster_arrive(emu::Site s = emu::Site::here()) { emu::cluster_arrive(true, s); }
inline void cluster_arrive_relaxed(emu::Site s = emu::Site::here()) { emu::cluster_arrive(false, s); }
inline void cluster_wait(emu::Site s = emu::Site::here()) { emu::cluster_wait(s); }
template <class T>
T* cluster_map(T* shared, unsigned rank, emu::Site s = emu::Site::here()) {
    return static_cast<T*>(emu::cluster_map(shared, rank, s));
}

template <class Params>
void launch_clusters(void (*kernel)(Params), unsigned cluster, int64_t blocks, int threads, size_t shared_bytes,
                     Stream stream, const Params& params) {
    launch(kernel, blocks, threads, shared_bytes, stream, params, Start::kInOrder, cluster);
}

// ------------------------------------------------------------------------------------------------------ warpgroups

// Which lane is not specified, but it is always the same.
inline bool elect_one(emu::Site s = emu::Site::here()) {
    const emu::Options& o = emu::options();
    const unsigned leader = o.order == emu::Order::kForward   ? 0
                            : o.order == emu::Order::kReverse ? 31
                                                              : static_cast<unsigned>(o.seed * 7 + 5) % 32;
    return emu::warp_op<bool>(
        "elect", 0xffffffffu, true,
        [=](uint32_t, const auto&, auto& out) {
            out.fill(false);
            out[leader] = true;
        },
        s);
}

// The emulator doesn't know registers; it only checks that a warpgroup agrees.
template <int kRegisters>
void setmaxnreg_inc(emu::Site s = emu::Site::here()) {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
    emu::set_registers(kRegisters, true, s);
}
template <int kRegisters>
void setmaxnreg_dec(emu::Site s = emu::Site::here()) {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
    emu::set_registers(kRegisters, false, s);
}

inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading, uint32_t stride, Swizzle swizzle,
                                 emu::Site s = emu::Site::here()) {
    return emu::wgmma_descriptor(shared, leading, stride, swizzle, s);
}
inline void wgmma_fence(emu::Site s = emu::Site::here()) { emu::wgmma_fence(s); }
inline void wgmma_commit(emu::Site s = emu::Site::here()) { emu::wgmma_commit(s); }
template <int kPending>
void wgmma_wait(emu::Site s = emu::Site::here()) {
    emu::wgmma_wait(kPending, s);
}

// Not needed here: sums that are not complete are NaN.
template <int kCount>
void wgmma_settle(float (&)[kCount]) {}

template <class T, int kColumns, bool kTransposedA, bool kTransposedB>
void wgmma_ss(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate, emu::Site s = emu::Site::here()) {
    emu::wgmma({kColumns, kTransposedA, kTransposedB, accumulate, nullptr, a, b, d,
                [](uint16_t bits) { return to_float(from_bits<T>(bits)); }},
               s);
}
template <class T, int kColumns, bool kTransposedB>
void wgmma_rs(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              emu::Site s = emu::Site::here()) {
    emu::wgmma({kColumns, false, kTransposedB, accumulate, a, 0, b, d,
                [](uint16_t bits) { return to_float(from_bits<T>(bits)); }},
               s);
}

}  // namespace qlk::cuda
