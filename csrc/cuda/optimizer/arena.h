// An optimizer's states in memory that is paged between device and host, and the step that goes through them.
//
// The first `header` bytes are what every launch needs; they stay on the device. Then come the states, cut into
// stretches that qlora_kernels/optim/arena plans. Of the stretches that don't stay on the device a step keeps three
// there: one is being worked on, the next is arriving, the last is leaving, on streams of their own.
#pragma once

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

namespace qlk::cuda {

class SideStream;
class Event;

// Whether device and host can use managed memory at the same time. Otherwise an arena needs staging memory.
bool can_page(int device);
// Free memory on the device, bytes.
int64_t free_bytes(int device);

// Offsets of first byte and end, from the arena's start.
using Intervals = std::vector<std::pair<int64_t, int64_t>>;

struct Stretch {
    int64_t begin, end;  // chunks
    Intervals arrive;    // pages that it needs and earlier stretches didn't bring
    Intervals leave;     // pages that no later stretch needs
    // Without managed memory: offset of each `arrive` interval in the staging memory; the same intervals go back.
    std::vector<int64_t> staged;
    bool stays;  // never leaves the device; only the first stretch can
};

class Arena {
  public:
    // All zeros, the states on the host. staging: bytes of device memory for stretches, or 0 to use managed memory.
    Arena(int64_t bytes, int64_t header, int64_t staging, int device);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    unsigned char* header() const { return header_; }
    // Add an offset from the arena's start to this to get a state's address, in managed or in pinned host memory.
    unsigned char* states() const { return states_; }
    // What kernels add a chunk's plane offsets to.
    unsigned char* base() const { return staging_ ? staging_ : states_; }

    void plan(std::vector<Stretch> stretches);
    // measure: launch optimizer_norm first. maps: for 8-bit states; otherwise null.
    void step(const OptimizerParams& params, const DynamicMap* maps, bool measure, const Stream& stream);

    // Starts to bring the states back; the next step waits for them.
    void page_in();
    // Sends the states to the host, after the stream's work on them.
    void page_out(const Stream& stream);
    // Waits until nothing is under way. Then the host may use the states, and their pages count as being on the host.
    void to_host(const Stream& stream);
    void wait();
    int64_t resident_bytes() const { return resident_; }
    // Whether a step threw after launching only some of its stretches. No step should follow then.
    bool broken() const { return broken_; }

  private:
    void drain();
    void release();
    int64_t bytes_of(const Intervals& intervals) const;
    void arrive(size_t i);
    void leave(size_t i, const Stream& stream);

    int device_;
    int64_t bytes_, header_bytes_;
    unsigned char *header_ = nullptr, *states_ = nullptr, *staging_ = nullptr;
    std::vector<Stretch> stretches_;
    std::vector<bool> here_;
    bool coming_ = false;  // the first stretch is arriving, and no step has waited for it yet
    bool broken_ = false;
    unsigned looks_ = 0;  // steps that found the first stretch on the device
    int64_t resident_ = 0;
    std::unique_ptr<SideStream> in_, out_;
    static constexpr size_t kEvents = 4;
    std::array<std::unique_ptr<Event>, kEvents> arrived_, done_, left_;
};

}  // namespace qlk::cuda
