// An optimizer's states, in memory that is paged between the device and the host, and a step that goes through them.
//
// `header` bytes come first: what every launch needs, and stays on the device. Then the states, cut into stretches that
// qlora_kernels/arena.py plans. A step keeps three of those on the device that do not stay there: one is worked on, the
// next comes, the last one goes, on streams of their own.
#pragma once

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

namespace qlk::cuda {

class SideStream;
class Event;

// Whether managed memory can be used by device and host together: otherwise an arena needs staging memory. Bytes that
// the device has left.
bool can_page(int device);
int64_t free_bytes(int device);

// Bytes from the arena's begin, first and end.
using Intervals = std::vector<std::pair<int64_t, int64_t>>;

struct Stretch {
    int64_t begin, end;  // of its chunks
    Intervals arrive;    // pages that it needs and that are not there yet
    Intervals leave;     // pages that none of the later ones needs
    // Without managed pages: where each interval goes, bytes from the staging memory's begin; `arrive` comes back.
    std::vector<int64_t> staged;
    bool stays;  // it never leaves; the first one at most
};

class Arena {
  public:
    // All zeros, the states on the host. `staging`: bytes of device memory for stretches; 0: managed memory.
    Arena(int64_t bytes, int64_t header, int64_t staging, int device);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    unsigned char* header() const { return header_; }
    // Where offset 0 would be, were the states behind the header.
    unsigned char* states() const { return states_; }
    // What kernels add a chunk's planes to.
    unsigned char* base() const { return staging_ ? staging_ : states_; }

    void plan(std::vector<Stretch> stretches);
    // `measure`: launches optimizer_norm before. States of other kinds than those of `maps` need none.
    void step(const OptimizerParams& params, const DynamicMap* maps, bool measure, const Stream& stream);

    // In the background: the next step waits for it.
    void page_in();
    // After what the stream has to do with them.
    void page_out(const Stream& stream);
    // Waits until nothing is under way: the host may then use the states, and their pages count as being there.
    void to_host(const Stream& stream);
    void wait();
    int64_t resident_bytes() const { return resident_; }
    // Whether a step threw when some stretches had been launched and some had not: no other should follow.
    bool broken() const { return broken_; }

  private:
    void release();
    int64_t bytes_of(const Intervals& intervals) const;
    void arrive(size_t i);
    void leave(size_t i, const Stream& stream);

    int device_;
    int64_t bytes_, header_bytes_;
    unsigned char *header_ = nullptr, *states_ = nullptr, *staging_ = nullptr;
    std::vector<Stretch> stretches_;
    std::vector<bool> here_;
    bool coming_ = false;  // the first stretch, and no step has waited for it
    bool broken_ = false;
    unsigned looks_ = 0;  // steps in which the first stretch was here
    int64_t resident_ = 0;
    std::unique_ptr<SideStream> in_, out_;
    static constexpr size_t kEvents = 4;
    std::array<std::unique_ptr<Event>, kEvents> arrived_, done_, left_;
};

}  // namespace qlk::cuda
