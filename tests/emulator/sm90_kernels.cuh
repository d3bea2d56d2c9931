// Two small sm_90 kernels: a matrix product whose operands come by tensor copies, and blocks of a cluster that share a
// copy and read each other's shared memory. They show what the emulator supports, and run on a card too. Each can leave
// out one of its parts (kMissing), which the emulator has to notice.
#pragma once

#include <ptx_sm90.cuh>

namespace sm90 {

using namespace qlk::cuda;

// Shared memory from the next multiple of 1024 bytes, where swizzle patterns start.
template <class T>
QLK_DEVICE T& aligned_shared() {
    unsigned char* const bytes = &shared_memory<unsigned char>();
    return *reinterpret_cast<T*>(bytes + (0u - shared_address(bytes)) % 1024);
}

// d[64, 64] = a[64, K] b[64, K]^T. One warp issues copies, a warpgroup multiplies, with two stages.
struct ProductParams {
    TensorMap a, b;  // boxes of 64 x 64
    float* d;
    int steps;  // of 64 of K
};
struct ProductShared {
    uint16_t a[2][64 * 64], b[2][64 * 64];
    float d[64 * 64];
    MBarrier full[2], empty[2];
};
constexpr int kProductThreads = 160;
constexpr size_t kProductBytes = sizeof(ProductShared) + 1024;

enum class ProductPart {
    kNone,
    kInitFence,
    kInitBarrier,
    kFull,
    kEmpty,
    kFewerBytes,
    kFence,
    kCommit,
    kWait,
    kLastWait,
    kRelease,
    kStoreFence,
    kStoreBarrier,
    kStoreWait,
};

template <class T, ProductPart kMissing>
__global__ void __launch_bounds__(kProductThreads) product_kernel(const __grid_constant__ ProductParams p) {
    auto& s = aligned_shared<ProductShared>();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(s.full[i], 1);
            mbarrier_init(s.empty[i], 128);
        }
        if (kMissing != ProductPart::kInitFence) fence_mbarrier_init();
    }
    if (kMissing != ProductPart::kInitBarrier) __syncthreads();
    if (thread >= 128) {
        if (!elect_one()) return;
        for (int step = 0; step < p.steps; ++step) {
            const int i = step % 2;
            // The parity of the phase before the first: an unused stage is empty.
            if (kMissing != ProductPart::kEmpty) mbarrier_wait(s.empty[i], (step / 2 + 1) % 2);
            mbarrier_arrive_expect(s.full[i], kMissing == ProductPart::kFewerBytes ? 8192 : 2 * 8192);
            tensor_load(s.a[i], p.a, 64 * step, 0, s.full[i]);
            tensor_load(s.b[i], p.b, 64 * step, 0, s.full[i]);
        }
        return;
    }
    float d[32];
    for (int step = 0; step < p.steps; ++step) {
        const int i = step % 2;
        if (kMissing != ProductPart::kFull) mbarrier_wait(s.full[i], step / 2 % 2);
        if (kMissing != ProductPart::kFence) wgmma_fence();
        for (int k = 0; k < 4; ++k) {
            const uint64_t a = wgmma_descriptor(s.a[i] + 16 * k, 16, 1024, Swizzle::k128);
            const uint64_t b = wgmma_descriptor(s.b[i] + 16 * k, 16, 1024, Swizzle::k128);
            wgmma_ss<T, 64, false, false>(d, a, b, step + k > 0);
        }
        if (kMissing != ProductPart::kCommit) wgmma_commit();
        // While one step is multiplied, the previous step's stage is released.
        if (kMissing != ProductPart::kWait) wgmma_wait<1>();
        if (kMissing != ProductPart::kRelease && step > 0) mbarrier_arrive(s.empty[1 - i]);
    }
    if (kMissing != ProductPart::kLastWait) wgmma_wait<0>();
    wgmma_settle(d);
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int v = 0; v < 32; ++v) {
        store_shared(&s.d[(row + v / 2 % 2 * 8) * 64 + v / 4 * 8 + column + v % 2], d[v]);
    }
    if (kMissing != ProductPart::kStoreFence) fence_proxy_async();
    if (kMissing != ProductPart::kStoreBarrier) bar_sync(1, 128);
    if (thread == 0) {
        bulk_store(p.d, s.d, sizeof(s.d));
        bulk_commit();
        if (kMissing != ProductPart::kStoreWait) bulk_wait_read<0>();
    }
}

// Two blocks, in[2][threads][4] words. Each copies its half to both. out[block][thread] is a sum over the thread's
// words in both halves, which each block reads from the other's shared memory.
struct ClusterParams {
    const uint32_t* in;
    uint32_t* out;
    TensorMap map;  // the input as 16-bit elements, a row of 8 for each thread, boxes of 64 rows
};
struct ClusterShared {
    uint4 half[2][64];
    uint32_t sum[64];
    MBarrier full, ready;
};
constexpr int kClusterThreads = 64;
constexpr size_t kClusterBytes = sizeof(ClusterShared) + 1024;

enum class ClusterPart { kNone, kFirstBarrier, kFull, kArrive, kReady, kLastBarrier };

template <ClusterPart kMissing>
__global__ void __launch_bounds__(kClusterThreads) cluster_kernel(const __grid_constant__ ClusterParams p) {
    auto& s = aligned_shared<ClusterShared>();
    const int thread = static_cast<int>(threadIdx.x);
    const unsigned rank = cluster_rank();
    if (thread == 0) {
        mbarrier_init(s.full, 1);
        mbarrier_init(s.ready, kClusterThreads);
        fence_mbarrier_init();
    }
    // Relaxed: the others only have to see the mbarriers, which the fence announces.
    if (kMissing != ClusterPart::kFirstBarrier) {
        cluster_arrive_relaxed();
        cluster_wait();
    } else {
        __syncthreads();
    }
    if (thread == 0) {
        mbarrier_arrive_expect(s.full, sizeof(s.half));
        tensor_load_multicast(s.half[rank], p.map, 0, static_cast<int>(rank) * 64, s.full, 3);
    }
    if (kMissing != ClusterPart::kFull) mbarrier_wait(s.full, 0);
    uint32_t sum = 0;
    for (int i = 0; i < 2; ++i) {
        const uint4 v = load_shared(&s.half[i][thread]);
        sum = sum * 31 + v.x + 3 * v.y + 5 * v.z + 7 * v.w;
    }
    store_shared(&s.sum[thread], sum + rank);
    if (kMissing != ClusterPart::kArrive) mbarrier_arrive_at(s.ready, 1 - rank);
    if (kMissing != ClusterPart::kReady) mbarrier_wait(s.ready, 0);
    const uint32_t theirs = load_shared(cluster_map(&s.sum[thread], 1 - rank));
    store_global(p.out + blockIdx.x * kClusterThreads + thread, theirs);
    if (kMissing != ClusterPart::kLastBarrier) {
        cluster_arrive();
        cluster_wait();
    }
}

}  // namespace sm90
