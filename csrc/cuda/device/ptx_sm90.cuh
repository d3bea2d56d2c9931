// PTX from sm_90 on, and sm_90a's own: copies counted by mbarriers, clusters, warpgroup products. The emulator has a
// twin of each (tests/emulator/ptx_sm90.cuh), and tests/emulator/test_conformance_sm90.py runs both on the same
// operands. Sections are those of the PTX ISA.
#pragma once

#include <cuda.h>

#include <ptx.cuh>

namespace qlk::cuda {

QLK_DEVICE uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The pointer to an address in shared memory.
template <class T>
QLK_DEVICE T* shared_pointer(uint32_t address) {
    return reinterpret_cast<T*>(__cvta_shared_to_generic(address));
}

// How 16-byte pieces of shared memory are swizzled: bits 4 and up of an address are XORed with bits 7 and up, 1, 2 or 3
// of them (5.5.7). The pattern repeats every 256, 512 or 1024 bytes.
enum class Swizzle { kNone, k32, k64, k128 };

// ------------------------------------------------------------------------------------------------------- matrices

// Transposes an 8 x 8 matrix of 16-bit elements in registers: a lane has row lane / 4, elements 2 * (lane % 4) and the
// next (movmatrix, 9.7.14.5.17). From sm_75 on.
QLK_DEVICE uint32_t movmatrix_transposed(uint32_t a) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// The reverse of ldmatrix_x4: lane i passes the address of row i % 8 of matrix i / 8 (stmatrix, 9.7.14.5.16).
template <bool kTransposed>
QLK_DEVICE void stmatrix_x4(void* row, const uint32_t (&a)[4]) {
    if constexpr (kTransposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     :
                     : "r"(shared_address(row)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     :
                     : "r"(shared_address(row)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    }
}

// ------------------------------------------------------------------------------------------------------ mbarriers

// Lies in shared memory (9.7.13.15). A phase ends after `arrivals` arrivals, once all expected bytes have come too.
struct alignas(8) MBarrier {
    uint64_t opaque;
};

QLK_DEVICE void mbarrier_init(MBarrier& b, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(arrivals) : "memory");
}
// Has to be called before the memory is used for something else.
QLK_DEVICE void mbarrier_invalidate(MBarrier& b) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&b)) : "memory");
}
// With release: a thread that waits for the phase sees what this thread did before.
QLK_DEVICE void mbarrier_arrive(MBarrier& b) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(shared_address(&b))
                 : "memory");
}
// Arrives, after making the phase wait for that many more bytes.
QLK_DEVICE void mbarrier_arrive_expect(MBarrier& b, uint32_t bytes) {
    asm volatile(
        "{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(shared_address(&b)),
        "r"(bytes)
        : "memory");
}
// Arrives at another block's mbarrier, at the same offset of its shared memory. rank: the block's, in the cluster.
QLK_DEVICE void mbarrier_arrive_at(MBarrier& b, unsigned rank) {
    asm volatile(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(shared_address(&b)),
        "r"(rank)
        : "memory");
}
// Whether the phase with that parity has ended (0 for the first phase). It is the current phase or the one before.
QLK_DEVICE bool mbarrier_test(MBarrier& b, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(&b)), "r"(parity)
        : "memory");
    return done != 0;
}
QLK_DEVICE void mbarrier_wait(MBarrier& b, uint32_t parity) {
    while (!mbarrier_test(b, parity)) {
    }
}
// Called by the thread that initialised mbarriers, before a barrier; then copies and other blocks may use them
// (9.7.13.4).
QLK_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Called before a barrier by each thread that wrote to shared memory what bulk copies or wgmma will read.
QLK_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------- bulk copies

// Describes a matrix of 16-bit elements in global memory, and the boxes of it that are copied. Passed in a kernel's
// __grid_constant__ parameters.
struct TensorMap {
    CUtensorMap map;
};

// Memory and row_bytes are multiples of 16; a box is at most 256 x 256, its rows as wide as the swizzle's span. Throws
// when the driver refuses.
template <class T>
TensorMap make_tensor_map(T* memory, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows,
                          uint32_t box_columns, Swizzle swizzle) {
    static_assert(sizeof(T) == 2);
    // Looked up by name, so that the extension does not link with the driver.
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult query;
    QLK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &query));
    QLK_CHECK(query == cudaDriverEntryPointSuccess, "the driver has no tensor maps: it is older than CUDA 12.0");
    constexpr CUtensorMapSwizzle ways[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    const cuuint64_t sizes[] = {columns, rows}, strides[] = {row_bytes};
    const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
    TensorMap map;
    const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        &map.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<std::remove_const_t<T>*>(memory), sizes, strides, box,
        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, ways[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    QLK_CHECK(status == CUDA_SUCCESS, "the driver refuses a tensor map: error " + std::to_string(status));
    return map;
}

// Loads the box at that row and column, row after row, to an address that is a multiple of 128; zeros outside the
// matrix. The mbarrier counts all its bytes (cp.async.bulk.tensor, 9.7.9.27.1.2). Called by one thread.
QLK_DEVICE void tensor_load(void* shared, const TensorMap& map, int column, int row, MBarrier& b) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(&b))
        : "memory");
}
// The same, to the same offset in each block of the cluster whose rank has its bit set in `blocks`. Each block's own
// mbarrier counts the bytes.
QLK_DEVICE void tensor_load_multicast(void* shared, const TensorMap& map, int column, int row, MBarrier& b,
                                      uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(&b)), "h"(blocks)
        : "memory");
}
// bytes and both addresses are multiples of 16 (9.7.9.25.4.1).
QLK_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, MBarrier& b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(&b))
                 : "memory");
}
// Stores, in this thread's groups. What lies outside the tensor is not written.
QLK_DEVICE void tensor_store(const TensorMap& map, int column, int row, const void* shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
                 "r"(row), "r"(shared_address(shared))
                 : "memory");
}
QLK_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}
QLK_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's newest groups are pending; bulk_wait_read only until the others have
// read shared memory, which has to happen before the block ends (9.7.9.25.6).
template <int kPending>
QLK_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
QLK_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------------------------------- clusters

QLK_DEVICE unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The barrier of all threads of a cluster: a thread that waits sees what the others did before they arrived (9.7.13.3).
// A block must not end while others use its shared memory.
QLK_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
QLK_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
QLK_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The address in another block's shared memory that corresponds to `shared` in this one (mapa, 9.7.9.23).
template <class T>
QLK_DEVICE T* cluster_map(T* shared, unsigned rank) {
    uint64_t there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return reinterpret_cast<T*>(there);
}

// launch() with clusters of up to 8 blocks.
template <class Params>
void launch_clusters(void (*kernel)(Params), unsigned cluster, int64_t blocks, int threads, size_t shared_bytes,
                     Stream stream, const Params& params) {
    launch(kernel, blocks, threads, shared_bytes, stream, params, Start::kInOrder, cluster);
}

// ------------------------------------------------------------------------------------------------------ warpgroups

// True in one lane of the warp, always the same (elect.sync, 9.7.13.16).
QLK_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
    return elected != 0;
}

// Sets the registers of each thread from here on. Called by all warps of a warpgroup (setmaxnreg, 9.7.19.5).
template <int kRegisters>
QLK_DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
QLK_DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Describes a matrix of 16-bit elements in shared memory; distances in bytes, multiples of 16 (9.7.15.5.1.2). Rows of 8
// elements are contiguous. Eight of them, along K, or along M or N if it is transposed, follow each other directly, or
// at the swizzle's span of 32, 64 or 128 bytes.
//   plain:               stride leads to the next eight rows, leading to the next 8 of K, transposed or not;
//   swizzled:            stride leads to the next eight rows;
//   swizzled transposed: stride leads to the next eight of K, leading to the next span.
QLK_DEVICE uint64_t wgmma_descriptor(const void* shared, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    const uint64_t way = (4u - static_cast<uint32_t>(swizzle)) % 4u;  // 128 bytes are 1, 32 are 3
    return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | way << 62;
}

// Needed before the first product, and between a thread's and a product's use of the same registers. Not needed between
// products that add to the same sums (9.7.15.7.1).
QLK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QLK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the newest groups are pending. Until then their registers must not be used.
template <int kPending>
QLK_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Called after a wait, before the sums are used: tells the compiler that they change here, so it doesn't read them
// earlier.
template <int kCount>
QLK_DEVICE void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define QLK_D8(i)                                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define QLK_D16(i) QLK_D8(i), QLK_D8(i + 8)
#define QLK_D32(i) QLK_D8(i), QLK_D8(i + 8), QLK_D8(i + 16), QLK_D8(i + 24)
#define QLK_P0                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QLK_P1                                                                         \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QLK_P2                                                                         \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QLK_P3                                                                                     \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QLK_DN16 QLK_D8(0)
#define QLK_DN32 QLK_D16(0)
#define QLK_DN64 QLK_D32(0)
#define QLK_DN128 QLK_D32(0), QLK_D32(32)
#define QLK_DN256 QLK_D32(0), QLK_D32(32), QLK_D32(64), QLK_D32(96)
#define QLK_PN16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QLK_PN32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QLK_PN64 QLK_P0
#define QLK_PN128 QLK_P0 ", " QLK_P1
#define QLK_PN256 QLK_P0 ", " QLK_P1 ", " QLK_P2 ", " QLK_P3
// p0 and on: numbers of the operands that follow the sums.
#define QLK_WGMMA_SS(n, type, p0, p1, p2, p3, p4)                                                                  \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
                 "." type " {" QLK_PN##n "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 ";}"                    \
                 : QLK_DN##n                                                                                       \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposedA)),         \
                   "n"(static_cast<int>(kTransposedB))                                                             \
                 : "memory")
#define QLK_WGMMA_RS(n, type, p0, p1, p2, p3, p4, p5, p6)                                                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p5 ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type    \
                 "." type " {" QLK_PN##n "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 ";}" \
                 : QLK_DN##n                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),             \
                   "n"(static_cast<int>(kTransposedB))                                                                \
                 : "memory")

// d[64, N] = a[64, 16] b[16, N], plus d with `accumulate`. Called by all warps of a warpgroup (9.7.15.5.2). With w the
// warp in it, g = lane / 4, t = lane % 4: d[v] is row 16 w + g, plus 8 if v & 2, column 8 * (v / 4) + 2 t + v % 2. Both
// operands are in shared memory, given by descriptors; transposed: contiguous along M or N, not along K.
template <class T, int kColumns, bool kTransposedA, bool kTransposedB>
QLK_DEVICE void wgmma_ss(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256, "a list of registers has to be written for it");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (std::is_same_v<T, bf16>) {
        if constexpr (kColumns == 64) QLK_WGMMA_SS(64, "bf16", 32, 33, 34, 35, 36);
        if constexpr (kColumns == 128) QLK_WGMMA_SS(128, "bf16", 64, 65, 66, 67, 68);
        if constexpr (kColumns == 256) QLK_WGMMA_SS(256, "bf16", 128, 129, 130, 131, 132);
    } else {
        if constexpr (kColumns == 64) QLK_WGMMA_SS(64, "f16", 32, 33, 34, 35, 36);
        if constexpr (kColumns == 128) QLK_WGMMA_SS(128, "f16", 64, 65, 66, 67, 68);
        if constexpr (kColumns == 256) QLK_WGMMA_SS(256, "f16", 128, 129, 130, 131, 132);
    }
#else
    __trap();  // launchers do not ask for it
#endif
}
// The same with a in registers; each warp has it as mma_16x8x16 does.
template <class T, int kColumns, bool kTransposedB>
QLK_DEVICE void wgmma_rs(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128 || kColumns == 256,
                  "a list of registers has to be written for it");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (std::is_same_v<T, bf16>) {
        if constexpr (kColumns == 16) QLK_WGMMA_RS(16, "bf16", 8, 9, 10, 11, 12, 13, 14);
        if constexpr (kColumns == 32) QLK_WGMMA_RS(32, "bf16", 16, 17, 18, 19, 20, 21, 22);
        if constexpr (kColumns == 64) QLK_WGMMA_RS(64, "bf16", 32, 33, 34, 35, 36, 37, 38);
        if constexpr (kColumns == 128) QLK_WGMMA_RS(128, "bf16", 64, 65, 66, 67, 68, 69, 70);
        if constexpr (kColumns == 256) QLK_WGMMA_RS(256, "bf16", 128, 129, 130, 131, 132, 133, 134);
    } else {
        if constexpr (kColumns == 16) QLK_WGMMA_RS(16, "f16", 8, 9, 10, 11, 12, 13, 14);
        if constexpr (kColumns == 32) QLK_WGMMA_RS(32, "f16", 16, 17, 18, 19, 20, 21, 22);
        if constexpr (kColumns == 64) QLK_WGMMA_RS(64, "f16", 32, 33, 34, 35, 36, 37, 38);
        if constexpr (kColumns == 128) QLK_WGMMA_RS(128, "f16", 64, 65, 66, 67, 68, 69, 70);
        if constexpr (kColumns == 256) QLK_WGMMA_RS(256, "f16", 128, 129, 130, 131, 132, 133, 134);
    }
#else
    __trap();  // launchers do not ask for it
#endif
}
#undef QLK_D8
#undef QLK_D16
#undef QLK_D32
#undef QLK_P0
#undef QLK_P1
#undef QLK_P2
#undef QLK_P3
#undef QLK_DN16
#undef QLK_DN32
#undef QLK_DN64
#undef QLK_DN128
#undef QLK_DN256
#undef QLK_PN16
#undef QLK_PN32
#undef QLK_PN64
#undef QLK_PN128
#undef QLK_PN256
#undef QLK_WGMMA_SS
#undef QLK_WGMMA_RS

}  // namespace qlk::cuda
