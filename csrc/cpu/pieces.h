// Hands out work to an OpenMP team in small pieces.
//
// Each thread starts on a share of its own and walks it in order, which suits prefetching; one that has finished takes
// pieces from the others' shares. So a core that is taken away for a while costs its speed and no more. Which thread
// does a piece must not matter for the result.
#pragma once

#include <atomic>
#include <cstdint>

namespace qlk::cpu {
namespace {

class Pieces {
  public:
    // Cuts [0, count) for a team of `threads`. The last pieces may be short: callers check against count.
    Pieces(int64_t count, int threads) : count_(count), shares_(threads < kMost ? threads : kMost) {
        for (int i = 0; i < shares_; ++i) share_[i].next.store(begin_of(i), std::memory_order_relaxed);
    }

    // The next piece for this thread of the team, or -1 when none is left.
    int64_t take(int thread) {
        for (int i = 0; i < shares_; ++i) {
            const int at = (thread + i) % shares_;
            const int64_t end = begin_of(at + 1);
            // Looked at first: a share that is used up should not be written by everyone who asks.
            if (share_[at].next.load(std::memory_order_relaxed) >= end) continue;
            const int64_t piece = share_[at].next.fetch_add(1, std::memory_order_relaxed);
            if (piece < end) return piece;
        }
        return -1;
    }

  private:
    static constexpr int kMost = 64;
    int64_t begin_of(int share) const { return count_ * share / shares_; }

    struct alignas(64) Share {
        std::atomic<int64_t> next;
    };
    const int64_t count_;
    const int shares_;
    Share share_[kMost];
};

}  // namespace
}  // namespace qlk::cpu
