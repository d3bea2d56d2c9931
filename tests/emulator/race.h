// Races on shared memory: two threads access the same bytes, at least one of them writes, and no barrier, wait or fence
// orders the accesses. Races are found from the synchronisation that a kernel asks for, not from wrong results, so they
// show in any order of execution.
//
// Vector clocks, as in FastTrack (Flanagan and Freund 2009): a thread knows, for every other thread, how many of its
// synchronisations it has seen. An access is ordered before another thread's later access if that thread has seen the
// synchronisation after it. In shuffles and votes lanes meet, but these don't order memory (CUDA C++ Programming Guide,
// "Warp Shuffle Functions"), so they don't count here.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emu {

// For each thread, how many of its synchronisations have been seen.
using Clock = std::vector<uint32_t>;

class Races {
  public:
    // shared_bytes, threads: of all of a cluster's blocks together, one block after the other.
    Races(size_t shared_bytes, int threads, int blocks);
    ~Races();

    // The running thread accesses bytes [offset, offset + bytes). Throws Error if that is a race.
    void access(int thread, Kind kind, size_t offset, size_t bytes, uint32_t site);
    // All threads of the block have met.
    void all_meet();
    // `threads` have met: each has seen what the others did.
    void meet(const std::vector<int>& threads);
    // The two halves of a barrier at which some threads only arrive: `by` adds what it has seen to `clock`, or takes up
    // what is in it.
    void release(int by, Clock& clock);
    void acquire(int by, const Clock& clock);

    // A new agent: something that copies or multiplies beside the threads. Its operations have times; seeing a time
    // means seeing all of them up to it.
    int agent();
    // An agent's access on behalf of `thread`, at a time later than any that has been seen.
    void access_by(int agent, uint32_t time, int thread, Kind kind, size_t offset, size_t bytes, uint32_t site);
    // `by`, or each thread that takes up `clock`, has seen an agent's operations up to a time.
    void see(int by, int agent, uint32_t time);
    void see(Clock& clock, int agent, uint32_t time);
    // fence.proxy.async: agents may access what `by` has written, once something orders the two.
    void fence(int by);
    // `by` has ended: what only it has seen is lost.
    void ended(int by);
    // `by` accesses another block of the cluster. check_visits throws if that block may have ended before.
    void visit(int block, int by, uint32_t site) { visit(block, by, clock(by)[by], site); }
    void visit(int block, int by, uint32_t time, uint32_t site);
    void check_visits(int block);

  private:
    struct Record {
        int thread;
        uint32_t time;
        uint32_t site;
        uint8_t bytes;  // a bit for each byte of the word
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
        // For each byte the last thread that wrote it, and when. Agents need that even after all threads have met.
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
    // One word's part of an access. by: the record to note; thread: on whose behalf.
    void access_word(Word& word, const Record& by, int thread, Kind kind, size_t offset);
    Word& word(size_t offset);
    std::string name_of(int thread) const;
    void forget_seen();

    std::unique_ptr<Shadow> shadow_;
    // A meeting of all threads starts a new epoch: everything before it, except what agents do, is ordered before
    // everything after it. Times continue, because a barrier's clock may hold older ones.
    std::vector<Clock> clocks_;
    std::vector<uint64_t> clock_epochs_;
    int block_threads_;             // threads of a block
    size_t width_;                  // of a clock: threads, then agents
    std::vector<uint32_t> starts_;  // each thread's time at the start of its epoch
    std::vector<Clock> fences_;     // the times of each thread's fences
    std::vector<bool> ended_;
    std::map<std::pair<int, int>, std::pair<uint32_t, uint32_t>> visits_;  // block, thread: time, site
    std::vector<Operation> operations_;                                    // whose end no thread is known to have seen
    size_t many_operations_ = 4096;                                        // when to check that again
    uint64_t birth_;                                                       // the first epoch
};

}  // namespace emu
