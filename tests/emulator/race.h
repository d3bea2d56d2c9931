// Races on shared memory: two threads touch the same bytes, at least one of them writes, and no barrier, wait or fence
// orders the two. Found from what the kernel asks for, not from what went wrong, so whatever order the threads ran in.
//
// Vector clocks, as in FastTrack (Flanagan and Freund 2009): a thread knows, of every other, up to which of its
// synchronisations it has seen. An access is ordered before another thread's later one if that thread has seen the
// synchronisation that followed it. Shuffles and votes make lanes meet, but order no memory (CUDA C++ Programming
// Guide, "Warp Shuffle Functions"), so they do not count here.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emu {

// Of each thread of the block, how many of its synchronisations have been seen.
using Clock = std::vector<uint32_t>;

class Races {
  public:
    // Of a cluster: of all its blocks together, one after the other.
    Races(size_t shared_bytes, int threads, int blocks);
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

    // What copies and multiplies by itself is an agent. Its operations have times, and whoever has seen a time has seen
    // all of them up to that one. Gives a new one.
    int agent();
    // An access of an agent that `thread` has asked for, at a time later than all that anybody has seen of it.
    void access_by(int agent, uint32_t time, int thread, Kind kind, size_t offset, size_t bytes, uint32_t site);
    // The operations of an agent up to a time are complete: `by`, or whoever takes up `clock`, knows.
    void see(int by, int agent, uint32_t time);
    void see(Clock& clock, int agent, uint32_t time);
    // fence.proxy.async: what `by` has written may be accessed by agents, once something orders the two.
    void fence(int by);
    // `by` has ended: what it alone knows nobody else will.
    void ended(int by);
    // An access of `by` to another block of the cluster, which must not end before; throws when it may have.
    void visit(int block, int by, uint32_t site) { visit(block, by, clock(by)[by], site); }
    void visit(int block, int by, uint32_t time, uint32_t site);
    void check_visits(int block);

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
        // Of each byte the last thread that wrote, and when: of interest to agents even after all threads have met.
        struct Written {
            uint64_t epoch = 0;
            int by = 0;
            uint32_t time = 0;
        } written[4];
    };
    struct Shadow {
        std::vector<Word> words;
        uint64_t epoch = 0;
    };
    struct Operation {
        int agent;
        uint32_t time;
        Kind kind;
        size_t offset, bytes;
        uint32_t site;
    };

    Clock& clock(int thread);
    void check(const Records& records, const Record& by, int thread, const char* did, const char* does, size_t offset);
    static void note(Records& records, const Record& record);
    // One word's part of an access: `by` as it will be noted, on behalf of `thread`.
    void access_word(Word& word, const Record& by, int thread, Kind kind, size_t offset);
    Word& word(size_t offset);
    std::string who(int thread) const;
    void forget_seen();

    std::unique_ptr<Shadow> shadow_;
    // A meeting of all begins a new epoch: what was before it is ordered before all that comes, but for what agents do.
    // Times go on, for an older one may lie in the clock of a barrier.
    std::vector<Clock> clocks_;
    std::vector<uint64_t> clock_epochs_;
    int of_block_;                  // threads
    size_t width_;                  // of a clock: threads, then agents
    std::vector<uint32_t> starts_;  // of each thread, its time at the start of its epoch
    std::vector<Clock> fences_;     // of each thread, the times of all
    std::vector<bool> ended_;
    std::map<std::pair<int, int>, std::pair<uint32_t, uint32_t>> visits_;  // block, thread: time, site
    std::vector<Operation> operations_;  // that no thread has seen the end of, as far as is known
    size_t many_operations_ = 4096;      // when to look again
    uint64_t birth_;                     // the first epoch
};

}  // namespace emu
