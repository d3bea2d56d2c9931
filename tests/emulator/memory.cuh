// Twin of csrc/cuda/device/memory.cuh: managed memory whose pages are on the device or on the host, and streams that
// lag.
#pragma once

#include <cstdlib>
#include <cstring>
#include <device.cuh>

#include "managed.h"

namespace qlk::cuda {

inline bool pages_managed(int) { return emu::options().managed; }

inline void* allocate_managed(size_t bytes, int) { return emu::allocate_managed(bytes); }
inline void free_managed(void* memory) { emu::free_managed(memory); }
inline void* allocate_plain(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    return memory;
}
inline void* allocate_pinned(size_t bytes, int) {
    emu::refuse_in_capture();
    return allocate_plain(bytes);
}
inline void* allocate_device(size_t bytes, int) { return emu::allocate_device(bytes); }
inline void free_pinned(void* memory) { std::free(memory); }
inline void free_device(void* memory) { emu::free_device(memory); }
inline size_t free_memory(int) { return emu::options().free_bytes; }

inline emu::Queue* queue_of(const Stream& stream) { return static_cast<emu::Queue*>(stream.handle); }

inline void prefetch(const void* memory, size_t bytes, bool to_device, const Stream& stream) {
    emu::enqueue(queue_of(stream), [=] { emu::prefetch(memory, bytes, to_device); });
}
inline void prefer_device(const void*, size_t, int) {}
inline void copy(void* to, const void* from, size_t bytes, const Stream& stream) {
    emu::enqueue(queue_of(stream), [=] { emu::copy(to, from, bytes); });
}
inline void fill_zero(void* memory, size_t bytes, const Stream& stream) {
    emu::enqueue(queue_of(stream), [=] { std::memset(memory, 0, bytes); });
}
inline void synchronize(const Stream& stream) { emu::drain(queue_of(stream)); }
inline bool capturing(const Stream&) { return emu::options().capturing; }

class SideStream {
  public:
    explicit SideStream(int device) : device_(device), queue_(emu::make_queue()) {}
    ~SideStream() { emu::destroy_queue(queue_); }
    SideStream(const SideStream&) = delete;
    SideStream& operator=(const SideStream&) = delete;
    Stream get() const { return {device_, queue_}; }

  private:
    int device_;
    emu::Queue* queue_;
};

class Event {
  public:
    explicit Event(int) {}
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(const Stream& stream) { mark_ = emu::mark(queue_of(stream)); }
    void hold(const Stream& stream) { emu::hold(queue_of(stream), mark_); }

  private:
    emu::Mark mark_;
};

}  // namespace qlk::cuda
