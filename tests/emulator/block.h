// The emulator's internals: threads, warps and blocks, and which thread runs next.
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
#include "operands.h"
#include "race.h"

namespace emu {

class Block;
class Device;
struct Bulk;

// A cp.async.
struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;
    bool landed;
    void land();
};

// What a thread, or a block at its last barrier, knows about other blocks' stores. Blocks are identified by their index
// in the grid, since a block that has ended may have left its memory to another.
struct Exchange {
    std::vector<uintptr_t> unpublished, fenced;  // addresses used; the fenced ones wait for an atomic operation
    uint64_t observed = 0, taken_up = 0;         // times, in the device's publications
    bool weakened = false;                       // the next atomic operation acquires nothing

    // At a barrier: takes over what the other has yet to publish, and what it has taken up.
    void learn(Exchange& theirs);
};

// A thread's bulk copies out of shared memory: those since the last commit, and the groups that are still reading
// shared memory or writing global memory.
struct BulkStores {
    std::vector<std::shared_ptr<Bulk>> open;
    std::deque<std::vector<std::shared_ptr<Bulk>>> groups;
    uint32_t committed = 0, waited = 0;  // groups; waited: at least until they had read
    int agent = -1;                      // in Races
};

struct Thread {
    enum State { kReady, kWaiting, kSpinning, kDone };
    Block* block = nullptr;
    int linear = 0;  // x first, as CUDA numbers them
    int racer = 0;   // its number among all threads of the cluster
    Dim3 index;
    State state = kReady;
    bool started = false;
    bool cancelled = false;
    bool waited = false;    // has called grid_wait
    bool let_next = false;  // has called grid_launch
    uint32_t met = 0;       // barriers for some threads at which it has waited, a bit each
    const char* waiting_for = "";
    Site site{"", 0};
    std::exception_ptr error;
    std::unique_ptr<Fiber> fiber;
    std::vector<uint32_t> executions;  // how often it executed each line, by site number
    std::vector<Copy> open;            // copies since the last commit
    std::deque<std::vector<Copy>> groups;
    Exchange exchange;
    bool in_cluster_barrier = false;  // has arrived but not waited
    uint32_t cluster_phase = 0;       // that it arrived in
    BulkStores stores;

    // Lets other threads run. A kWaiting thread comes back once it is woken.
    void pause(State how, const char* what, Site where);
    void reset(Block* owner, int number, Dim3 position);
};

// Lanes that meet in a warp-wide operation.
struct Meeting {
    const char* operation;
    uint32_t mask, arrived, left;
    bool done;
    size_t input_bytes;
    LaneData in, out;
};

// A warp-wide access, collected lane by lane.
struct Request {
    uint32_t lanes = 0;
    uint8_t bytes[32] = {};
    uintptr_t address[32];
};

// The accesses of one line. Execution n is open[n - finished].
struct Requests {
    std::vector<Request> open;
    size_t complete = 0;  // open ones that all lanes have reached
    size_t finished = 0;  // removed from the list
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
    Clock clock;                    // what the arrived threads had seen
    std::vector<Thread*> arrivals;  // at a barrier for some threads
    Exchange exchange;              // what those of its last phases knew
};

// An mbarrier object.
struct MBarrier {
    uint32_t expected = 0, pending = 0;  // arrivals
    int64_t bytes = 0;                   // that copies have yet to bring; negative if they came before being announced
    uint32_t phase = 0;
    bool observed = true;    // a thread has waited for the previous phase
    bool told = false;       // a fence has made it visible to agents
    bool announced = false;  // fence.mbarrier_init has announced it to the cluster
    bool known = false;      // and the cluster has met since
    int owner = 0;           // thread that has to execute these fences
    int agent = -1;          // in Races: the copies it counts
    std::vector<Thread*> waiting;
    Clock arriving, complete;  // for this phase, and for earlier ones
};

// Blocks that run at the same time and see each other's shared memory.
struct Cluster {
    std::vector<Block*> blocks;    // by rank; those that have ended stay until all have
    std::unique_ptr<Races> races;  // for all its blocks; null if races are not looked for
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
    const MBarrier* mbarrier = nullptr;  // that counts its bytes, and in which phase
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
    // Offset of this block's byte in the shared memory of the whole cluster.
    size_t offset_in_cluster(const void* address) const {
        return rank * shared_size + static_cast<size_t>(static_cast<const unsigned char*>(address) - shared);
    }
    // Throws if a thread that ends has left something unwaited for.
    void check_all_waited(const Thread& thread) const;

  private:
    std::vector<uint64_t> ready_;  // a bit for each thread
};

// How an early launch and the one before it use global memory, in units of 16 bytes.
struct Overtaking {
    std::function<void(Overtaking&)> before;       // runs the launch before; empty once it has run
    std::unordered_map<uintptr_t, uint32_t> read;  // by the early launch before grid_wait, and at which site
    std::unordered_set<uintptr_t> written;         // by the launch before
};

// One launch.
class Device {
  public:
    Device(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body, unsigned cluster = 1);
    ~Device();
    void run();
    void run_the_one_before();
    // Accesses of a thread to global memory. The first is called only if there are operands.
    void check_operands(Kind kind, const void* address, size_t bytes, uint32_t line);
    void check_overtaking(const Thread& thread, Kind kind, const void* address, size_t bytes, Site site);

    Overtaking* early = nullptr;      // set if this launch is early
    Overtaking* overtaken = nullptr;  // set if the next launch is early

    // Starts a copy, which lands when the options say.
    void begin(std::shared_ptr<Bulk> copy);

    Dim3 grid, block_dim;
    size_t shared_size;
    unsigned cluster_size;
    Options options;
    int ordinal = current_device();
    std::shared_ptr<const Operands> operands = given();  // or null
    std::vector<uint32_t> operand_of_line;               // that it used last, by site number
    std::vector<std::shared_ptr<Bulk>> under_way;
    std::vector<std::shared_ptr<Bulk>> last_stores;  // that no thread waits for: done when the launch ends
    std::mt19937_64 random;
    const std::function<void()>& body;
    uint64_t progress = 0;  // counts events that can end a thread's spinning

    struct Store {
        static constexpr uint64_t kNone = ~0ull;
        uint64_t block = kNone;
        int thread = 0;
        Site site{"", 0};
        uint64_t published = 0;  // when; 0: not yet
    };
    // For each address the last store, and when each block that has read it since has published that.
    std::unordered_map<uintptr_t, std::pair<Store, std::map<uint64_t, uint64_t>>> exchanged;
    uint64_t publications = 0;

  private:
    Dim3 position(uint64_t number) const;
    void land_one();
    void end(Block& block);
    void wake_spinning(uint64_t blocks_to_start);
    std::vector<std::unique_ptr<Block>> resident_;
    uint64_t progress_at_last_spin_ = ~0ull;
    int idle_ = 0;  // rounds of spinning without progress
};

// The block of the running thread's cluster that holds an address in its shared memory, or null.
Block* holder(const void* address);

// "file:line".
std::string place(Site site);
// A random bit, from the launch's seed.
bool coin();

uint32_t site_number(Site site);
Site site_of(uint32_t number);
void count_launch(bool early);
void count_block();
void collect(Thread& thread, Space space, Kind kind, const void* address, size_t bytes, uint32_t site);
// A request that no warp makes. Shared memory: `actual` passes of at least `minimum`; global memory: a range.
void count_bulk(Space space, Kind kind, uintptr_t address, size_t bytes, uint64_t actual, uint64_t minimum,
                uint32_t site);
void finish(uint32_t slot, const Request& request);

}  // namespace emu
