// The parts of CUDA's memory and streams that paging needs. The emulator (tests/emulator) has a twin of this file,
// which tracks whether each page is on the device or on the host.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

// Whether device and host can use managed memory at the same time, with pages that move one by one. They cannot on
// Windows, under WSL and on some laptops.
inline bool pages_managed(int device) {
    int concurrent = 0;
    QLK_CUDA(cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, device));
    return concurrent != 0;
}

inline void* allocate_managed(size_t bytes, int device) {
    const DeviceGuard guard(device);
    void* memory = nullptr;
    QLK_CUDA(cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal));
    return memory;
}
inline void* allocate_pinned(size_t bytes, int device) {
    const DeviceGuard guard(device);
    void* memory = nullptr;
    QLK_CUDA(cudaMallocHost(&memory, bytes));
    return memory;
}
inline void* allocate_device(size_t bytes, int device) {
    const DeviceGuard guard(device);
    void* memory = nullptr;
    QLK_CUDA(cudaMalloc(&memory, bytes));
    return memory;
}
// For destructors, so errors are dropped. All of these wait for the device.
inline void free_managed(void* memory) { (void)cudaFree(memory); }
inline void free_device(void* memory) { (void)cudaFree(memory); }
inline void free_pinned(void* memory) { (void)cudaFreeHost(memory); }

inline size_t free_memory(int device) {
    const DeviceGuard guard(device);
    size_t free = 0, total = 0;
    QLK_CUDA(cudaMemGetInfo(&free, &total));
    return free;
}

// Moves pages of managed memory, in stream order.
inline void prefetch(const void* memory, size_t bytes, bool to_device, const Stream& stream) {
#if CUDART_VERSION >= 13000
    cudaMemLocation where = {};
    where.type = to_device ? cudaMemLocationTypeDevice : cudaMemLocationTypeHost;
    where.id = to_device ? stream.device : 0;
    QLK_CUDA(cudaMemPrefetchAsync(memory, bytes, where, 0, static_cast<cudaStream_t>(stream.handle)));
#else
    QLK_CUDA(cudaMemPrefetchAsync(memory, bytes, to_device ? stream.device : cudaCpuDeviceId,
                                  static_cast<cudaStream_t>(stream.handle)));
#endif
}

// Marks pages that should stay on the device, and leave it last.
inline void prefer_device(const void* memory, size_t bytes, int device) {
#if CUDART_VERSION >= 13000
    cudaMemLocation where = {};
    where.type = cudaMemLocationTypeDevice;
    where.id = device;
    QLK_CUDA(cudaMemAdvise(memory, bytes, cudaMemAdviseSetPreferredLocation, where));
#else
    QLK_CUDA(cudaMemAdvise(memory, bytes, cudaMemAdviseSetPreferredLocation, device));
#endif
}

inline void copy(void* to, const void* from, size_t bytes, const Stream& stream) {
    QLK_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream.handle)));
}
inline void fill_zero(void* memory, size_t bytes, const Stream& stream) {
    QLK_CUDA(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream.handle)));
}
inline void synchronize(const Stream& stream) {
    QLK_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream.handle)));
}
inline bool capturing(const Stream& stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    QLK_CUDA(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status));
    return status != cudaStreamCaptureStatusNone;
}

// A stream besides the caller's.
class SideStream {
  public:
    explicit SideStream(int device) : device_(device) {
        const DeviceGuard guard(device);
        QLK_CUDA(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking));
    }
    ~SideStream() { (void)cudaStreamDestroy(handle_); }
    SideStream(const SideStream&) = delete;
    SideStream& operator=(const SideStream&) = delete;
    Stream get() const { return {device_, handle_}; }

  private:
    int device_;
    cudaStream_t handle_ = nullptr;
};

// A point in a stream. Until it has been recorded, waiting for it does nothing.
class Event {
  public:
    explicit Event(int device) {
        const DeviceGuard guard(device);
        QLK_CUDA(cudaEventCreateWithFlags(&handle_, cudaEventDisableTiming));
    }
    ~Event() { (void)cudaEventDestroy(handle_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(const Stream& stream) { QLK_CUDA(cudaEventRecord(handle_, static_cast<cudaStream_t>(stream.handle))); }
    // Later work in the stream waits for everything before the last record.
    void hold(const Stream& stream) {
        QLK_CUDA(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle), handle_, 0));
    }

  private:
    cudaEvent_t handle_ = nullptr;
};

}  // namespace qlk::cuda
