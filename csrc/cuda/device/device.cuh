// What kernels see of CUDA; the only file here that includes its headers, besides ptx_sm90.cuh. Kernels are written
// against this file and ptx.cuh, included with angle brackets: the emulator (tests/emulator) has files of the same
// names, which come first on its include path.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "device_guard.h"
#include "error.h"
#include "kernels.h"

namespace qlk::cuda {

// Throws for a CUDA call that failed. Clears the runtime's error, so that the next call starts clean.
[[noreturn]] inline void fail_call(cudaError_t status, const char* file, int line, const char* expression) {
    (void)cudaGetLastError();
    if (status == cudaErrorInsufficientDriver) {
        int driver = 0, runtime = CUDART_VERSION;
        (void)cudaDriverGetVersion(&driver);
        (void)cudaRuntimeGetVersion(&runtime);
        fail_driver(driver, runtime);
    }
    fail(file, line, expression, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

}  // namespace qlk::cuda

// Throws when a CUDA call fails.
#define QLK_CUDA(expression)                                                                                \
    do {                                                                                                    \
        const cudaError_t qlk_status = (expression);                                                        \
        if (qlk_status != cudaSuccess) ::qlk::cuda::fail_call(qlk_status, __FILE__, __LINE__, #expression); \
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

// The architecture being compiled for, 90 for sm_90; 0 in host code.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;
#endif

// The block's dynamic shared memory, laid out by a struct. Kernels here use no other kind. Swizzle patterns start at
// multiples of 1024.
extern "C" __shared__ __align__(1024) unsigned char qlk_shared_bytes[];
template <class T>
QLK_DEVICE T& shared_memory() {
    static_assert(alignof(T) <= 1024);
    return *reinterpret_cast<T*>(qlk_shared_bytes);
}

// The same, for use in a loop. The compiler would otherwise compute the address before the loop, into a register of
// every thread, and each access at a computed offset would cost an addition; from a uniform register it costs nothing.
template <class T>
QLK_DEVICE T& opaque_shared_memory() {
    unsigned address;
    asm volatile("mov.u32 %0, qlk_shared_bytes;" : "=r"(address));
    return *reinterpret_cast<T*>(__cvta_shared_to_generic(address));
}

// The same value, hidden from the optimizer: what is computed from it is computed where it is needed, not kept in
// registers from before.
QLK_DEVICE unsigned opaque(unsigned value) {
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

// For memory that the launch itself writes: __ldg's path may hold older contents.
template <class T>
QLK_DEVICE T load_changing(const T* address) {
    return *address;
}

// For what blocks exchange within a launch. These bypass L1, which may hold an older value.
template <class T>
QLK_DEVICE T load_exchanged(const T* address) {
    return __ldcg(address);
}
template <class T>
QLK_DEVICE void store_exchanged(T* address, T value) {
    __stcg(address, value);
}

struct CudaDevices {
    static int current() {
        int device = 0;
        QLK_CUDA(cudaGetDevice(&device));
        return device;
    }
    static void set(int device) { QLK_CUDA(cudaSetDevice(device)); }
    static void restore(int device) { (void)cudaSetDevice(device); }

    // Whether a context is current in this thread, or the device has its primary one. Only the driver tells, and it is
    // not linked: the runtime has loaded it by now, and asking the runtime might itself create a context.
    static bool has_context(int device) {
        struct Driver {
            int (*current)(void**) = nullptr;
            int (*state)(int, unsigned*, int*) = nullptr;
        };
        static const Driver driver = [] {
            Driver found;
            if (void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD)) {
                found.current = reinterpret_cast<int (*)(void**)>(dlsym(library, "cuCtxGetCurrent"));
                found.state =
                    reinterpret_cast<int (*)(int, unsigned*, int*)>(dlsym(library, "cuDevicePrimaryCtxGetState"));
            }
            return found;
        }();
        if (!driver.current || !driver.state) return true;
        void* context = nullptr;
        if (driver.current(&context) == 0 && context) return true;
        unsigned flags = 0;
        int active = 0;
        return driver.state(device, &flags, &active) == 0 && active != 0;
    }
};

// Makes a device current for its lifetime, then restores the previous one.
using DeviceGuard = DeviceGuardOf<CudaDevices>;

// An attribute of a device, queried once.
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

// The architecture that a kernel was compiled for, 80 for compute_80. That is not the card's own if the driver compiled
// it from PTX of an older one. Queried once: it costs a microsecond.
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

// Whether a kernel was compiled for blocks of that many threads, by its __launch_bounds__. Queried once for each device
// and type of parameters: it costs a microsecond.
template <class Params>
bool takes_threads(void (*kernel)(Params), int threads, int device) {
    static std::atomic<int> known[64] = {};
    std::atomic<int>* const slot = device >= 0 && device < 64 ? &known[device] : nullptr;
    if (slot && slot->load(std::memory_order_relaxed) > 0) return slot->load(std::memory_order_relaxed) >= threads;
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes = {};
    QLK_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    if (slot) slot->store(attributes.maxThreadsPerBlock, std::memory_order_relaxed);
    return attributes.maxThreadsPerBlock >= threads;
}

// The most shared memory that a block may ask for, bytes.
inline size_t shared_limit(int device) {
    return static_cast<size_t>(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device));
}

// Sets an attribute of a kernel on the current device, always to the same value. Set once for each kernel, which saves
// half a microsecond a launch; two kernels that share a slot evict each other.
template <cudaFuncAttribute kAttribute>
void set_once(const void* kernel, int device, int value) {
    static std::atomic<const void*> known[64][64] = {};
    const size_t at = reinterpret_cast<uintptr_t>(kernel) / 16 * 0x9e3779b1u % (size_t{1} << 32) >> 26;
    std::atomic<const void*>* const slot = device >= 0 && device < 64 ? &known[device][at] : nullptr;
    if (slot && slot->load(std::memory_order_acquire) == kernel) return;
    QLK_CUDA(cudaFuncSetAttribute(kernel, kAttribute, value));
    if (slot) slot->store(kernel, std::memory_order_release);
}

// Lets a kernel have more than 48 KiB of shared memory. It asks for all there is, not for what one launch needs: the
// setting belongs to the kernel, and another thread may be about to launch it with more.
inline void allow_all_shared(const void* kernel, int device) {
    set_once<cudaFuncAttributeMaxDynamicSharedMemorySize>(kernel, device, static_cast<int>(shared_limit(device)));
}

// Makes a multiprocessor give as much of its L1 to shared memory as it can while this kernel runs on it. Blocks of
// kernels that ask for different carve-outs are never on a multiprocessor together.
inline void prefer_all_shared(const void* kernel, int device) {
    set_once<cudaFuncAttributePreferredSharedMemoryCarveout>(kernel, device, cudaSharedmemCarveoutMaxShared);
}

// Whether the driver supports early launches, in graphs too: since CUDA 12.4.
inline bool early_launches() {
    static const bool able = [] {
        int version = 0;
        QLK_CUDA(cudaDriverGetVersion(&version));
        return version >= 12040;
    }();
    return able;
}

// When a launch may start (programmatic dependent launch). kEarly: possibly while the previous launch in the stream, a
// kFollowed one, is still running. Each thread of a kEarly launch has to call griddep_wait before it writes to global
// memory, reads what the previous launch writes, or ends.
enum class Start { kInOrder, kFollowed, kEarly };

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(params); throws when it cannot start. threads must match
// the kernel's __launch_bounds__. cluster: this many consecutive blocks run at the same time, up to 8; from sm_90 on.
template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
            const Params& params, Start start = Start::kInOrder, unsigned cluster = 1) {
    QLK_CHECK(blocks > 0 && blocks <= 0x7fffffff, "a grid of " + std::to_string(blocks) + " blocks cannot be launched");
    if (shared_bytes > 48 * 1024) allow_all_shared(reinterpret_cast<const void*>(kernel), stream.device);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (start == Start::kEarly) {
        cudaLaunchAttribute& early = attributes[config.numAttrs++];
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute& size = attributes[config.numAttrs++];
        size.id = cudaLaunchAttributeClusterDimension;
        size.val.clusterDim = {cluster, 1, 1};
    }
    QLK_CUDA(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace qlk::cuda
