#include "managed.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <new>
#include <random>
#include <set>
#include <vector>

namespace emu {

struct Queue {
    int device = current_device();
    std::deque<std::function<void()>> operations;
    uint64_t done = 0;
    uint64_t launches = 0;  // in the caller's stream that it has waited for
};

namespace {

struct Range {
    size_t bytes, page_bytes, asked;  // bytes: whole pages
    bool managed;
    int device = current_device();
    std::vector<bool> on_device;
    std::vector<uint64_t> used;  // the last launch that used each page

    Range(size_t size, size_t page, size_t wanted, bool moves)
        : bytes(size),
          page_bytes(page),
          asked(wanted),
          managed(moves),
          on_device(size / page, !moves),
          used(size / page, 0) {}
};

thread_local uint64_t launches = 0;
thread_local int running_on = 0;              // the device of the kernel that is running
thread_local const Queue* running = nullptr;  // the queue whose operation is running; null: the caller's stream

// By the address of their first byte, which is page-aligned.
std::map<uintptr_t, Range>& ranges() {
    static thread_local std::map<uintptr_t, Range> all;
    return all;
}
Paging& counts() {
    static thread_local Paging all;
    return all;
}
std::set<Queue*>& queues() {
    static thread_local std::set<Queue*> all;
    return all;
}

void require_own(const Range& range, int device, const std::string& what) {
    if (range.device == device) return;
    throw Error(what + " on device " + std::to_string(device) + " of memory that belongs to device " +
                std::to_string(range.device));
}

std::pair<const uintptr_t, Range>* range_of(uintptr_t address) {
    auto after = ranges().upper_bound(address);
    if (after == ranges().begin()) return nullptr;
    --after;
    return address < after->first + after->second.bytes ? &*after : nullptr;
}

// Bytes that lie beyond the end of the memory in which they begin.
size_t beyond(const std::pair<const uintptr_t, Range>& range, uintptr_t address, size_t bytes) {
    const uintptr_t end = address + bytes, last = range.first + range.second.asked;
    return end > last ? end - last : 0;
}

void require_within(const std::pair<const uintptr_t, Range>& range, uintptr_t address, size_t bytes,
                    const std::string& what) {
    if (const size_t more = beyond(range, address, bytes)) {
        throw Error(what + " of " + std::to_string(bytes) + " bytes that end " + std::to_string(more) +
                    " beyond memory of " + std::to_string(range.second.asked));
    }
}

bool move(Range& range, size_t page, bool to_device) {
    if (range.on_device[page] == to_device) return false;
    range.on_device[page] = to_device;
    Paging& all = counts();
    all.resident += to_device ? 1 : -1;
    all.resident_peak = std::max(all.resident_peak, all.resident);
    return true;
}

void run_until(Queue* queue, uint64_t position) {
    while (queue->done < position && !queue->operations.empty()) {
        const auto operation = std::move(queue->operations.front());
        queue->operations.pop_front();
        ++queue->done;
        const Queue* const before = running;
        running = queue;
        try {
            operation();
        } catch (...) {
            // Later operations are dropped, as after an error on a card.
            queue->done += queue->operations.size();
            queue->operations.clear();
            running = before;
            throw;
        }
        running = before;
    }
}

void* allocate(size_t bytes, bool managed) {
    refuse_in_capture();
    use_current_device();
    const size_t page = options().page_bytes, pages = std::max<size_t>((bytes + page - 1) / page, 1);
    void* memory = nullptr;
    if (posix_memalign(&memory, page, pages * page) != 0) throw std::bad_alloc();
    std::memset(memory, 0xff, pages * page);
    ranges().emplace(reinterpret_cast<uintptr_t>(memory), Range(pages * page, page, bytes, managed));
    any_managed = true;
    return memory;
}

void release(void* memory) {
    use_current_device();
    const auto found = ranges().find(reinterpret_cast<uintptr_t>(memory));
    if (found == ranges().end()) throw Error("memory is freed that was not allocated here");
    const Range& range = found->second;
    if (range.managed) counts().resident -= std::count(range.on_device.begin(), range.on_device.end(), true);
    ranges().erase(found);
    any_managed = !ranges().empty();
    std::free(memory);
}

// Throws unless a side stream's operation comes after the kernels that have used the pages.
void after_kernels(const Range& range, size_t first, size_t end) {
    if (!running) return;
    for (size_t page = first; page < end; ++page) {
        if (range.used[page] <= running->launches) continue;
        throw Error("a side stream moves page " + std::to_string(page) + " of memory that launch " +
                    std::to_string(range.used[page]) + " uses, and has waited only for the first " +
                    std::to_string(running->launches));
    }
}

}  // namespace

thread_local bool any_managed = false;

OnDevice::OnDevice(int device) : before_(running_on) { running_on = device; }
OnDevice::~OnDevice() { running_on = before_; }

void refuse_in_capture() {
    if (!options().capturing) return;
    throw Error("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing");
}

Paging paging() { return counts(); }
void reset_paging() {
    const uint64_t resident = counts().resident;
    counts() = {};
    counts().resident = counts().resident_peak = resident;
}

std::string Paging::json() const {
    const auto field = [](const char* name, uint64_t value) {
        return "\"" + std::string(name) + "\": " + std::to_string(value);
    };
    return "{" + field("to_device", to_device) + ", " + field("to_host", to_host) + ", " +
           field("prefetches", prefetches) + ", " + field("faults", faults) + ", " + field("resident", resident) +
           ", " + field("resident_peak", resident_peak) + "}";
}

void* allocate_managed(size_t bytes) {
    if (bytes > options().managed_limit) {
        throw Error("cudaErrorMemoryAllocation: out of memory (" + std::to_string(bytes) + " bytes)");
    }
    return allocate(bytes, true);
}
void free_managed(void* memory) { release(memory); }
void* allocate_device(size_t bytes) { return allocate(bytes, false); }
void free_device(void* memory) { release(memory); }
void note_launch() { ++launches; }

void copy(void* to, const void* from, size_t bytes) {
    for (const void* memory : {const_cast<const void*>(to), from}) {
        const auto address = reinterpret_cast<uintptr_t>(memory);
        const auto* const range = range_of(address);
        if (!range || bytes == 0) continue;
        require_within(*range, address, bytes, "a copy");
        const size_t size = range->second.page_bytes;
        after_kernels(range->second, (address - range->first) / size,
                      (address - range->first + bytes + size - 1) / size);
    }
    std::memcpy(to, from, bytes);
}

void fill_zero(void* memory, size_t bytes, int device) {
    if (const auto* const range = range_of(reinterpret_cast<uintptr_t>(memory))) {
        require_own(range->second, device, "a memset");
        require_within(*range, reinterpret_cast<uintptr_t>(memory), bytes, "a memset");
    }
    std::memset(memory, 0, bytes);
}

void prefetch(const void* memory, size_t bytes, bool to_device, int device) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    auto* const range = range_of(address);
    if (bytes == 0 || !range || address + bytes > range->first + range->second.bytes) {
        throw Error("cudaErrorInvalidValue: a prefetch of " + std::to_string(bytes) + " bytes outside managed memory");
    }
    require_own(range->second, device, "a prefetch");
    Paging& all = counts();
    ++all.prefetches;
    const size_t size = range->second.page_bytes;
    const size_t first = (address - range->first) / size, end = (address - range->first + bytes + size - 1) / size;
    if (!to_device) after_kernels(range->second, first, end);
    for (size_t page = first; page < end; ++page) {
        if (move(range->second, page, to_device)) ++(to_device ? all.to_device : all.to_host);
    }
}

void touch(const void* address, size_t bytes, Site site) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    auto* const range = range_of(at);
    if (!range) return;
    if (range->second.device != running_on) {
        fail(site, "an access on device " + std::to_string(running_on) + " to memory that belongs to device " +
                       std::to_string(range->second.device));
    }
    if (const size_t more = beyond(*range, at, bytes)) {
        fail(site, "an access that ends " + std::to_string(more) + " bytes beyond memory of " +
                       std::to_string(range->second.asked));
    }
    const size_t size = range->second.page_bytes;
    for (size_t page = (at - range->first) / size; page <= (at - range->first + bytes - 1) / size; ++page) {
        range->second.used[page] = launches;
        if (range->second.on_device[page]) continue;
        if (options().forbid_faults) {
            fail(site, "an access to page " + std::to_string(page) + " of managed memory, which is on the host");
        }
        move(range->second, page, true);
        ++counts().faults;
    }
}

// --------------------------------------------------------------------------------------------------------- streams

Queue* make_queue() {
    use_current_device();
    auto* const queue = new Queue;
    queues().insert(queue);
    return queue;
}

void destroy_queue(Queue* queue) {
    use_current_device();
    drain(queue);
    queues().erase(queue);
    delete queue;
}

void require_stream(int device, const Queue* queue, const char* what, bool anywhere) {
    if (queue && queue->device != device) {
        throw Error(std::string(what) + " in a stream of device " + std::to_string(queue->device) + " for device " +
                    std::to_string(device));
    }
    if (!anywhere || !queue) return require_current(device, what);
    use_current_device();
}

void drain(Queue* queue) {
    if (queue) run_until(queue, ~uint64_t{0});
}

void enqueue(Queue* queue, std::function<void()> operation) {
    if (!queue) return operation();
    queue->operations.push_back(std::move(operation));
    static thread_local std::mt19937_64 random(1);
    const Landing landing = options().landing;
    if (landing == Landing::kEarliest || (landing == Landing::kRandom && random() % 2)) drain(queue);
}

Mark mark(Queue* queue) { return {queue, queue ? queue->done + queue->operations.size() : 0, launches}; }

void hold(Queue* queue, Mark until) {
    if (until.queue && (!queues().count(until.queue) || until.queue == queue)) return;
    enqueue(queue, [queue, until] {
        if (until.queue) run_until(until.queue, until.position);
        if (queue) queue->launches = std::max(queue->launches, until.queue ? until.queue->launches : until.launches);
    });
}

}  // namespace emu
