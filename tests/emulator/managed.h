// Managed memory, streams beside the caller's and events, for tests of what is paged when.
//
// A page is on the device or on the host. A kernel's access to one that is on the host is a fault, as on a card: it
// moves the page and is counted, or, where options().forbid_faults says so, is an error. What is put into a side stream
// happens as early or as late as the waits permit: options().landing.
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

void* allocate_managed(size_t bytes);
void free_managed(void* memory);
void prefetch(const void* memory, size_t bytes, bool to_device);
// An access of a kernel; called only where there is managed memory.
void touch(const void* address, size_t bytes, Site site);
extern thread_local bool any_managed;

// A queue of operations. Null stands for the caller's stream, where everything happens at once.
struct Queue;
Queue* make_queue();
void destroy_queue(Queue* queue);
void enqueue(Queue* queue, std::function<void()> operation);
void drain(Queue* queue);

// The place of an event in a queue.
struct Mark {
    Queue* queue = nullptr;
    uint64_t position = 0;
};
Mark mark(Queue* queue);
void hold(Queue* queue, Mark until);

}  // namespace emu
