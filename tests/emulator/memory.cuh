// Twin of csrc/cuda/device/memory.cuh: managed memory whose pages are on the device or on the host, and streams that
// lag.
#pragma once

#include <cstdlib>
#include <cstring>
#include <device.cuh>

#include "managed.h"

namespace qlk::cuda {

inline bool pages_managed(int device) {
    emu::require_device(device);
    return emu::options().managed;
}

inline void* allocate_managed(size_t bytes, int device) {
    const DeviceGuard guard(device);
    return emu::allocate_managed(bytes);
}
inline void free_managed(void* memory) { emu::free_managed(memory); }
inline void* allocate_plain(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    return memory;
}
inline void* allocate_pinned(size_t bytes, int device) {
    const DeviceGuard guard(device);
    emu::refuse_in_capture();
    emu::use_current_device();
    return allocate_plain(bytes);
}
inline void* allocate_device(size_t bytes, int device) {
    const DeviceGuard guard(device);
    return emu::allocate_device(bytes);
}
inline void free_pinned(void* memory) {
    emu::use_current_device();
    std::free(memory);
}
inline void free_device(void* memory) { emu::free_device(memory); }
inline size_t free_memory(int device) {
    const DeviceGuard guard(device);
    emu::use_current_device();
    return emu::options().free_bytes;
}

// The stream's queue, for a call that a card takes only while the stream's device is current, unless `anywhere`.
inline emu::Queue* queue_of(const Stream& stream, const char* what, bool anywhere = false) {
    auto* const queue = static_cast<emu::Queue*>(stream.handle);
    emu::require_stream(stream.device, queue, what, anywhere);
    return queue;
}

inline void prefetch(const void* memory, size_t bytes, bool to_device, const Stream& stream) {
    emu::enqueue(queue_of(stream, "a prefetch"),
                 [=, device = stream.device] { emu::prefetch(memory, bytes, to_device, device); });
}
inline void prefer_device(const void*, size_t, int device) {
    emu::require_device(device);
    emu::use_current_device();
}
inline void copy(void* to, const void* from, size_t bytes, const Stream& stream) {
    emu::enqueue(queue_of(stream, "a copy", true), [=] { emu::copy(to, from, bytes); });
}
inline void fill_zero(void* memory, size_t bytes, const Stream& stream) {
    emu::enqueue(queue_of(stream, "a memset"), [=, device = stream.device] { emu::fill_zero(memory, bytes, device); });
}
inline void synchronize(const Stream& stream) { emu::drain(queue_of(stream, "waiting", true)); }
inline bool capturing(const Stream& stream) {
    queue_of(stream, "a question about capture", true);
    return emu::options().capturing;
}

class SideStream {
  public:
    explicit SideStream(int device) : device_(device) {
        const DeviceGuard guard(device);
        queue_ = emu::make_queue();
    }
    ~SideStream() { emu::destroy_queue(queue_); }
    SideStream(const SideStream&) = delete;
    SideStream& operator=(const SideStream&) = delete;
    Stream get() const { return {device_, queue_}; }

  private:
    int device_;
    emu::Queue* queue_ = nullptr;
};

class Event {
  public:
    explicit Event(int device) : device_(device) {
        const DeviceGuard guard(device);
        emu::use_current_device();
    }
    ~Event() { emu::use_current_device(); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(const Stream& stream) {
        if (stream.device != device_) throw emu::Error("an event is recorded in a stream of another device");
        mark_ = emu::mark(queue_of(stream, "an event"));
    }
    void hold(const Stream& stream) { emu::hold(queue_of(stream, "waiting for an event", true), mark_); }

  private:
    int device_;
    emu::Mark mark_;
};

}  // namespace qlk::cuda
