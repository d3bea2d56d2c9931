// CUDA as kernels see it on the emulator; stands in for csrc/cuda/device/device.cuh. The first half is general, with
// CUDA's own names; the second half has that file's helpers under the same names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define blockDim (::emu::block_dim())
#define gridDim (::emu::grid_dim())
constexpr int warpSize = 32;
using std::max;
using std::min;

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------------ barriers and warps

inline void __syncthreads(emu::Site s = emu::Site::here()) { emu::barrier(0, 0, s); }
inline int __syncthreads_count(int p, emu::Site s = emu::Site::here()) { return emu::barrier_count(p != 0, s); }
inline int __syncthreads_or(int p, emu::Site s = emu::Site::here()) { return emu::barrier_count(p != 0, s) > 0; }
inline int __syncthreads_and(int p, emu::Site s = emu::Site::here()) { return emu::barrier_count(p == 0, s) == 0; }

inline void __syncwarp(uint32_t mask = 0xffffffffu, emu::Site s = emu::Site::here()) {
    emu::warp_op<char>("__syncwarp", mask, char{}, [](uint32_t, auto&, auto& out) { out.fill(0); }, s, true);
}

namespace emu {
// from(lane) is the lane to read, or -1 for the lane's own value. Reading a lane outside the mask gives garbage.
template <class T, class F>
T shuffle(const char* name, uint32_t mask, T value, F from, Site s) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    struct Input {
        T value;
        int from;
    };
    const int source = from(static_cast<int>(lane()));
    return warp_op<T>(
        name, mask, Input{value, source},
        [](uint32_t present, auto& in, auto& out) {
            for (int i = 0; i < 32; ++i) {
                if (!(present >> i & 1)) continue;
                const int source = in[i].from < 0 ? i : in[i].from;
                if (present >> source & 1) {
                    out[i] = in[source].value;
                } else {
                    std::memset(static_cast<void*>(&out[i]), 0xff, sizeof(T));
                }
            }
        },
        s);
}
template <class F>
uint32_t vote(const char* name, uint32_t mask, bool predicate, F all, Site s) {
    return warp_op<uint32_t>(
        name, mask, predicate,
        [&](uint32_t present, auto& in, auto& out) {
            uint32_t ballot = 0;
            for (int i = 0; i < 32; ++i) {
                if (present >> i & 1 && in[i]) ballot |= 1u << i;
            }
            out.fill(all(ballot, present));
        },
        s);
}
template <class T, class F>
T reduce(const char* name, uint32_t mask, T value, F two, Site s) {
    return warp_op<T>(
        name, mask, value,
        [&](uint32_t present, auto& in, auto& out) {
            bool first = true;
            T result{};
            for (int i = 0; i < 32; ++i) {
                if (!(present >> i & 1)) continue;
                result = first ? in[i] : two(result, in[i]);
                first = false;
            }
            out.fill(result);
        },
        s);
}
}  // namespace emu

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emu::Site s = emu::Site::here()) {
    return emu::shuffle(
        "__shfl_sync", mask, value, [=](int i) { return (i & ~(width - 1)) | (source & (width - 1)); }, s);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, emu::Site s = emu::Site::here()) {
    return emu::shuffle(
        "__shfl_xor_sync", mask, value,
        [=](int i) { return ((i ^ bits) & ~(width - 1)) > (i & ~(width - 1)) ? -1 : i ^ bits; }, s);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, emu::Site s = emu::Site::here()) {
    return emu::shuffle(
        "__shfl_down_sync", mask, value,
        [=](int i) { return (i & (width - 1)) + static_cast<int>(by) < width ? i + static_cast<int>(by) : -1; }, s);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, emu::Site s = emu::Site::here()) {
    return emu::shuffle(
        "__shfl_up_sync", mask, value,
        [=](int i) { return (i & (width - 1)) >= static_cast<int>(by) ? i - static_cast<int>(by) : -1; }, s);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, emu::Site s = emu::Site::here()) {
    return emu::vote("__ballot_sync", mask, p != 0, [](uint32_t b, uint32_t) { return b; }, s);
}
inline int __any_sync(uint32_t mask, int p, emu::Site s = emu::Site::here()) {
    return emu::vote("__any_sync", mask, p != 0, [](uint32_t b, uint32_t) { return b != 0 ? 1u : 0u; }, s) != 0;
}
inline int __all_sync(uint32_t mask, int p, emu::Site s = emu::Site::here()) {
    return emu::vote("__all_sync", mask, p != 0, [](uint32_t b, uint32_t m) { return b == m ? 1u : 0u; }, s) != 0;
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t v, emu::Site s = emu::Site::here()) {
    return emu::reduce("__reduce_add_sync", mask, v, [](uint32_t a, uint32_t b) { return a + b; }, s);
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t v, emu::Site s = emu::Site::here()) {
    return emu::reduce("__reduce_max_sync", mask, v, [](uint32_t a, uint32_t b) { return std::max(a, b); }, s);
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t v, emu::Site s = emu::Site::here()) {
    return emu::reduce("__reduce_min_sync", mask, v, [](uint32_t a, uint32_t b) { return std::min(a, b); }, s);
}

// ---------------------------------------------------------------------------------------------- memory and atomics

namespace emu {
template <class T, class F>
T atomic(T* address, F update, Site s) {
    const auto* byte = reinterpret_cast<const unsigned char*>(address);
    const bool shared = byte >= shared_bytes() && byte < shared_bytes() + shared_size();
    access(shared ? Space::kShared : Space::kGlobal, Kind::kAtomic, address, sizeof(T), s);
    observed();
    const T before = *address;
    const T after = update(before);
    if (after != before) changed();
    *address = after;
    return before;
}
}  // namespace emu

template <class T>
T atomicAdd(T* address, T value, emu::Site s = emu::Site::here()) {
    return emu::atomic(address, [=](T old) { return static_cast<T>(old + value); }, s);
}
template <class T>
T atomicMax(T* address, T value, emu::Site s = emu::Site::here()) {
    return emu::atomic(address, [=](T old) { return std::max(old, value); }, s);
}
template <class T>
T atomicMin(T* address, T value, emu::Site s = emu::Site::here()) {
    return emu::atomic(address, [=](T old) { return std::min(old, value); }, s);
}
template <class T>
T atomicExch(T* address, T value, emu::Site s = emu::Site::here()) {
    return emu::atomic(address, [=](T) { return value; }, s);
}
template <class T>
T atomicCAS(T* address, T expected, T value, emu::Site s = emu::Site::here()) {
    return emu::atomic(address, [=](T old) { return old == expected ? value : old; }, s);
}
inline void __threadfence(emu::Site s = emu::Site::here()) { emu::fence(s); }

// -------------------------------------------------------------------------------------------------- arithmetic

inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __double2float_rn(double value) { return static_cast<float>(value); }
inline float __double2float_rd(double value) {
    const float nearest = static_cast<float>(value);
    return static_cast<double>(nearest) > value ? std::nextafterf(nearest, -std::numeric_limits<float>::infinity())
                                                : nearest;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __clz(uint32_t v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }

namespace emu {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// cvt.rn.bf16.f32: to nearest, ties to even; every NaN becomes 0x7fff.
inline BFloat16 round_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float widen(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | static_cast<uint32_t>(fraction) << 13);
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

// cvt.rn.f16.f32: to nearest, ties to even; beyond 65504 infinity; every NaN becomes 0x7fff.
inline Half round_half(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    // The distance between neighbours: 2^-24 for subnormals, else 2^-10 of the power of two below.
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const float units = std::ldexp(magnitude, 10 - exponent);         // exact: a power of two
    const auto whole = static_cast<uint32_t>(std::nearbyint(units));  // the default rounding is to nearest even
    // A carry out of the fraction goes into the exponent, as it should.
    const uint32_t biased = magnitude < 0x1p-14f ? 0 : static_cast<uint32_t>(exponent + 14) << 10;
    return {static_cast<uint16_t>(sign | (biased + whole))};
}

}  // namespace emu

// ------------------------------------------------------------------- the helpers of csrc/cuda/device/device.cuh

#include "device_guard.h"
#include "error.h"
#include "kernels.h"

#define QLK_DEVICE inline
#define QLK_DEVICE_CALL inline

namespace qlk::cuda {

using bf16 = emu::BFloat16;
using fp16 = emu::Half;

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return emu::widen(value); }
inline float to_float(fp16 value) { return emu::widen(value); }
template <class T>
T from_float(float value) {
    if constexpr (std::is_same_v<T, bf16>) {
        return emu::round_bf16(value);
    } else if constexpr (std::is_same_v<T, fp16>) {
        return emu::round_half(value);
    } else {
        return value;
    }
}

template <class T>
T from_bits(uint16_t bits) {
    return {bits};
}

constexpr int kArchitecture = 0;  // every kernel has code

template <class T>
T& shared_memory(emu::Site s = emu::Site::here()) {
    if (sizeof(T) > emu::shared_size()) {
        emu::fail(s, "shared memory of " + std::to_string(sizeof(T)) + " bytes, but the launch gave " +
                         std::to_string(emu::shared_size()));
    }
    return *reinterpret_cast<T*>(emu::shared_bytes());
}
template <class T>
T& opaque_shared_memory(emu::Site s = emu::Site::here()) {
    return shared_memory<T>(s);
}
inline unsigned opaque(unsigned value) { return value; }

[[noreturn]] inline void trap(emu::Site s = emu::Site::here()) { emu::fail(s, "a trap"); }

template <class T>
T load_shared(const T* address, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kShared, emu::Kind::kLoad, address, sizeof(T), s);
    return *address;
}
template <class T>
void store_shared(T* address, std::common_type_t<T> value, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kShared, emu::Kind::kStore, address, sizeof(T), s);
    *address = value;
}
template <class T>
T load_global(const T* address, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kLoad, address, sizeof(T), s);
    return *address;
}
template <class T>
void store_global(T* address, std::common_type_t<T> value, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kStore, address, sizeof(T), s);
    *address = value;
}

template <class T>
T load_changing(const T* address, emu::Site s = emu::Site::here()) {
    return load_global(address, s);
}

template <class T>
T load_exchanged(const T* address, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kLoad, address, sizeof(T), s);
    emu::exchange(emu::Kind::kLoad, address, s);
    return *address;
}
template <class T>
void store_exchanged(T* address, std::common_type_t<T> value, emu::Site s = emu::Site::here()) {
    emu::access(emu::Space::kGlobal, emu::Kind::kStore, address, sizeof(T), s);
    emu::exchange(emu::Kind::kStore, address, s);
    *address = value;
}

struct EmulatedDevices {
    static int current() {
        if (emu::options().driver_version < emu::kRuntimeVersion) {
            fail_driver(emu::options().driver_version, emu::kRuntimeVersion);
        }
        return emu::current_device();
    }
    static void set(int device) { emu::set_device(device); }
    static void restore(int device) { emu::set_device(device); }
    static bool has_context(int device) { return emu::any_current_context() || emu::has_context(device); }
};
using DeviceGuard = DeviceGuardOf<EmulatedDevices>;

inline int multiprocessors(int device) {
    emu::require_device(device);
    return emu::options().multiprocessors;
}
template <class Params>
int compiled_for(void (*)(Params), int device) {
    const DeviceGuard guard(device);
    return emu::options().architecture;
}
// The emulator doesn't know launch bounds: code for sm_90 counts as code for sm_90a.
template <class Params>
bool takes_threads(void (*)(Params), int, int device) {
    const DeviceGuard guard(device);
    return true;
}
inline size_t shared_limit(int device) {
    emu::require_device(device);
    return emu::options().max_shared_bytes;
}

inline void prefer_all_shared(const void* kernel, int device) {
    emu::require_current(device, "cudaFuncSetAttribute");
    emu::prefer_carveout(kernel, 100);
}

inline bool early_launches() { return emu::options().early_launches; }
using Start = emu::Start;

template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
            const Params& params, Start start = Start::kInOrder, unsigned cluster = 1) {
    QLK_CHECK(blocks > 0 && blocks <= 0x7fffffff, "a grid of " + std::to_string(blocks) + " blocks cannot be launched");
    emu::require_current(stream.device, "a launch");
    emu::launch(
        {static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, shared_bytes,
        [=] {
            kernel(params);
            emu::count_kernel(reinterpret_cast<const void*>(kernel));
        },
        start, cluster, emu::carveout(reinterpret_cast<const void*>(kernel)));
}

}  // namespace qlk::cuda
