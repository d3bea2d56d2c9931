// Managed memory, side streams and events, for tests of what is paged when.
//
// A page is on the device or on the host. A kernel's access to a page on the host is a fault, as on a card: it moves
// the page and is counted, or is an error with options().forbid_faults. Work in a side stream happens as early or as
// late as the waits permit (options().landing). The caller's stream does everything at once. So that a side stream
// cannot be right by chance, moving or overwriting memory that a kernel has used is an error there, unless an event
// after that kernel has been waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "emulator.h"

namespace emu {

struct Paging {
    uint64_t to_device = 0, to_host = 0;  // pages moved by a prefetch
    uint64_t prefetches = 0;
    uint64_t faults = 0;                       // pages moved by an access
    uint64_t resident = 0, resident_peak = 0;  // pages on the device
    std::string json() const;
};
Paging paging();
void reset_paging();  // the counts; pages stay where they are

// While it lives, kernels run on this device: it is an error if they use another's memory.
class OnDevice {
  public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_;
};

// Throws while the caller's stream is being captured: then no memory can be allocated.
void refuse_in_capture();

// Memory belongs to the device that is current when it is allocated; no other device may use it.
void* allocate_managed(size_t bytes);
void free_managed(void* memory);
// Plain device memory; only its use by kernels is tracked.
void* allocate_device(size_t bytes);
void free_device(void* memory);
void copy(void* to, const void* from, size_t bytes);
void fill_zero(void* memory, size_t bytes, int device);
void note_launch();
// device: that of the stream in which it happens.
void prefetch(const void* memory, size_t bytes, bool to_device, int device);
// A kernel's access. Only called if there is managed memory.
void touch(const void* address, size_t bytes, Site site);
extern thread_local bool any_managed;

// A queue of operations. Null is the caller's stream, where everything happens at once.
struct Queue;
Queue* make_queue();  // on the current device
// Throws where a card would refuse work in a stream, or take it for another stream: a stream belongs to a device, and
// null is the current device's. anywhere: for calls that a card takes while another device is current.
void require_stream(int device, const Queue* queue, const char* what, bool anywhere = false);
void destroy_queue(Queue* queue);
void enqueue(Queue* queue, std::function<void()> operation);
void drain(Queue* queue);

// An event's position in a queue.
struct Mark {
    Queue* queue = nullptr;
    uint64_t position = 0;
    uint64_t launches = 0;  // in the caller's stream, which has no queue
};
Mark mark(Queue* queue);
void hold(Queue* queue, Mark until);

}  // namespace emu
