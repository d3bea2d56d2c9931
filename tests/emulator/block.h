// The inside of the emulator: threads, warps and blocks, and who runs next.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <unordered_set>

#include "emulator.h"
#include "fiber.h"
#include "race.h"

namespace emu {

class Block;
class Device;
struct Bulk;

struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;
    bool landed;
    void land();
};

// What a thread, or a block at its last barrier, has to do with other blocks' stores. Blocks are told apart by their
// place in the grid: one that has ended may have left its memory to another.
struct Exchange {
    std::vector<uintptr_t> unpublished, fenced;  // addresses that it used; the latter wait for an atomic operation
    uint64_t observed = 0, taken_up = 0;         // times of the device's publications
};

// Bulk copies out of shared memory that a thread has asked for: those since the last commit, and the groups that still
// read shared memory, or write to global memory.
struct BulkStores {
    std::vector<std::shared_ptr<Bulk>> open;
    std::deque<std::vector<std::shared_ptr<Bulk>>> groups;
    uint32_t committed = 0, waited = 0;  // groups; waited for at least to have read
    int agent = -1;                      // of races
};

struct Thread {
    enum State { kReady, kWaiting, kSpinning, kDone };
    Block* block = nullptr;
    int linear = 0;  // x first, as CUDA numbers them
    int racer = 0;   // the same among the threads of the cluster
    Dim3 index;
    State state = kReady;
    bool started = false;
    bool cancelled = false;
    bool waited = false;    // in grid_wait, where the launch is an early one
    bool let_next = false;  // called grid_launch
    const char* waiting_for = "";
    Site site{"", 0};
    std::exception_ptr error;
    std::unique_ptr<Fiber> fiber;
    std::vector<uint32_t> executions;  // of each line, by its number in the table of sites
    std::vector<Copy> open;            // copies since the last commit
    std::deque<std::vector<Copy>> groups;
    Exchange exchange;
    bool in_cluster_barrier = false;  // has arrived there and not waited
    uint32_t cluster_phase = 0;       // that it arrived in
    BulkStores stores;

    // Gives the processor away; `waiting` threads come back when somebody wakes them.
    void pause(State how, const char* what, Site where);
    void reset(Block* owner, int number, Dim3 position);
};

struct Meeting {
    const char* operation;
    uint32_t mask, arrived, left;
    bool done;
    size_t input_bytes, output_bytes;
    LaneData in, out;
};

// One warp-wide access, collected lane by lane.
struct Request {
    uint32_t lanes = 0;
    uint8_t bytes[32] = {};
    uintptr_t address[32];
};

// Those of one line. Execution n is open[n - finished].
struct Requests {
    std::vector<Request> open;
    size_t complete = 0;  // of the open ones: all their lanes have come
    size_t finished = 0;  // no longer in the list
};

struct Warp {
    std::vector<std::unique_ptr<Meeting>> meetings, spare;
    std::vector<Requests> requests;  // by site, space and kind
};

struct Barrier {
    int arrived = 0;
    int expected = 0;  // 0: all threads that still run
    int predicates = 0;
    int result = 0;
    bool open_to_all = false;
    std::vector<Thread*> waiting;
    Clock clock;  // what those that have arrived had seen
};

// An mbarrier object.
struct MBarrier {
    uint32_t expected = 0, pending = 0;  // arrivals
    int64_t bytes = 0;                   // that copies have yet to bring: negative when they came before it was said
    uint32_t phase = 0;
    bool observed = true;    // somebody has waited for the phase before
    bool told = false;       // a fence tells agents of it
    bool announced = false;  // fence.mbarrier_init tells the cluster
    bool known = false;      // and the cluster has met since
    int owner = 0;           // who has to execute that
    int agent = -1;          // of races: what copies bring by it
    std::vector<Thread*> waiting;
    Clock arriving, complete;  // of this phase, and of those before
};

// Blocks that run at the same time, and see each other's shared memory.
struct Cluster {
    std::vector<Block*> blocks;    // by rank; those that have ended stay until all have
    std::unique_ptr<Races> races;  // of all of them; null when they are not looked for
    int live = 0;                  // threads
    int arrived = 0;               // at the barrier
    uint32_t phase = 0;
    std::vector<Thread*> waiting;
    Clock arriving, complete;
    void complete_phase();
};

// A bulk copy under way.
struct Bulk {
    std::function<void()> read, write;   // land does both
    std::vector<const Block*> blocks;    // whose shared memory it uses
    const MBarrier* mbarrier = nullptr;  // that it tells of its bytes, and in which phase it was asked for
    uint32_t phase = 0;
    bool is_read = false, is_written = false;
    void do_read();
    void land();
};

struct WarpGroup;

class Block {
  public:
    Block(Device& device, uint64_t number, Dim3 index, Dim3 dim, size_t shared_bytes, std::shared_ptr<Cluster> cluster);
    ~Block();

    Thread* pick();  // a runnable thread, or null
    void run(Thread& thread);
    void wake(Thread& thread);
    void make_ready(Thread& thread, bool ready);
    void arrive(int id, int threads, bool wait, bool predicate, Site site);
    void complete(Barrier& barrier);
    bool all_spin_to_ready();
    void cancel();
    std::string who_waits_for_what() const;
    void finish_requests();

    Device& device;
    uint64_t number;  // x first
    Dim3 index, dim;
    int live;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::array<Barrier, 16> barriers;
    unsigned char* shared = nullptr;  // exactly shared_size bytes, so that AddressSanitizer sees its ends
    size_t shared_size = 0;
    Exchange exchange;
    std::shared_ptr<Cluster> cluster;  // one block alone, in most launches
    unsigned rank = 0;
    Races* races = nullptr;                // the cluster's
    std::map<size_t, MBarrier> mbarriers;  // by offset
    std::vector<std::unique_ptr<WarpGroup>> warp_groups;

    bool holds(const void* address) const {
        const auto* byte = static_cast<const unsigned char*>(address);
        return byte >= shared && byte < shared + shared_size;
    }
    // Of a byte of this block, in the shared memory of all of the cluster.
    size_t offset_in_cluster(const void* address) const {
        return rank * shared_size + static_cast<size_t>(static_cast<const unsigned char*>(address) - shared);
    }
    // Throws when a thread that ends has left something to be waited for.
    void check_all_waited(const Thread& thread) const;

  private:
    std::vector<uint64_t> ready_;  // a bit for each thread
};

// What a launch that has begun early and the one before it have to do with each other, by 16 bytes of global memory.
struct Overtaking {
    std::function<void(Overtaking&)> before;       // runs that one; empty when it has
    std::unordered_map<uintptr_t, uint32_t> read;  // by the early one before its threads have waited, and by which line
    std::unordered_set<uintptr_t> written;         // by the one before
};

// One launch.
class Device {
  public:
    Device(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body, unsigned cluster = 1);
    ~Device();
    void run();
    void run_the_one_before();
    // An access of a thread to global memory.
    void check_overtaking(const Thread& thread, Kind kind, const void* address, size_t bytes, Site site);

    Overtaking* early = nullptr;      // of an early launch
    Overtaking* overtaken = nullptr;  // of the one before it

    // Has a copy land as soon as the options say.
    void begin(std::shared_ptr<Bulk> copy);

    Dim3 grid, block_dim;
    size_t shared_size;
    unsigned cluster_size;
    Options options;
    std::vector<std::shared_ptr<Bulk>> under_way;
    std::vector<std::shared_ptr<Bulk>> last_stores;  // that nobody waits for: done when the launch ends
    std::mt19937_64 random;
    const std::function<void()>& body;
    uint64_t progress = 0;  // counts what can end somebody's spinning

    struct Store {
        static constexpr uint64_t kNone = ~0ull;
        uint64_t block = kNone;
        int thread = 0;
        Site site{"", 0};
        uint64_t published = 0;  // when; 0: not yet
    };
    // Of each address the last store, and when each block that has read it since has published that.
    std::unordered_map<uintptr_t, std::pair<Store, std::map<uint64_t, uint64_t>>> exchanged;
    uint64_t publications = 0;

  private:
    Dim3 position(uint64_t number) const;
    void land_one();
    void end(Block& block);
    std::vector<std::unique_ptr<Block>> resident_;
};

// The block of the running thread's cluster that holds an address in its shared memory, or null.
Block* holder(const void* address);

uint32_t site_number(Site site);
Site site_of(uint32_t number);
void count_launch(bool early);
void count_block();
void collect(Thread& thread, Space space, Kind kind, const void* address, size_t bytes, uint32_t site);
// A request that no warp makes: of shared memory `actual` passes of at least `minimum`, of global memory a range.
void count_bulk(Space space, Kind kind, uintptr_t address, size_t bytes, uint64_t actual, uint64_t minimum,
                uint32_t site);
void finish(uint32_t slot, const Request& request);

}  // namespace emu
