#include "conformance_sm90.h"

#include "sm90_kernels.cuh"

namespace qlk::conformance {
namespace {

using namespace qlk::cuda;

QLK_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

// ------------------------------------------------------------------------------------------------------- matrices

__global__ void __launch_bounds__(32) movmatrix_kernel(const __grid_constant__ Arguments a) {
    a.out[thread()] = movmatrix_transposed(load_global(a.in + thread()));
}

// Where each lane's four registers end up, plain and transposed.
__global__ void __launch_bounds__(32) stmatrix_kernel(const __grid_constant__ Arguments a) {
    auto* const rows = &shared_memory<uint4>();
    const uint4 v = ld_global_once_16(a.in + 4 * thread());
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    stmatrix_x4<false>(shared_pointer<uint4>(shared_address(rows + thread())), words);
    stmatrix_x4<true>(rows + 32 + thread(), words);
    for (int i = 0; i < 2; ++i) st_global_16(a.out + 128 * i + 4 * thread(), load_shared(rows + 32 * i + thread()));
}

// ---------------------------------------------------------------------------------------------------- bulk copies

struct Copied {
    uint32_t words[256];
    MBarrier arrived;
};

// In by two copies that one mbarrier counts, the second half first; out again in two groups.
__global__ void __launch_bounds__(32) bulk_kernel(const __grid_constant__ Arguments a) {
    auto& s = sm90::aligned_shared<Copied>();
    if (thread() == 0) {
        mbarrier_init(s.arrived, 1);
        fence_mbarrier_init();
        bulk_load(s.words + 128, a.in, 512, s.arrived);
        mbarrier_arrive_expect(s.arrived, 1024);
        bulk_load(s.words, a.in + 128, 512, s.arrived);
    }
    __syncthreads();
    while (!mbarrier_test(s.arrived, 0)) {
    }
    for (int i = thread(); i < 256; i += 32) store_shared(s.words + i, load_shared(s.words + i) + 1);
    fence_proxy_async();
    __syncthreads();
    if (thread() == 0) {
        bulk_store(a.out, s.words, 256);
        bulk_commit();
        bulk_store(a.out + 64, s.words + 64, 768);
        bulk_commit();
        bulk_wait_read<0>();
        bulk_wait<0>();
        mbarrier_invalidate(s.arrived);
    }
}

constexpr int kRows = 70, kBoxRows = 24;
template <Swizzle kWay>
constexpr int kSpan = kWay == Swizzle::k32   ? 16
                      : kWay == Swizzle::k64 ? 32
                                             : 64;  // elements

struct TensorArguments {
    TensorMap map;
    const uint32_t* in;
    uint32_t* out;
};
template <Swizzle kWay>
struct Box {
    uint32_t words[kBoxRows * kSpan<kWay> / 2];
    alignas(1024) MBarrier arrived;
};

// Boxes that stick out of a tensor [70, span + 8] at both ends, as they lie in shared memory.
template <Swizzle kWay>
__global__ void __launch_bounds__(32) tensor_load_kernel(const __grid_constant__ TensorArguments a) {
    auto& s = sm90::aligned_shared<Box<kWay>>();
    constexpr int kWords = kBoxRows * kSpan<kWay> / 2;
    if (thread() == 0) {
        mbarrier_init(s.arrived, 1);
        fence_mbarrier_init();
    }
    for (int i = 0; i < 2; ++i) {
        __syncthreads();
        if (thread() == 0) {
            mbarrier_arrive_expect(s.arrived, kWords * 4);
            tensor_load(s.words, a.map, i ? 13 : -5, i ? kRows - 17 : -3, s.arrived);
        }
        mbarrier_wait(s.arrived, i);
        for (int j = thread(); j < kWords; j += 32) store_global(a.out + i * kWords + j, load_shared(s.words + j));
    }
}

// A box that sticks out at both ends, one after the other, written to a tensor of the same shape.
template <Swizzle kWay>
__global__ void __launch_bounds__(32) tensor_store_kernel(const __grid_constant__ TensorArguments a) {
    auto& s = sm90::aligned_shared<Box<kWay>>();
    constexpr int kWords = kBoxRows * kSpan<kWay> / 2;
    for (int j = thread(); j < kWords; j += 32) store_shared(s.words + j, load_global(a.in + j));
    fence_proxy_async();
    __syncthreads();
    if (thread() == 0) {
        tensor_store(a.map, -5, -3, s.words);
        tensor_store(a.map, 13, kRows - 17, s.words);
        bulk_commit();
        bulk_wait<0>();
    }
}

template <Swizzle kWay, bool kStore>
WideKernel tensor_kernel(const char* name) {
    constexpr int kColumns = kSpan<kWay> + 8, kTensor = kRows * kColumns / 2, kWords = kBoxRows * kSpan<kWay> / 2;
    return {name, kStore ? kWords : kTensor, kStore ? kTensor : 2 * kWords,
            [](const Arguments& a, const Stream& stream) {
                const DeviceGuard guard(stream.device);
                auto* const memory = reinterpret_cast<uint16_t*>(kStore ? a.out : const_cast<uint32_t*>(a.in));
                const TensorArguments arguments{
                    make_tensor_map(memory, kRows, kColumns, kColumns * 2, kBoxRows, kSpan<kWay>, kWay), a.in, a.out};
                launch(kStore ? tensor_store_kernel<kWay> : tensor_load_kernel<kWay>, 1, 32, sizeof(Box<kWay>) + 1024,
                       stream, arguments);
            }};
}

// ------------------------------------------------------------------------------------------------------- products

// How the kernels here lay out a matrix [rows, 16]; distances as in descriptors.
template <Swizzle kWay, bool kTransposed, int kRowsOf>
struct Place {
    static constexpr int kBytes = kWay == Swizzle::kNone ? 16 : 2 * kSpan<kWay>;
    // After the first 32 bytes of a span, if it has more.
    static constexpr int kStart = !kTransposed && kBytes > 32 ? 32 : 0;
    static constexpr int kLeading =
        kWay != Swizzle::kNone ? (kTransposed ? 16 * kBytes : 16) : (kTransposed ? kRowsOf / 8 * 128 : 128);
    static constexpr int kStride = kWay != Swizzle::kNone ? 8 * kBytes : (kTransposed ? 128 : 256);

    QLK_DEVICE static int at(int row, int k) {
        int offset;
        if (kTransposed) {
            const int many = kWay == Swizzle::kNone ? 8 : kBytes / 2;
            offset = row % many * 2 + row / many * (kWay == Swizzle::kNone ? kStride : kLeading) + k % 8 * kBytes +
                     k / 8 * (kWay == Swizzle::kNone ? kLeading : kStride);
        } else if (kWay == Swizzle::kNone) {
            offset = row % 8 * 16 + row / 8 * kStride + k % 8 * 2 + k / 8 * kLeading;
        } else {
            offset = kStart + row % 8 * kBytes + row / 8 * kStride + k * 2;
        }
        const int mask = kWay == Swizzle::k128 ? 7 : kWay == Swizzle::k64 ? 3 : kWay == Swizzle::k32 ? 1 : 0;
        return offset ^ (offset >> 7 & mask) << 4;
    }
};

struct Matrices {
    unsigned char a[64 * 128];
    unsigned char b[256 * 128];
};

// In: a[64, 16], b[N, 16], then float32 sums as threads hold them, [128][N / 2]. Out: the sums plus twice the product,
// and the product alone.
template <class T, int kColumns, Swizzle kWay, bool kTransposedA, bool kTransposedB, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ Arguments arguments) {
    using A = Place<kWay, kTransposedA, 64>;
    using B = Place<kWay, kTransposedB, kColumns>;
    auto& s = sm90::aligned_shared<Matrices>();
    const auto* const a = reinterpret_cast<const uint16_t*>(arguments.in);
    const uint16_t* const b = a + 64 * 16;
    const auto* const c = reinterpret_cast<const float*>(b + kColumns * 16) + thread() * (kColumns / 2);
    for (int i = thread(); i < 64 * 16; i += 128) {
        store_shared(reinterpret_cast<uint16_t*>(s.a + A::at(i / 16, i % 16)), load_global(a + i));
    }
    for (int i = thread(); i < kColumns * 16; i += 128) {
        store_shared(reinterpret_cast<uint16_t*>(s.b + B::at(i / 16, i % 16)), load_global(b + i));
    }
    fence_proxy_async();
    __syncthreads();
    const uint64_t right = wgmma_descriptor(s.b + B::kStart, B::kLeading, B::kStride, kWay);
    const uint64_t left = wgmma_descriptor(s.a + A::kStart, A::kLeading, A::kStride, kWay);
    uint32_t fragment[4];
    const int lane = thread() % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = thread() / 32 * 16 + lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        fragment[i] = load_global(arguments.in + (row * 16 + k) / 2);
    }
    float d[kColumns / 2];
    for (int i = 0; i < kColumns / 2; ++i) d[i] = load_global(c + i);
    const auto multiply = [&](bool accumulate) {
        if constexpr (kRegisters) {
            wgmma_rs<T, kColumns, kTransposedB>(d, fragment, right, accumulate);
        } else {
            wgmma_ss<T, kColumns, kTransposedA, kTransposedB>(d, left, right, accumulate);
        }
    };
    auto* const out = reinterpret_cast<float*>(arguments.out) + thread() * kColumns;
    const auto store = [&](float* to) {
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(d);
        for (int i = 0; i < kColumns / 2; ++i) store_global(to + i, d[i]);
    };
    wgmma_fence();
    multiply(true);
    multiply(true);
    store(out);
    wgmma_fence();
    multiply(false);
    store(out + kColumns / 2);
}

template <class T, int kColumns, Swizzle kWay, bool kTransposedA, bool kTransposedB, bool kRegisters = false>
WideKernel product(const char* name) {
    return {name, 64 * 8 + kColumns * 8 + 128 * (kColumns / 2), 128 * kColumns,
            [](const Arguments& arguments, const Stream& stream) {
                const DeviceGuard guard(stream.device);
                launch(wgmma_kernel<T, kColumns, kWay, kTransposedA, kTransposedB, kRegisters>, 1, 128,
                       sizeof(Matrices) + 1024, stream, arguments);
            }};
}

// ---------------------------------------------------------------------------------------------------------- rates

struct RateShared {
    uint4 a[2][64 * 8], b[256 * 8];  // rows of 128 bytes; any order will do
};

__global__ void __launch_bounds__(256, 1) wide_rate_kernel(const __grid_constant__ RateArguments r) {
    auto& s = sm90::aligned_shared<RateShared>();
    auto* const to = reinterpret_cast<uint4*>(&s);
    for (int i = thread(); i < static_cast<int>(sizeof(RateShared) / 16); i += 256) {
        store_shared(to + i, load_global(reinterpret_cast<const uint4*>(r.in) + i));
    }
    fence_proxy_async();
    __syncthreads();
    float d[128];
    for (float& one : d) one = 0.0f;
#pragma unroll 1
    for (int turn = 0; turn < r.turns; ++turn) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            wgmma_ss<fp16, 256, false, false>(d, wgmma_descriptor(s.a[thread() / 128] + 2 * k, 16, 1024, Swizzle::k128),
                                              wgmma_descriptor(s.b + 2 * k, 16, 1024, Swizzle::k128), true);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    float sum = 0.0f;
    for (const float one : d) sum = __fadd_rn(sum, one);
    store_global(r.out + blockIdx.x * 256 + thread(), sum);
}

// -------------------------------------------------------------------------------------------------- whole kernels

constexpr int kSteps = 5;

template <class T>
void run_product(const Arguments& a, const Stream& stream) {
    const DeviceGuard guard(stream.device);
    auto* const left = reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(a.in));
    constexpr int kDepth = 64 * kSteps;
    const auto map = [](uint16_t* memory) {
        return make_tensor_map(memory, 64, kDepth, 2 * kDepth, 64, 64, Swizzle::k128);
    };
    const sm90::ProductParams p{map(left), map(left + 64 * kDepth), reinterpret_cast<float*>(a.out), kSteps};
    launch(sm90::product_kernel<T, sm90::ProductPart::kNone>, 1, sm90::kProductThreads, sm90::kProductBytes, stream, p);
}

void run_cluster(const Arguments& a, const Stream& stream) {
    const DeviceGuard guard(stream.device);
    auto* const memory = reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(a.in));
    const sm90::ClusterParams p{a.in, a.out, make_tensor_map(memory, 128, 8, 16, 64, 8, Swizzle::kNone)};
    launch_clusters(sm90::cluster_kernel<sm90::ClusterPart::kNone>, 2, 2, sm90::kClusterThreads, sm90::kClusterBytes,
                    stream, p);
}

}  // namespace

void launch_wide_rate(const RateArguments& arguments, int blocks, const Stream& stream) {
    const DeviceGuard guard(stream.device);
    launch(wide_rate_kernel, blocks, 256, sizeof(RateShared) + 1024, stream, arguments);
}

const std::vector<WideKernel>& wide_kernels() {
    constexpr Swizzle kPlain = Swizzle::kNone, k32 = Swizzle::k32, k64 = Swizzle::k64, k128 = Swizzle::k128;
    static const std::vector<WideKernel> all = {
        {"movmatrix", 32, 32, [](const Arguments& a, const Stream& s) { launch(movmatrix_kernel, 1, 32, 0, s, a); }},
        {"stmatrix", 128, 256,
         [](const Arguments& a, const Stream& s) { launch(stmatrix_kernel, 1, 32, 64 * 16, s, a); }},
        {"bulk copies", 256, 256,
         [](const Arguments& a, const Stream& s) { launch(bulk_kernel, 1, 32, sizeof(Copied) + 1024, s, a); }},
        tensor_kernel<kPlain, false>("tensor load plain"),
        tensor_kernel<k32, false>("tensor load 32"),
        tensor_kernel<k64, false>("tensor load 64"),
        tensor_kernel<k128, false>("tensor load 128"),
        tensor_kernel<kPlain, true>("tensor store plain"),
        tensor_kernel<k32, true>("tensor store 32"),
        tensor_kernel<k64, true>("tensor store 64"),
        tensor_kernel<k128, true>("tensor store 128"),
        // By the swizzle of shared memory, and which operands are transposed.
        product<bf16, 64, kPlain, false, false>("wgmma bf16 64 plain"),
        product<bf16, 64, kPlain, true, false>("wgmma bf16 64 plain a"),
        product<bf16, 64, kPlain, false, true>("wgmma bf16 64 plain b"),
        product<bf16, 64, k32, false, false>("wgmma bf16 64 swizzled 32"),
        product<bf16, 64, k32, true, true>("wgmma bf16 64 swizzled 32 a b"),
        product<bf16, 64, k64, false, false>("wgmma bf16 64 swizzled 64"),
        product<bf16, 64, k64, true, true>("wgmma bf16 64 swizzled 64 a b"),
        product<bf16, 64, k128, false, false>("wgmma bf16 64 swizzled 128"),
        product<bf16, 64, k128, true, false>("wgmma bf16 64 swizzled 128 a"),
        product<bf16, 128, k128, false, true>("wgmma bf16 128 swizzled 128 b"),
        product<fp16, 256, k128, true, true>("wgmma fp16 256 swizzled 128 a b"),
        product<bf16, 16, k128, false, false, true>("wgmma bf16 16 registers"),
        product<fp16, 16, k128, false, false, true>("wgmma fp16 16 registers"),
        product<bf16, 32, k128, false, false, true>("wgmma bf16 32 registers"),
        product<fp16, 32, k128, false, false, true>("wgmma fp16 32 registers"),
        product<bf16, 64, k128, false, false, true>("wgmma bf16 64 registers"),
        product<fp16, 64, k128, false, false, true>("wgmma fp16 64 registers"),
        product<bf16, 128, k128, false, false, true>("wgmma bf16 128 registers"),
        product<fp16, 128, k128, false, false, true>("wgmma fp16 128 registers"),
        product<bf16, 128, k128, false, true, true>("wgmma bf16 128 registers b"),
        product<bf16, 256, k128, false, false, true>("wgmma bf16 256 registers"),
        {"product bf16", 64 * 64 * kSteps, 64 * 64, run_product<bf16>},
        {"product fp16", 64 * 64 * kSteps, 64 * 64, run_product<fp16>},
        {"cluster", 512, 128, run_cluster},
    };
    return all;
}

}  // namespace qlk::conformance
