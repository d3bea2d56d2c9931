// Races on shared memory: two threads touch the same bytes, at least one of them writes, and no barrier, wait or fence
// orders the two. Found from what the kernel asks for, not from what went wrong, so whatever order the threads ran in.
//
// Vector clocks, as in FastTrack (Flanagan and Freund 2009): a thread knows, of every other, up to which of its
// synchronisations it has seen. An access is ordered before another thread's later one if that thread has seen the
// synchronisation that followed it. Shuffles and votes make lanes meet, but order no memory (CUDA C++ Programming
// Guide, "Warp Shuffle Functions"), so they do not count here.
#pragma once

#include <memory>
#include <vector>

#include "emulator.h"

namespace emu {

// Of each thread of the block, how many of its synchronisations have been seen.
using Clock = std::vector<uint32_t>;

class Races {
  public:
    Races(size_t shared_bytes, int threads);
    ~Races();

    // An access of the running thread to bytes [offset, offset + bytes). Throws Error when it races.
    void access(int thread, Kind kind, size_t offset, size_t bytes, uint32_t site);
    // All threads of the block have met.
    void all_meet();
    // Those of `threads` have met, and see what each of the others has done.
    void meet(const std::vector<int>& threads);
    // The two halves of a barrier that some only arrive at: `by` leaves what it has seen in `clock`; `by` takes it up.
    void release(int by, Clock& clock);
    void acquire(int by, const Clock& clock);

  private:
    struct Record {
        int thread;
        uint32_t time;
        uint32_t site;
        uint8_t bytes;  // of the word, a bit each
        bool atomic;
    };
    struct Records {
        std::vector<Record> list;
        uint64_t threads = 0;  // a bit for each thread modulo 64 that may be in the list
        void clear() { list.clear(), threads = 0; }
    };
    struct Word {
        uint64_t epoch = 0;
        Records reads, writes;
    };
    struct Shadow {
        std::vector<Word> words;
        uint64_t epoch = 0;
    };

    Clock& clock(int thread);
    void check(const Records& records, int thread, uint8_t bytes, Kind kind, const char* did, size_t offset,
               uint32_t site);
    static void note(Records& records, const Record& record);

    std::unique_ptr<Shadow> shadow_;
    // A meeting of all begins a new epoch: what was before it is ordered before all that comes.
    std::vector<Clock> clocks_;
    std::vector<uint64_t> clock_epochs_;
};

}  // namespace emu
