// Launches: which blocks are on the device, and how a deadlock is found.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>

#include "block.h"
#include "managed.h"
#include "wgmma.h"

namespace emu {

Options& options() {
    static thread_local Options all;
    return all;
}

namespace {

struct Devices {
    int current = 0;
    bool made_current = false;  // a context, in this thread
};
Devices& devices() {
    static thread_local Devices all;
    return all;
}
std::atomic<bool> contexts[kDevices];  // of the process

}  // namespace

std::map<const void*, int>& preferred() {
    static std::map<const void*, int> all;
    return all;
}
std::mutex preferring;

void prefer_carveout(const void* kernel, int percent) {
    const std::lock_guard<std::mutex> lock(preferring);
    preferred()[kernel] = percent;
}
int carveout(const void* kernel) {
    const std::lock_guard<std::mutex> lock(preferring);
    const auto found = preferred().find(kernel);
    return found == preferred().end() ? -1 : found->second;
}
std::vector<std::pair<const void*, int>> carveouts() {
    const std::lock_guard<std::mutex> lock(preferring);
    return {preferred().begin(), preferred().end()};
}

void forget_devices() {
    devices() = {};
    {
        const std::lock_guard<std::mutex> lock(preferring);
        preferred().clear();
    }
    for (auto& context : contexts) context = false;
}
int current_device() { return devices().current; }
bool has_context(int device) { return contexts[device]; }
bool any_current_context() { return devices().made_current; }

void require_device(int device) {
    if (device >= 0 && device < kDevices) return;
    throw Error("cudaErrorInvalidDevice: invalid device ordinal " + std::to_string(device));
}

void set_device(int device) {
    require_device(device);
    devices().current = device;
    use_current_device();
}

void use_current_device() {
    devices().made_current = true;
    contexts[devices().current] = true;
}

void require_current(int device, const char* what) {
    require_device(device);
    if (device != current_device()) {
        throw Error("cudaErrorInvalidResourceHandle: " + std::string(what) + " for device " + std::to_string(device) +
                    ", while device " + std::to_string(current_device()) + " is current");
    }
    use_current_device();
}

Device::Device(Dim3 g, Dim3 b, size_t bytes, const std::function<void()>& kernel, unsigned cluster)
    : grid(g),
      block_dim(b),
      shared_size(bytes),
      cluster_size(cluster),
      options(emu::options()),
      random(options.seed),
      body(kernel) {}

Device::~Device() = default;

void Device::run_the_one_before() {
    if (!early || !early->before) return;
    const auto before = std::move(early->before);
    early->before = nullptr;
    before(*early);
}

Dim3 Device::position(uint64_t number) const {
    return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
            static_cast<unsigned>(number / grid.x / grid.y)};
}

void Device::begin(std::shared_ptr<Bulk> copy) {
    if (options.landing == Landing::kEarliest || (options.landing == Landing::kRandom && random() & 1)) {
        copy->land();
    } else {
        under_way.push_back(std::move(copy));
    }
}

void Device::land_one() {
    const size_t at = options.order == Order::kForward   ? 0
                      : options.order == Order::kReverse ? under_way.size() - 1
                                                         : random() % under_way.size();
    const std::shared_ptr<Bulk> copy = std::move(under_way[at]);
    under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(at));
    copy->land();
}

// A cluster's blocks leave together, so that an access to one that has ended can be detected.
void Device::end(Block& block) {
    block.finish_requests();
    for (const auto& copy : under_way) {
        for (const Block* used : copy->blocks) {
            if (used != &block) continue;
            throw Error("block " + std::to_string(block.number) +
                        " has ended, and a copy into its shared memory is under way");
        }
    }
    for (const auto& [offset, barrier] : block.mbarriers) {
        if (barrier.bytes == 0) continue;
        throw Error("block " + std::to_string(block.number) + " has ended, and an mbarrier at offset " +
                    std::to_string(offset) + " of its shared memory expects " + std::to_string(barrier.bytes) +
                    " bytes more");
    }
    for (const auto& group : block.warp_groups) {
        if (group) group->check_registers();
    }
    const std::shared_ptr<Cluster> cluster = block.cluster;
    if (block.races) block.races->check_visits(static_cast<int>(block.rank));
    if (cluster->live > 0) return;
    resident_.erase(
        std::remove_if(resident_.begin(), resident_.end(), [&](const auto& one) { return one->cluster == cluster; }),
        resident_.end());
}

// No thread can run: lets those that spin look again. Throws if there are none, or if nothing changes any more.
void Device::wake_spinning(uint64_t blocks_to_start) {
    bool any = false;
    for (auto& one : resident_) any |= one->all_spin_to_ready();
    // Threads that only spin, round after round, wait for something that no thread is left to do.
    idle_ = progress == progress_at_last_spin_ ? idle_ + 1 : 0;
    progress_at_last_spin_ = progress;
    if (any && idle_ <= 1000) return;
    std::string message = "deadlock: ";
    for (auto& one : resident_) message += one->who_waits_for_what() + ". ";
    if (blocks_to_start > 0) {
        message += std::to_string(blocks_to_start) +
                   " blocks have not started (options().resident_blocks = " + std::to_string(options.resident_blocks) +
                   ").";
    }
    throw Error(message);
}

void Device::run() {
    const OnDevice now(ordinal);
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z, clusters = blocks / cluster_size;
    const size_t resident = std::max<size_t>(options.resident_blocks, cluster_size);
    std::vector<uint64_t> shuffled;
    if (options.order == Order::kRandom) {
        shuffled.resize(clusters);
        std::iota(shuffled.begin(), shuffled.end(), 0);
        std::shuffle(shuffled.begin(), shuffled.end(), random);
    }
    uint64_t next = 0;
    try {
        while (next < clusters || !resident_.empty()) {
            while (next < clusters && resident_.size() + cluster_size <= resident) {
                const uint64_t first = cluster_size * (options.order == Order::kForward   ? next
                                                       : options.order == Order::kReverse ? clusters - 1 - next
                                                                                          : shuffled[next]);
                const auto cluster = std::make_shared<Cluster>();
                for (uint64_t number = first; number < first + cluster_size; ++number) {
                    resident_.push_back(
                        std::make_unique<Block>(*this, number, position(number), block_dim, shared_size, cluster));
                }
                ++next;
            }
            if (!under_way.empty() && options.landing == Landing::kRandom && random() % 8 == 0) land_one();
            Block* block = nullptr;
            Thread* thread = nullptr;
            const size_t start = options.order == Order::kRandom ? random() % resident_.size() : 0;
            for (size_t i = 0; i < resident_.size() && !thread; ++i) {
                const size_t at = (start + i) % resident_.size();
                block = resident_[options.order == Order::kReverse ? resident_.size() - 1 - at : at].get();
                thread = block->pick();
            }
            if (!thread && !under_way.empty()) {
                land_one();
                continue;
            }
            if (!thread) {
                wake_spinning(blocks - next * cluster_size);
                continue;
            }
            block->run(*thread);
            if (block->live == 0) end(*block);
        }
        for (const auto& store : last_stores) store->land();
    } catch (...) {
        for (auto& one : resident_) one->cancel();
        throw;
    }
}

namespace {

// A kFollowed launch that is held back, and its carve-out.
std::function<void(Overtaking&)>& held() {
    static thread_local std::function<void(Overtaking&)> one;
    return one;
}
thread_local int held_carveout = -1;

void check_configuration(Dim3 grid, Dim3 block, size_t shared_bytes) {
    const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    // The limits of every architecture here (CUDA C++ Programming Guide, compute capabilities).
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        throw Error("invalid configuration: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                    " x " + std::to_string(grid.z));
    }
    if (threads == 0 || threads > 1024 || block.z > 64) {
        throw Error("invalid configuration: a block of " + std::to_string(threads) + " threads");
    }
    if (shared_bytes > options().max_shared_bytes) {
        throw Error("invalid configuration: " + std::to_string(shared_bytes) + " bytes of shared memory, of " +
                    std::to_string(options().max_shared_bytes));
    }
}

}  // namespace

void forget_held() { held() = nullptr; }

void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body, Start start,
            unsigned cluster, int carveout) {
    if (!options().executes) return count_launch(false);
    Overtaking between;
    between.before = std::move(held());
    forget_held();
    if (start != Start::kEarly && between.before) between.before(between);
    check_configuration(grid, block, shared_bytes);
    // Portable sizes of clusters: CUDA C++ Programming Guide, "Thread Block Clusters".
    if (cluster == 0 || cluster > 8 || grid.x % cluster != 0) {
        throw Error("invalid configuration: clusters of " + std::to_string(cluster) + " blocks in a grid of " +
                    std::to_string(grid.x));
    }
    const bool early = start == Start::kEarly && between.before;
    if (early && carveout != held_carveout) {
        throw Error("an early launch with another carve-out of shared memory than the one before it: " +
                    std::to_string(carveout) + " and " + std::to_string(held_carveout) + " percent");
    }
    count_launch(early);
    note_launch();
    if (start == Start::kFollowed && options().early_launches) {
        held_carveout = carveout;
        held() = [=, ordinal = current_device(), operands = given()](Overtaking& next) {
            Device device(grid, block, shared_bytes, body, cluster);
            device.ordinal = ordinal;
            device.operands = operands;
            device.overtaken = &next;
            device.run();
        };
        return;
    }
    Device device(grid, block, shared_bytes, body, cluster);
    if (early) {
        device.early = &between;
        if (device.options.order == Order::kRandom && device.random() & 1) device.run_the_one_before();
    }
    device.run();
}

}  // namespace emu
