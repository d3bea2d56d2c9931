// A CUDA device for machines without one: runs a kernel's blocks as fibers, adversarially, and counts what it does.
//
// See README.md beside this file for what is emulated and what is not. device.cuh and ptx.cuh are what kernels see.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace emu {

// A kernel did what CUDA leaves undefined or refuses; the message names thread, place and rule.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A line of a kernel. The default argument of each function that kernels call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Which runnable thread goes next: the lowest, the highest, or any, with changes at every access too.
enum class Order { kForward, kReverse, kRandom };
// When asynchronous copies land: at once, at the last moment that the waits permit, or anywhere between.
enum class Landing { kEarliest, kLatest, kRandom };

struct Options {
    Order order = Order::kForward;
    Landing landing = Landing::kLatest;
    uint64_t seed = 0;
    // Blocks that are on the device at a time. More than one for kernels whose blocks wait for each other.
    int resident_blocks = 1;
    // Whether accesses to shared memory that nothing orders are errors, or only do what the order makes of them.
    bool find_races = true;
    // What cudaDevAttrMultiProcessorCount says: few, so that loops over a persistent grid run more than once.
    int multiprocessors = 2;
    int architecture = 90;  // that kernels count as compiled for: 90 for sm_90
    // Shared memory a block may have (227 KiB on sm_90, 64 KiB on sm_75).
    size_t max_shared_bytes = 227 * 1024;
    // Of managed.h: whether there is such memory, its pages, the most that can be had at once, whether a kernel may use
    // a page that is on the host, and what the card has left.
    bool managed = true;
    size_t page_bytes = 65536;
    size_t managed_limit = size_t{1} << 40;
    bool forbid_faults = false;
    size_t free_bytes = size_t{64} << 30;
    bool capturing = false;      // what the caller's stream says when asked
    bool early_launches = true;  // whether a launch may begin before the one before it has ended
    bool executes = true;        // or are launches only counted? Then what is left is what the host does
};

// The options of the launches to come, of this thread of the process.
Options& options();

// How one line of a kernel used memory, over all its warps.
struct Traffic {
    uint64_t requests = 0;  // warp-wide instructions
    uint64_t bytes = 0;     // asked for by all lanes
    uint64_t actual = 0;    // shared: passes through the 32 banks; global: 32-byte sectors touched
    uint64_t minimum = 0;   // the fewest that these bytes could have taken
};

struct Counters {
    uint64_t launches = 0, blocks = 0;
    uint64_t early = 0;                             // launches that began before the one before them had ended
    std::map<std::string, uint64_t> instructions;   // by class, one for each thread that executes it
    std::map<std::string, Traffic> shared, global;  // by "file:line kind"
    std::string json() const;
};

// What has been counted since the last reset.
Counters counters();
void reset_counters();

// Where a launch begins. kFollowed: it is held back until the next one, which may begin before it has ended. kEarly:
// such a one; the other runs when a thread calls grid_wait, or, in random order, perhaps before all of it. kInOrder
// runs at once, after what was held back.
enum class Start { kInOrder, kFollowed, kEarly };

// Runs body() once for each thread of each block. Throws Error, after all fibers have been unwound. With kFollowed a
// copy of body() is run later: what it refers to has to be there then. `cluster` blocks that follow each other along x
// run at the same time.
void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body,
            Start start = Start::kInOrder, unsigned cluster = 1);
// Forgets what is held back.
void forget_held();

// ---------------------------------------------------------------- for device.cuh and ptx.cuh

class Block;
struct Thread;

Thread& this_thread();
Dim3 thread_index();
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();
unsigned lane();
unsigned char* shared_bytes();
size_t shared_size();

[[noreturn]] void fail(Site site, const std::string& message);

enum class Space { kShared, kGlobal };
enum class Kind { kLoad, kStore, kAtomic };

// Checks an access of the running thread (alignment; shared addresses against the block's memory), counts it, and in
// random order lets another thread run first.
void access(Space space, Kind kind, const void* address, size_t bytes, Site site);
// An atomic operation changed memory: whoever spins has something new to look at.
void changed();
// An atomic operation of the running thread: it publishes what a fence has put before it, and what other blocks have
// published is the thread's to take up, with a fence.
void observed();
// An access to global memory by which blocks tell each other something. A load of what another block stored throws
// unless a fence and an atomic operation of that block came between, and then those of the reader, the fence last. So
// does a store to what another block has loaded.
void exchange(Kind kind, const void* address, Site site);
// __threadfence: what the thread has stored, or has met in a barrier of the block, comes before its next atomic
// operation, and what its last one observed is taken up.
void fence(Site site);
// Counts an instruction of a class, once for each thread.
void count(const char* instruction, Site site);

// barrier.cta.sync id, threads: waits until that many threads have arrived (0: all of the block that still run).
void barrier(int id, int threads, Site site);
// barrier.cta.arrive: the same without waiting.
void barrier_arrive(int id, int threads, Site site);
// All threads of the block, as __syncthreads_count: how many gave true.
int barrier_count(bool predicate, Site site);

// An asynchronous copy of the running thread; zeros beyond `valid` bytes of the `bytes`.
void copy_async(void* shared, const void* global, size_t bytes, size_t valid, Site site);
void copy_commit(Site site);
// Waits until at most `pending` of the newest groups are under way.
void copy_wait(int pending, Site site);

// griddepcontrol.launch_dependents: as far as this thread goes, the next launch may begin. Each thread of a launch that
// the next one may overtake calls this; else it throws, for the next one would begin no earlier.
void grid_launch(Site site);
// griddepcontrol.wait: what the launch before this one has written is there. Where that one may have been overtaken,
// each thread calls this before it writes to global memory, reads what the other writes, or ends; else it throws.
void grid_wait(Site site);

// Lets other threads run; for a loop that waits for memory to change.
void spin(Site site);

// ------------------------------------------------------------------------------------------- of sm_90 and later

// mbarrier.init, .inval. An object belongs to the block in whose shared memory it lies.
void mbarrier_init(void* mbarrier, uint32_t arrivals, Site site);
void mbarrier_invalidate(void* mbarrier, Site site);
// mbarrier.expect_tx of `bytes`, then mbarrier.arrive, the former where bytes are not 0. Of any block of the cluster.
void mbarrier_arrive(void* mbarrier, uint32_t arrivals, uint32_t bytes, Site site);
// mbarrier.test_wait.parity, and a loop of try_wait.parity until it is so.
bool mbarrier_test(void* mbarrier, uint32_t parity, Site site);
void mbarrier_wait(void* mbarrier, uint32_t parity, Site site);
// fence.mbarrier_init, and fence.proxy.async, which also does what the former does.
void mbarrier_fence(Site site);
void proxy_fence(Site site);

// How 16 bytes of shared memory change places: bits 4 and up of an address by bits 7 and up.
enum class Swizzle { kNone, k32, k64, k128 };
size_t swizzled(Swizzle swizzle, size_t address);

// A plain matrix in global memory of which boxes are copied, as cuTensorMapEncodeTiled describes one of rank 2.
struct Tensor {
    unsigned char* memory;
    size_t element;    // bytes
    uint64_t size[2];  // columns, rows
    uint64_t stride;   // bytes between rows
    uint32_t box[2];   // columns, rows
    Swizzle swizzle;
};
// Throws invalid_argument where the driver would refuse.
void check(const Tensor& tensor);

// cp.async.bulk.shared::cluster.global, .tensor.2d and plain; what lies outside of the tensor is 0. `blocks`, a bit for
// each rank in the cluster, of whom each gets a copy and has its own mbarrier told; 0: this block alone.
void tensor_load(void* shared, const Tensor& tensor, int column, int row, void* mbarrier, uint32_t blocks, Site site);
void bulk_load(void* shared, const void* global, size_t bytes, void* mbarrier, uint32_t blocks, Site site);
// cp.async.bulk.global.shared::cta, in groups of the running thread.
void tensor_store(const Tensor& tensor, int column, int row, const void* shared, Site site);
void bulk_store(void* global, const void* shared, size_t bytes, Site site);
void bulk_commit(Site site);
// Until at most `pending` of the newest groups still read shared memory; or, not only that, still write.
void bulk_wait(int pending, bool only_read, Site site);

unsigned cluster_rank();
unsigned cluster_size();
// barrier.cluster.arrive, with .release or .relaxed, and barrier.cluster.wait.acquire.
void cluster_arrive(bool release, Site site);
void cluster_wait(Site site);
// mapa: where another block has what lies at `shared` in this one.
void* cluster_map(const void* shared, unsigned rank, Site site);

// wgmma.mma_async.m64nNk16 of 16-bit elements with sums in float32, for the warp of the running thread.
struct Product {
    int columns;                      // N
    bool transposed_a, transposed_b;  // MN-major in shared memory
    bool accumulate;
    const uint32_t* fragment;  // A in registers, of each lane; or null
    uint64_t a, b;             // matrix descriptors
    float* sums;               // N / 2 of each lane
    float (*widen)(uint16_t);
};
void wgmma(const Product& product, Site site);
void wgmma_fence(Site site);
// setmaxnreg, to more or fewer registers: of all warps of a warpgroup, each time the same.
void set_registers(int registers, bool more, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
// A matrix descriptor; distances in bytes.
uint64_t wgmma_descriptor(const void* shared, size_t leading, size_t stride, Swizzle swizzle, Site site);

// Whole-warp operations. Each lane of the mask brings `bytes` of input; when the last has come, `whole` computes all
// outputs from all inputs, both [32] with a stride of kLaneBytes. Only __syncwarp orders the lanes' memory accesses.
constexpr size_t kLaneBytes = 256;
using LaneData = unsigned char[32][kLaneBytes];
void warp_meet(const char* operation, uint32_t mask, const void* input, size_t input_bytes, void* output,
               size_t output_bytes, const std::function<void(uint32_t mask, LaneData& in, LaneData& out)>& whole,
               Site site, bool orders_memory = false);

// The same with types: whole(mask, In[32], Out[32]).
template <class Out, class In, class F>
Out warp_op(const char* operation, uint32_t mask, const In& input, F whole, Site site, bool orders_memory = false) {
    static_assert(sizeof(In) <= kLaneBytes && sizeof(Out) <= kLaneBytes);
    Out output;
    warp_meet(
        operation, mask, &input, sizeof(In), &output, sizeof(Out),
        [&](uint32_t meeting, LaneData& in, LaneData& out) {
            std::array<In, 32> inputs;
            std::array<Out, 32> outputs;
            for (int i = 0; i < 32; ++i) {
                if (meeting >> i & 1) std::memcpy(static_cast<void*>(&inputs[i]), in[i], sizeof(In));
            }
            whole(meeting, inputs, outputs);
            for (int i = 0; i < 32; ++i) {
                if (meeting >> i & 1) std::memcpy(out[i], static_cast<const void*>(&outputs[i]), sizeof(Out));
            }
        },
        site, orders_memory);
    return output;
}

}  // namespace emu
