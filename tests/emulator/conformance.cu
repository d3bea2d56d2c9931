#include "conformance.h"

#include <ptx.cuh>

namespace qlk::conformance {
namespace {

using namespace qlk::cuda;
constexpr uint32_t kAll = 0xffffffffu;

QLK_DEVICE int lane() { return static_cast<int>(threadIdx.x); }
QLK_DEVICE uint32_t bits(float value) { return __float_as_uint(value); }
QLK_DEVICE float real(uint32_t value) { return __uint_as_float(value); }

// Each operation maps a lane's words to a lane's words, and is executed by the whole warp.
struct Prmt {
    static constexpr int kIn = 3, kOut = 1;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) { out[0] = prmt(in[0], in[1], in[2] & 0xffff); }
};
struct Lop3 {
    static constexpr int kIn = 3, kOut = 4;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        out[0] = lop3<0xea>(in[0], in[1], in[2]);  // (a & b) | c
        out[1] = lop3<0x96>(in[0], in[1], in[2]);  // a ^ b ^ c
        out[2] = lop3<0xe8>(in[0], in[1], in[2]);  // majority
        out[3] = lop3<0xca>(in[0], in[1], in[2]);  // a ? b : c
    }
};
struct CvtBf16x2 {
    static constexpr int kIn = 2, kOut = 1;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) { out[0] = cvt_bf16x2(real(in[0]), real(in[1])); }
};
struct CvtFp16x2 {
    static constexpr int kIn = 2, kOut = 1;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) { out[0] = cvt_fp16x2(real(in[0]), real(in[1])); }
};
struct Widen {
    static constexpr int kIn = 1, kOut = 2;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        out[0] = bits(to_float(from_bits<bf16>(static_cast<uint16_t>(in[0]))));
        out[1] = bits(to_float(from_bits<fp16>(static_cast<uint16_t>(in[0]))));
    }
};
struct MulAdd {
    static constexpr int kIn = 3, kOut = 2;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        out[0] = bits(__fmul_rn(real(in[0]), real(in[1])));
        out[1] = bits(__fadd_rn(__fmul_rn(real(in[0]), real(in[1])), real(in[2])));
    }
};
struct RoundDown {
    static constexpr int kIn = 2, kOut = 1;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        out[0] = bits(__double2float_rd(__dmul_rn(static_cast<double>(real(in[0])), static_cast<double>(real(in[1])))));
    }
};
struct Shuffles {
    static constexpr int kIn = 2, kOut = 6;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        out[0] = __shfl_sync(kAll, in[0], static_cast<int>(in[1]));
        out[1] = __shfl_sync(kAll, in[0], static_cast<int>(in[1]), 16);
        out[2] = __shfl_xor_sync(kAll, in[0], 5);
        out[3] = __shfl_xor_sync(kAll, in[0], 20, 8);
        out[4] = __shfl_down_sync(kAll, in[0], 3);
        out[5] = __shfl_up_sync(kAll, in[0], 3, 8);
    }
};
struct Votes {
    static constexpr int kIn = 1, kOut = 4;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        out[0] = __ballot_sync(kAll, static_cast<int>(in[0] & 1));
        out[1] = static_cast<uint32_t>(__any_sync(kAll, (in[0] & 63) == 0));
        out[2] = static_cast<uint32_t>(__all_sync(kAll, (in[0] & 1023) != 0));
        // Half of the warp on its own.
        out[3] = lane() < 16 ? __ballot_sync(0xffffu, static_cast<int>(in[0] & 2)) : 7;
    }
};
struct GlobalMemory {
    static constexpr int kIn = 4, kOut = 8;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        st_global_16(out, ld_global_once_16(in));
        const uint2 low = ld_global_once_8(in), high = ld_global_once_8(in + 2);
        st_global_16(out + 4, make_uint4(high.x, high.y, low.x, low.y));
    }
};
struct AtomAdd {
    static constexpr int kIn = 6, kOut = 8;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        st_global_16(out, make_uint4(in[0], 0, in[1], in[2]));
        out[4] = atom_add_acquire(out, in[3]);
        const auto two = [](uint32_t low, uint32_t high) { return static_cast<unsigned long long>(high) << 32 | low; };
        const unsigned long long before =
            atom_add_acquire(reinterpret_cast<unsigned long long*>(out + 2), two(in[4], in[5]));
        out[5] = static_cast<uint32_t>(before);
        out[6] = static_cast<uint32_t>(before >> 32);
        out[7] = 0;
    }
};
// Each lane's 16 bytes are a row.
struct Ldmatrix {
    static constexpr int kIn = 4, kOut = 8;
    struct Shared {
        uint4 row[32];
    };
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        auto& shared = shared_memory<Shared>();
        store_shared(&shared.row[lane()], ld_global_once_16(in));
        __syncwarp();
        uint32_t plain[4], transposed[4];
        ldmatrix_x4<false>(plain, &shared.row[lane()]);
        ldmatrix_x4<true>(transposed, &shared.row[lane()]);
        for (int i = 0; i < 4; ++i) {
            out[i] = plain[i];
            out[4 + i] = transposed[i];
        }
    }
};
template <class T>
struct Mma {
    static constexpr int kIn = 10, kOut = 4;
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
        float d[4] = {real(in[6]), real(in[7]), real(in[8]), real(in[9])};
        mma_16x8x16<T>(d, a, in[4], in[5]);
        for (int i = 0; i < 4; ++i) out[i] = bits(d[i]);
    }
};
// Three groups of copies, the last one shorter; values come from the neighbouring lane.
struct AsyncCopies {
    static constexpr int kIn = 12, kOut = 12;
    struct Shared {
        uint4 word[32][3];
    };
    QLK_DEVICE static void go(const uint32_t* in, uint32_t* out) {
        auto& shared = shared_memory<Shared>();
        for (uint32_t i = 0; i < 3; ++i) {
            const uint32_t valid = i < 2 ? 16 : static_cast<uint32_t>(lane() % 5) * 4;
            if (i == 0) cp_async_16(&shared.word[lane()][i], in + 4 * i, valid);
            // Of these two a lane makes one.
            const bool even = lane() % 2 == 0;
            cp_async_16_if(i > 0 && even, &shared.word[lane()][i], in + 4 * i, valid);
            cp_async_16_if(i > 0 && !even, &shared.word[lane()][i], in + 4 * i, valid);
            cp_async_commit();
        }
        cp_async_wait<1>();
        __syncwarp();
        const int other = (lane() + 1) % 32;
        for (int i = 0; i < 2; ++i) st_global_16(out + 4 * i, load_shared(&shared.word[other][i]));
        cp_async_wait<0>();
        __syncwarp();
        st_global_16(out + 8, load_shared(&shared.word[other][2]));
    }
};

template <class Operation>
__global__ void __launch_bounds__(32) conformance_kernel(const __grid_constant__ Arguments a) {
    Operation::go(a.in + lane() * Operation::kIn, a.out + lane() * Operation::kOut);
}

template <class Operation>
Kernel kernel(const char* name) {
    return {name, Operation::kIn, Operation::kOut, [](const Arguments& arguments, const Stream& stream) {
                const DeviceGuard guard(stream.device);
                launch(conformance_kernel<Operation>, 1, 32, 32 * 48, stream, arguments);
            }};
}

// Eight independent chains of products.
__global__ void __launch_bounds__(kRateWarps * 32) rate_kernel(const __grid_constant__ RateArguments r) {
    const uint4 v = ld_global_once_16(r.in + 4 * (threadIdx.x % 32));
    const uint32_t a[4] = {v.x, v.y, v.z, v.w};
    float d[8][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < r.turns; ++turn) {
#pragma unroll
        for (int i = 0; i < 8; ++i) mma_16x8x16<fp16>(d[i], a, a[i % 4], a[(i + 1 + i / 4) % 4]);
    }
    float sum = 0.0f;
    for (int i = 0; i < 8; ++i)
        sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(d[i][0], d[i][1]), __fadd_rn(d[i][2], d[i][3])));
    store_global(r.out + blockIdx.x * (kRateWarps * 32) + threadIdx.x, sum);
}

__global__ void idle_kernel(const __grid_constant__ Arguments) {}

}  // namespace

void launch_rate(const RateArguments& arguments, int blocks, const Stream& stream) {
    const DeviceGuard guard(stream.device);
    launch(rate_kernel, blocks, kRateWarps * 32, 0, stream, arguments);
}

void launch_idle(int threads, size_t shared_bytes, const Stream& stream) {
    const DeviceGuard guard(stream.device);
    launch(idle_kernel, 1, threads, shared_bytes, stream, Arguments{});
}

const std::vector<Kernel>& kernels() {
    static const std::vector<Kernel> all = {
        kernel<Prmt>("prmt"),
        kernel<Lop3>("lop3"),
        kernel<CvtBf16x2>("cvt_bf16x2"),
        kernel<CvtFp16x2>("cvt_fp16x2"),
        kernel<Widen>("widen"),
        kernel<MulAdd>("mul_add"),
        kernel<RoundDown>("round_down"),
        kernel<Shuffles>("shuffles"),
        kernel<Votes>("votes"),
        kernel<GlobalMemory>("global_memory"),
        kernel<AtomAdd>("atom_add"),
        kernel<AsyncCopies>("async_copies"),
        kernel<Ldmatrix>("ldmatrix"),
        kernel<Mma<bf16>>("mma_bf16"),
        kernel<Mma<fp16>>("mma_fp16"),
    };
    return all;
}

}  // namespace qlk::conformance
