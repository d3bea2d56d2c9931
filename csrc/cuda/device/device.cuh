// What the kernels know of CUDA: the only file here that includes its headers. Kernels are written against this file
// and ptx.cuh, both included with angle brackets; the emulator (tests/emulator) puts files of the same names before
// them on the include path.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "error.h"
#include "kernels.h"

// Throws with file, line and expression when a CUDA call fails. The error is taken out of the runtime's memory, so
// that the next call starts clean.
#define QLK_CUDA(expression)                                                                                \
    do {                                                                                                    \
        const cudaError_t qlk_status = (expression);                                                        \
        if (qlk_status != cudaSuccess) {                                                                    \
            (void)cudaGetLastError();                                                                       \
            ::qlk::fail(__FILE__, __LINE__, #expression,                                                    \
                        std::string(cudaGetErrorName(qlk_status)) + ": " + cudaGetErrorString(qlk_status)); \
        }                                                                                                   \
    } while (0)

#define QLK_DEVICE __device__ __forceinline__
#define QLK_DEVICE_CALL static __device__ __noinline__

namespace qlk::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

QLK_DEVICE float to_float(float value) { return value; }
QLK_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
QLK_DEVICE float to_float(fp16 value) { return __half2float(value); }
// Round to nearest, ties to even.
template <class T>
QLK_DEVICE T from_float(float value);
template <>
QLK_DEVICE float from_float<float>(float value) {
    return value;
}
template <>
QLK_DEVICE bf16 from_float<bf16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
QLK_DEVICE fp16 from_float<fp16>(float value) {
    return __float2half_rn(value);
}

template <class T>
QLK_DEVICE T from_bits(uint16_t bits);
template <>
QLK_DEVICE bf16 from_bits<bf16>(uint16_t bits) {
    return __ushort_as_bfloat16(bits);
}
template <>
QLK_DEVICE fp16 from_bits<fp16>(uint16_t bits) {
    return __ushort_as_half(bits);
}

// The architecture that is compiled for, 90 for sm_90; of the host's part, 0.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;
#endif

// The block's dynamic shared memory: the only kind that kernels here use, laid out by a struct.
extern "C" __shared__ __align__(128) unsigned char qlk_shared_bytes[];
template <class T>
QLK_DEVICE T& shared_memory() {
    static_assert(alignof(T) <= 128);
    return *reinterpret_cast<T*>(qlk_shared_bytes);
}

// The same, within a loop that would otherwise have its address computed before it, into a register of every thread:
// there each access of a computed place costs an addition, where a uniform register comes for nothing.
template <class T>
QLK_DEVICE T& shared_memory_anew() {
    unsigned address;
    asm volatile("mov.u32 %0, qlk_shared_bytes;" : "=r"(address));
    return *reinterpret_cast<T*>(__cvta_shared_to_generic(address));
}

// A value of which the compiler does not know that it is the old one: what is made of it is made where it is needed,
// and not kept from before.
QLK_DEVICE unsigned anew(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Ends the launch with an error.
QLK_DEVICE void trap() { __trap(); }

// Plain accesses, named so that the emulator can check and count them.
template <class T>
QLK_DEVICE T load_shared(const T* address) {
    return *address;
}
template <class T>
QLK_DEVICE void store_shared(T* address, T value) {
    *address = value;
}
template <class T>
QLK_DEVICE T load_global(const T* address) {
    return __ldg(address);
}
template <class T>
QLK_DEVICE void store_global(T* address, T value) {
    *address = value;
}

// Of memory that the launch writes to, too: __ldg's path may hold what was there before.
template <class T>
QLK_DEVICE T load_changing(const T* address) {
    return *address;
}

// What blocks tell each other within a launch: past L1, where an older value may lie.
template <class T>
QLK_DEVICE T load_exchanged(const T* address) {
    return __ldcg(address);
}
template <class T>
QLK_DEVICE void store_exchanged(T* address, T value) {
    __stcg(address, value);
}

// Makes a device current while it lives, and the one before it again afterwards.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        QLK_CUDA(cudaGetDevice(&before_));
        if (device == before_) return;
        QLK_CUDA(cudaSetDevice(device));
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// An attribute of a device, asked for once.
template <cudaDeviceAttr kAttribute>
int device_attribute(int device) {
    static std::atomic<int> known[64] = {};
    std::atomic<int>* const slot = device >= 0 && device < 64 ? &known[device] : nullptr;
    if (slot && slot->load(std::memory_order_relaxed) > 0) return slot->load(std::memory_order_relaxed);
    int value = 0;
    QLK_CUDA(cudaDeviceGetAttribute(&value, kAttribute, device));
    if (slot) slot->store(value, std::memory_order_relaxed);
    return value;
}

inline int multiprocessors(int device) { return device_attribute<cudaDevAttrMultiProcessorCount>(device); }

// The architecture whose instructions a kernel has on a device, 80 for compute_80: not the card's own, where the driver
// has compiled it from PTX of an older one. Asked for once: it costs a microsecond.
template <class Params>
int compiled_for(void (*kernel)(Params), int device) {
    static std::atomic<int> known[64] = {};
    std::atomic<int>* const slot = device >= 0 && device < 64 ? &known[device] : nullptr;
    if (slot && slot->load(std::memory_order_relaxed) > 0) return slot->load(std::memory_order_relaxed);
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes = {};
    QLK_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    if (slot) slot->store(attributes.ptxVersion, std::memory_order_relaxed);
    return attributes.ptxVersion;
}

// The most shared memory that a block may ask for.
inline size_t shared_limit(int device) {
    return static_cast<size_t>(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device));
}

// Lets a kernel have more than 48 KiB of shared memory on the current device: all there is, and not as much as a launch
// needs, for it belongs to the kernel, and another thread may be about to launch it with more. Once for each, which
// saves half a microsecond a launch; two kernels that share a slot take turns in forgetting it.
inline void allow_all_shared(const void* kernel, int device) {
    static std::atomic<const void*> known[64][64] = {};
    const size_t at = reinterpret_cast<uintptr_t>(kernel) / 16 * 0x9e3779b1u % (size_t{1} << 32) >> 26;
    std::atomic<const void*>* const slot = device >= 0 && device < 64 ? &known[device][at] : nullptr;
    if (slot && slot->load(std::memory_order_acquire) == kernel) return;
    QLK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_limit(device))));
    if (slot) slot->store(kernel, std::memory_order_release);
}

// Whether the driver lets launches begin early, in graphs, too: since CUDA 12.4.
inline bool early_launches() {
    static const bool able = [] {
        int version = 0;
        QLK_CUDA(cudaDriverGetVersion(&version));
        return version >= 12040;
    }();
    return able;
}

// Where a launch begins. kEarly: perhaps while the one before it in the stream, which was launched as kFollowed, still
// runs (programmatic dependent launch); each of its threads calls griddep_wait before it writes to global memory, reads
// what the one before writes, or ends.
enum class Start { kInOrder, kFollowed, kEarly };

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(params) and throws when it cannot start. threads must be
// what the kernel's __launch_bounds__ say.
template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
            const Params& params, Start start = Start::kInOrder) {
    QLK_CHECK(blocks > 0 && blocks <= 0x7fffffff, "a grid of " + std::to_string(blocks) + " blocks cannot be launched");
    if (shared_bytes > 48 * 1024) allow_all_shared(reinterpret_cast<const void*>(kernel), stream.device);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    cudaLaunchAttribute early = {};
    if (start == Start::kEarly) {
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &early;
        config.numAttrs = 1;
    }
    QLK_CUDA(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace qlk::cuda
