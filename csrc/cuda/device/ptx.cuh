// Every PTX instruction that kernels use, each as one function. tests/emulator/ptx.cuh has a twin of each, and
// tests/emulator/test_conformance.py runs both on the same operands, bit for bit. Sections are those of the PTX ISA.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

// Loads 16 bytes that are read once and not written while the kernel runs: bypasses L1, whole L2 lines
// (ld.global.nc, 9.7.9.8; cache and prefetch hints, 9.7.9.2).
QLK_DEVICE uint4 ld_global_once_16(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(address)));
    return v;
}

// The same for 8 bytes, with 256 bytes brought to L2: for neighbours that this block reads soon.
QLK_DEVICE uint2 ld_global_once_8(const void* address) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(__cvta_generic_to_global(address)));
    return v;
}

// Stores 16 bytes (st.global, 9.7.9.11).
QLK_DEVICE void st_global_16(void* address, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Copies 16 bytes to shared memory without waiting, `valid` of them from global memory and zeros for the rest
// (cp.async.cg, 9.7.9.25.3.1): bypasses L1. From sm_80 on; below, a plain copy with the same result.
QLK_DEVICE void cp_async_16(void* shared, const void* global, uint32_t valid = 16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(__cvta_generic_to_global(global)),
                   "r"(valid)
                 : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid == 16) {
        v = __ldg(static_cast<const uint4*>(global));
    } else {
        for (uint32_t i = 0; i < valid; ++i) {
            reinterpret_cast<unsigned char*>(&v)[i] = static_cast<const unsigned char*>(global)[i];
        }
    }
    *static_cast<uint4*>(shared) = v;
#endif
}

// The same where `wanted`, without a jump around it: a jump would end the stretch of code in which the compiler can put
// products between copies.
QLK_DEVICE void cp_async_16_if(bool wanted, void* shared, const void* global, uint32_t valid = 16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16, %3;}"
                 :
                 : "r"(static_cast<uint32_t>(wanted)), "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                   "l"(__cvta_generic_to_global(global)), "r"(valid)
                 : "memory");
#else
    if (wanted) cp_async_16(shared, global, valid);
#endif
}

// Closes the group of copies issued since the last commit (cp.async.commit_group, 9.7.9.25.3.2).
QLK_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's newest groups are pending (cp.async.wait_group, 9.7.9.25.3.3).
template <int kPending>
QLK_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits at one of the block's 16 barriers for `threads` threads, a multiple of 32 (barrier.cta.sync, 9.7.13.1).
QLK_DEVICE void bar_sync(int id, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives there without waiting (barrier.cta.arrive).
QLK_DEVICE void bar_arrive(int id, int threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders what this thread, and others before a barrier, did before it with what comes after, for all of the device:
// what precedes is seen by a thread that acquires what this one writes next (fence.acq_rel, 9.7.13.4). __threadfence()
// is sequentially consistent besides, and takes longer.
QLK_DEVICE void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// atomicAdd that acquires: after it, this thread sees what others released before they wrote what it has read (atom,
// 9.7.13.5). T: 32 or 64 bits.
template <class T>
QLK_DEVICE T atom_add_acquire(T* address, T value) {
    T before;
    if constexpr (sizeof(T) == 8) {
        asm volatile("atom.acquire.gpu.global.add.u64 %0, [%1], %2;"
                     : "=l"(before)
                     : "l"(__cvta_generic_to_global(address)), "l"(value)
                     : "memory");
    } else {
        asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(__cvta_generic_to_global(address)), "r"(value)
                     : "memory");
    }
    return before;
}

// Waits until the previous launch in the stream has ended and all its writes are visible
// (griddepcontrol.wait, 9.7.13.13). If this launch was not an early one, or below sm_90, that holds from the start.
QLK_DEVICE void griddep_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all blocks have called this or ended, the next launch may start, if it is an early one
// (griddepcontrol.launch_dependents).
QLK_DEVICE void griddep_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Four of the eight bytes of {high, low}, picked by the selector's four low nibbles; a nibble's top bit replicates the
// byte's sign (prmt, 9.7.8.7).
QLK_DEVICE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
    return d;
}

// Any function of three bits, given by its truth table (lop3, 9.7.8.6).
template <uint8_t kTable>
QLK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(static_cast<int>(kTable)));
    return d;
}

// {to_bf16(high), to_bf16(low)}, round to nearest even. One cvt.rn.bf16x2.f32 from sm_80 on (9.7.9.21); below, the
// same bits in integer arithmetic.
QLK_DEVICE uint32_t cvt_bf16x2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// {to_fp16(high), to_fp16(low)}, round to nearest even; infinity beyond the largest float16.
QLK_DEVICE uint32_t cvt_fp16x2(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Loads four 8 x 8 matrices of 16-bit elements (ldmatrix, 9.7.14.5.15). Lane i passes the address of row i % 8 of
// matrix i / 8, 16 bytes. From each matrix, or its transpose with kTransposed, a lane gets row lane / 4, elements 2 *
// (lane % 4) and the next.
template <bool kTransposed>
QLK_DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(address)
                     : "memory");
    }
}

// d[16, 8] += a[16, 16] b[16, 8], sums in float32 (mma, 9.7.14.5.8 for the fragments). With g = lane / 4, t = lane % 4:
//   a: rows g and g + 8 at columns 2t, then both at 2t + 8;
//   b: column g at rows 2t, then 2t + 8;
//   d: row g (two), row g + 8 (two) at columns 2t, 2t + 1.
// bf16 from sm_80 on; fp16 on sm_75 as two products of half the depth.
template <class T>
QLK_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
QLK_DEVICE void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();  // launchers do not ask for it
#endif
}
template <>
QLK_DEVICE void mma_16x8x16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

}  // namespace qlk::cuda
