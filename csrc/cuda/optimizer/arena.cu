#include "cuda/optimizer/arena.h"

#include <algorithm>
#include <cstring>
#include <memory.cuh>

#include "cuda/optimizer/optimizer_launch.h"

namespace qlk::cuda {
namespace {

// With less free memory than this, the driver may have evicted pages by itself.
constexpr size_t kScarce = size_t{256} << 20;
// Steps between two checks of free memory: a check takes longer than a launch, and so does prefetching pages that are
// already on the device.
constexpr int kLook = 16;

}  // namespace

bool can_page(int device) { return pages_managed(device); }
int64_t free_bytes(int device) { return static_cast<int64_t>(free_memory(device)); }

Arena::Arena(int64_t bytes, int64_t header, int64_t staging, int device)
    : device_(device), bytes_(bytes), header_bytes_(header) {
    const DeviceGuard guard(device);
    try {
        in_ = std::make_unique<SideStream>(device);
        out_ = std::make_unique<SideStream>(device);
        for (auto* events : {&arrived_, &done_, &left_}) {
            for (auto& event : *events) event = std::make_unique<Event>(device);
        }
        if (staging > 0) {
            header_ = static_cast<unsigned char*>(allocate_device(static_cast<size_t>(header), device));
            staging_ = static_cast<unsigned char*>(allocate_device(static_cast<size_t>(staging), device));
            states_ = static_cast<unsigned char*>(allocate_pinned(static_cast<size_t>(bytes - header), device));
            std::memset(states_, 0, static_cast<size_t>(bytes - header));
            states_ -= header;
        } else {
            header_ = states_ = static_cast<unsigned char*>(allocate_managed(static_cast<size_t>(bytes), device));
            // The host clears them, so that the pages start there: the device may have no room for them.
            std::memset(states_ + header, 0, static_cast<size_t>(bytes - header));
            prefer_device(header_, static_cast<size_t>(header), device);
            prefetch(header_, static_cast<size_t>(header), true, in_->get());
        }
        fill_zero(header_, static_cast<size_t>(header), in_->get());
        synchronize(in_->get());
    } catch (...) {
        release();
        throw;
    }
}

Arena::~Arena() {
    try {
        const DeviceGuard guard(device_);
        try {
            drain();
        } catch (...) {
        }
        release();
    } catch (...) {
    }
}

// Frees what exists: the constructor may have failed halfway. Needs the arena's device to be current: freeing creates a
// context on the current one.
void Arena::release() {
    if (states_ == header_) {
        if (states_) free_managed(states_);
    } else {
        if (header_) free_device(header_);
        if (staging_) free_device(staging_);
        if (states_) free_pinned(states_ + header_bytes_);
    }
    staging_ = states_ = header_ = nullptr;
    for (auto* events : {&arrived_, &done_, &left_}) {
        for (auto& event : *events) event.reset();
    }
    in_.reset();
    out_.reset();
}

void Arena::plan(std::vector<Stretch> stretches) {
    wait();
    QLK_CHECK(!stretches.empty(), "an arena needs a stretch");
    stretches_ = std::move(stretches);
    here_.assign(stretches_.size(), false);
    resident_ = header_bytes_;
}

// Bytes in intervals, without the header, which is always on the device.
int64_t Arena::bytes_of(const Intervals& intervals) const {
    int64_t sum = 0;
    for (const auto& [first, end] : intervals) sum += std::max(end, header_bytes_) - std::max(first, header_bytes_);
    return sum;
}

void Arena::arrive(size_t i) {
    if (here_[i]) return;
    const Stream in = in_->get();
    const Stretch& s = stretches_[i];
    for (size_t j = 0; j < s.arrive.size(); ++j) {
        const auto& [first, end] = s.arrive[j];
        const size_t size = static_cast<size_t>(end - first);
        if (staging_) {
            copy(staging_ + s.staged[j], states_ + first, size, in);
        } else {
            prefetch(states_ + first, size, true, in);
        }
    }
    here_[i] = true;
    resident_ += bytes_of(s.arrive);
}

void Arena::leave(size_t i, const Stream& stream) {
    const Stretch& s = stretches_[i];
    const Intervals& intervals = staging_ ? s.arrive : s.leave;
    for (size_t j = 0; j < intervals.size(); ++j) {
        const auto& [first, end] = intervals[j];
        const size_t size = static_cast<size_t>(end - first);
        if (staging_) {
            copy(states_ + first, staging_ + s.staged[j], size, stream);
        } else {
            prefetch(states_ + first, size, false, stream);
        }
    }
    resident_ -= bytes_of(intervals);
    // Also when none of its intervals leaves: its last page may be the next stretch's first.
    here_[i] = s.stays;
}

void Arena::step(const OptimizerParams& params, const DynamicMap* maps, bool measure, const Stream& main) {
    QLK_CHECK(!stretches_.empty(), "an arena without a plan");
    const DeviceGuard guard(device_);
    const size_t count = stretches_.size();
    if (capturing(main)) {
        QLK_CHECK(count == 1 && here_[0] && !coming_,
                  "a CUDA graph can capture a step only when all states are on the device and stay there: take a step "
                  "before, and set no page_budget");
        if (measure) optimizer_norm(params, main);
        return optimizer_step(params, maps, stretches_[0].begin, stretches_[0].end, measure, true, main);
    }
    // The driver may have evicted what should be here when memory ran short.
    if (!staging_ && here_[0] && ++looks_ % kLook == 0 && free_memory(device_) < kScarce) {
        resident_ -= bytes_of(stretches_[0].arrive);
        here_[0] = false;
    }
    if (measure) optimizer_norm(params, main);
    if (count == 1 && here_[0]) {
        if (coming_) arrived_[0]->hold(main);
        coming_ = false;
        return optimizer_step(params, maps, stretches_[0].begin, stretches_[0].end, measure, true, main);
    }
    // Wait until what left in the last step is on the host.
    left_[kEvents - 1]->hold(in_->get());
    arrive(0);
    arrived_[0]->record(in_->get());
    coming_ = false;
    for (size_t i = 0; i < count; ++i) {
        const size_t now = i % (kEvents - 1), next = (i + 1) % (kEvents - 1);
        if (i + 1 < count) {
            // Wait until the stretch before the last has left: then at most three are here, and its place is free.
            if (i >= 2) left_[(i - 2) % (kEvents - 1)]->hold(in_->get());
            arrive(i + 1);
            arrived_[next]->record(in_->get());
        }
        arrived_[now]->hold(main);
        optimizer_step(params, maps, stretches_[i].begin, stretches_[i].end, measure, i + 1 == count, main);
        broken_ = true;  // until everything has been launched
        done_[now]->record(main);
        done_[now]->hold(out_->get());
        leave(i, out_->get());
        left_[now]->record(out_->get());
    }
    left_[kEvents - 1]->record(out_->get());
    broken_ = false;
}

void Arena::page_in() {
    const DeviceGuard guard(device_);
    // Only a stretch that stays is worth bringing in now: others would be sent back.
    if (here_[0] || !stretches_[0].stays) return;
    left_[kEvents - 1]->hold(in_->get());
    arrive(0);
    arrived_[0]->record(in_->get());
    coming_ = true;
}

void Arena::page_out(const Stream& main) {
    const DeviceGuard guard(device_);
    if (staging_ || !here_[0]) return;
    done_[0]->record(main);
    done_[0]->hold(out_->get());
    arrived_[0]->hold(out_->get());  // after page_in() it may be on its way
    for (const auto& [first, end] : stretches_[0].arrive) {
        const int64_t begin = first < header_bytes_ ? header_bytes_ : first;
        if (end > begin) prefetch(states_ + begin, static_cast<size_t>(end - begin), false, out_->get());
    }
    left_[kEvents - 1]->record(out_->get());
    here_[0] = coming_ = false;
    resident_ = header_bytes_;
}

void Arena::to_host(const Stream& main) {
    const DeviceGuard guard(device_);
    synchronize(main);
    drain();
    std::fill(here_.begin(), here_.end(), false);
    coming_ = false;
    resident_ = header_bytes_;
}

void Arena::wait() {
    const DeviceGuard guard(device_);
    drain();
}

// Waits for both streams. Needs the arena's device to be current, so that waiting creates no context on another.
void Arena::drain() {
    synchronize(out_->get());
    synchronize(in_->get());
}

}  // namespace qlk::cuda
