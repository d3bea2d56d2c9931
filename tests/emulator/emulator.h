// A CUDA device for machines without one: runs a kernel's threads as fibers, adversarially, and counts what they do.
//
// README.md beside this file says what is emulated and what is not. Kernels see device.cuh and ptx.cuh.
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

// A kernel did something that CUDA leaves undefined or refuses. The message names thread, line and rule.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A line of a kernel: the default argument of every function that kernels call.
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

// Which runnable thread goes next: the lowest, the highest, or a random one, switching at accesses too.
enum class Order { kForward, kReverse, kRandom };
// When asynchronous copies land: at once, at the last moment that the waits permit, or anywhere in between.
enum class Landing { kEarliest, kLatest, kRandom };

constexpr int kRuntimeVersion = 13000;  // cudaRuntimeGetVersion

struct Options {
    Order order = Order::kForward;
    Landing landing = Landing::kLatest;
    uint64_t seed = 0;
    // Blocks on the device at a time. More than one for kernels whose blocks wait for each other.
    int resident_blocks = 1;
    // Whether unordered accesses to shared memory are errors. If not, they just happen in the order of execution.
    bool find_races = true;
    // cudaDevAttrMultiProcessorCount. Few, so that loops of persistent grids run more than once.
    int multiprocessors = 2;
    int architecture = 90;  // that kernels are taken to be compiled for: 90 for sm_90
    // Most shared memory of a block (227 KiB on sm_90, 64 KiB on sm_75).
    size_t max_shared_bytes = 227 * 1024;
    // For managed.h: whether there is managed memory, the size of its pages, the largest allocation, whether a kernel's
    // access to a page on the host is an error, and the card's free memory.
    bool managed = true;
    size_t page_bytes = 65536;
    size_t managed_limit = size_t{1} << 40;
    bool forbid_faults = false;
    size_t free_bytes = size_t{64} << 30;
    bool capturing = false;                // the caller's stream is being captured
    bool early_launches = true;            // a launch may start before the previous one has ended
    bool executes = true;                  // false: launches are only counted, and what remains is the host's work
    int driver_version = kRuntimeVersion;  // cudaDriverGetVersion; 0: there is no driver
};

// Options for later launches of this host thread.
Options& options();

// The devices, two of them, as this host thread sees them: which one is current, and which have a context.
constexpr int kDevices = 2;
// As if process and thread had just begun: device 0 is current, without a context.
void forget_devices();
int current_device();
// cudaSetDevice: creates the device's context if there is none, and makes it current.
void set_device(int device);
bool has_context(int device);  // this device's, whether current or not
bool any_current_context();    // a call has made one current in this thread
// What most calls do first: create a context on the current device, unless there is one.
void use_current_device();
void require_device(int device);  // that it exists
// Throws unless the device is current, whose default stream, memory or kernels a call is about.
void require_current(int device, const char* what);

// How one line of a kernel used memory, over all its warps.
struct Traffic {
    uint64_t requests = 0;  // warp-wide instructions
    uint64_t bytes = 0;     // requested by all lanes
    uint64_t actual = 0;    // shared: passes through the 32 banks; global: 32-byte sectors touched
    uint64_t minimum = 0;   // the fewest possible for these bytes
};

struct Counters {
    uint64_t launches = 0, blocks = 0;
    uint64_t early = 0;                             // launches that started before the previous one had ended
    std::map<std::string, uint64_t> instructions;   // by class, once for each thread that executes it
    std::map<std::string, Traffic> shared, global;  // by "file:line kind"
    std::string json() const;
};

// What has been counted since the last reset.
Counters counters();
void reset_counters();
// The kernels of which a thread has run to its end since then.
std::vector<const void*> kernels_run();

// When a launch runs. kFollowed: held back until the next launch, which may be kEarly. kEarly: starts first; the launch
// held back runs when a thread calls grid_wait, or, in random order, perhaps before. kInOrder: at once, after the
// launch held back.
enum class Start { kInOrder, kFollowed, kEarly };

// Runs body() once for each thread of each block. Throws Error after unwinding all fibers. With kFollowed a copy of
// body() runs later, so what it refers to has to live until then. cluster: this many consecutive blocks along x run
// at the same time. The kernel runs on the current device. carveout: the kernel's; it is an error if a launch that
// starts early has another than the one that it overlaps with.
void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body,
            Start start = Start::kInOrder, unsigned cluster = 1, int carveout = -1);
// cudaFuncAttributePreferredSharedMemoryCarveout: a share of L1 in percent, or -1 until it has been set. Forgotten by
// forget_devices().
void prefer_carveout(const void* kernel, int percent);
int carveout(const void* kernel);
std::vector<std::pair<const void*, int>> carveouts();
// Forgets a launch that is held back.
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

// Checks an access of the running thread (alignment; shared addresses against the block's memory, global ones against
// the launch's operands), counts it, and in random order lets another thread run first. used: how many of the bytes it
// really uses, if not all.
void access(Space space, Kind kind, const void* address, size_t bytes, Site site, size_t used = SIZE_MAX);
// An atomic operation changed memory, so spinning threads have to look again.
void changed();
// An atomic operation of the running thread. It publishes what a fence has ordered before it, and lets the thread take
// up, with a fence, what other blocks have published.
void observed();
// An access to global memory by which blocks exchange something. A load of another block's store throws unless that
// block's fence and atomic operation came in between, and then an atomic operation and a fence of the reader. The same
// goes for a store to what another block has loaded.
void exchange(Kind kind, const void* address, Site site);
// __threadfence and fence.acq_rel.gpu: order the thread's stores, and those it learned of at a barrier of the block,
// before its next atomic operation, and take up what its last one observed.
void fence(Site site);
// The second half of an atomic operation with .acquire: takes up what it has observed.
void acquire();
// Takes .acquire from the running thread's next atomic operation, if it is to be `removed` (remove_barriers.py).
// Written in front of it: Weaken(true) << atom_add_acquire(...).
struct Weaken {
    explicit Weaken(bool removed);
    template <class T>
    T operator<<(T result) const {
        return result;
    }
};
// Counts an instruction by class, once for each thread.
void count(const char* instruction, Site site);
// The running thread has come to the end of this kernel.
void count_kernel(const void* kernel);

// barrier.cta.sync id, threads: waits until that many threads have arrived (0: all threads of the block still running).
void barrier(int id, int threads, Site site);
// barrier.cta.arrive: the same without waiting.
void barrier_arrive(int id, int threads, Site site);
// __syncthreads_count: how many threads of the block passed true.
int barrier_count(bool predicate, Site site);

// An asynchronous copy of the running thread, zeros after the first `valid` bytes.
void copy_async(void* shared, const void* global, size_t bytes, size_t valid, Site site);
void copy_commit(Site site);
// Waits until at most `pending` of the newest groups are under way.
void copy_wait(int pending, Site site);

// griddepcontrol.launch_dependents: this thread lets the next launch start. Each thread of a kFollowed launch has to
// call it; otherwise the launch throws, because the next one would not start any earlier.
void grid_launch(Site site);
// griddepcontrol.wait: afterwards the previous launch's writes are visible. Each thread of a kEarly launch has to call
// it before it writes to global memory, reads what the previous launch writes, or ends; otherwise the launch throws.
void grid_wait(Site site);

// Lets other threads run. For a loop that waits for memory to change.
void spin(Site site);

// ------------------------------------------------------------------------------------------- sm_90 and later

// mbarrier.init, .inval. An object belongs to the block in whose shared memory it lies.
void mbarrier_init(void* mbarrier, uint32_t arrivals, Site site);
void mbarrier_invalidate(void* mbarrier, Site site);
// mbarrier.expect_tx for `bytes` unless 0, then mbarrier.arrive. For an mbarrier of any block of the cluster.
void mbarrier_arrive(void* mbarrier, uint32_t arrivals, uint32_t bytes, Site site);
// mbarrier.test_wait.parity, and a loop of try_wait.parity until it is true.
bool mbarrier_test(void* mbarrier, uint32_t parity, Site site);
void mbarrier_wait(void* mbarrier, uint32_t parity, Site site);
// fence.mbarrier_init, and fence.proxy.async, which includes it.
void mbarrier_fence(Site site);
void proxy_fence(Site site);

// How 16-byte pieces of shared memory are swizzled: address bits 4 and up are XORed with bits 7 and up.
enum class Swizzle { kNone, k32, k64, k128 };
size_t swizzled(Swizzle swizzle, size_t address);

// A matrix in global memory whose boxes are copied: a tensor map of rank 2, as cuTensorMapEncodeTiled makes it.
struct Tensor {
    unsigned char* memory;
    size_t element;    // bytes
    uint64_t size[2];  // columns, rows
    uint64_t stride;   // bytes between rows
    uint32_t box[2];   // columns, rows
    Swizzle swizzle;
};
// Throws std::invalid_argument where the driver would refuse.
void check(const Tensor& tensor);

// cp.async.bulk.shared::cluster.global, .tensor.2d and plain; zeros outside the tensor. blocks: a bit for each rank in
// the cluster; each of these blocks gets a copy, counted by its own mbarrier. 0: this block only.
void tensor_load(void* shared, const Tensor& tensor, int column, int row, void* mbarrier, uint32_t blocks, Site site);
void bulk_load(void* shared, const void* global, size_t bytes, void* mbarrier, uint32_t blocks, Site site);
// cp.async.bulk.global.shared::cta, in groups of the running thread.
void tensor_store(const Tensor& tensor, int column, int row, const void* shared, Site site);
void bulk_store(void* global, const void* shared, size_t bytes, Site site);
void bulk_commit(Site site);
// Waits until at most `pending` of the newest groups are still reading shared memory (only_read) or still writing.
void bulk_wait(int pending, bool only_read, Site site);

unsigned cluster_rank();
unsigned cluster_size();
// barrier.cluster.arrive, with .release or .relaxed, and barrier.cluster.wait.acquire.
void cluster_arrive(bool release, Site site);
void cluster_wait(Site site);
// mapa: the address in another block's shared memory that corresponds to `shared` in this one.
void* cluster_map(const void* shared, unsigned rank, Site site);

// wgmma.mma_async.m64nNk16 of 16-bit elements with sums in float32, for the warp of the running thread.
struct Product {
    int columns;                      // N
    bool transposed_a, transposed_b;  // MN-major in shared memory
    bool accumulate;
    const uint32_t* fragment;  // each lane's A in registers, or null
    uint64_t a, b;             // matrix descriptors
    float* sums;               // each lane's N / 2 sums
    float (*widen)(uint16_t);
};
void wgmma(const Product& product, Site site);
void wgmma_fence(Site site);
// setmaxnreg.inc or .dec. All warps of a warpgroup have to ask for the same.
void set_registers(int registers, bool more, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
// A matrix descriptor; distances in bytes.
uint64_t wgmma_descriptor(const void* shared, size_t leading, size_t stride, Swizzle swizzle, Site site);

// Whole-warp operations. Each lane of the mask brings its input; when the last one arrives, `whole` computes all
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
