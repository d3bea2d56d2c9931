// Launches: which blocks are on the device, and when it is stuck.
#include <algorithm>
#include <numeric>

#include "block.h"
#include "managed.h"

namespace emu {

Options& options() {
    static thread_local Options all;
    return all;
}

Device::Device(Dim3 g, Dim3 b, size_t bytes, const std::function<void()>& kernel)
    : grid(g), block_dim(b), shared_size(bytes), options(emu::options()), random(options.seed), body(kernel) {}

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

void Device::run() {
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> shuffled;
    if (options.order == Order::kRandom) {
        shuffled.resize(blocks);
        std::iota(shuffled.begin(), shuffled.end(), 0);
        std::shuffle(shuffled.begin(), shuffled.end(), random);
    }
    uint64_t next = 0, progress_at_last_spin = ~0ull;
    int idle = 0;
    try {
        while (next < blocks || !resident_.empty()) {
            while (next < blocks && static_cast<int>(resident_.size()) < options.resident_blocks) {
                const uint64_t number = options.order == Order::kForward   ? next
                                        : options.order == Order::kReverse ? blocks - 1 - next
                                                                           : shuffled[next];
                resident_.push_back(std::make_unique<Block>(*this, number, position(number), block_dim, shared_size));
                ++next;
            }
            Block* block = nullptr;
            Thread* thread = nullptr;
            const size_t start = options.order == Order::kRandom ? random() % resident_.size() : 0;
            for (size_t i = 0; i < resident_.size() && !thread; ++i) {
                block = resident_[(start + i) % resident_.size()].get();
                thread = block->pick();
            }
            if (!thread) {
                bool any = false;
                for (auto& one : resident_) any |= one->all_spin_to_ready();
                // Threads that only spin, round after round, wait for something that nobody is left to do.
                idle = progress == progress_at_last_spin ? idle + 1 : 0;
                progress_at_last_spin = progress;
                if (!any || idle > 1000) {
                    std::string message = "deadlock: ";
                    for (auto& one : resident_) message += one->who_waits_for_what() + ". ";
                    if (next < blocks) {
                        message += std::to_string(blocks - next) +
                                   " blocks have not started (options().resident_blocks = " +
                                   std::to_string(options.resident_blocks) + ").";
                    }
                    throw Error(message);
                }
                continue;
            }
            block->run(*thread);
            if (block->live == 0) {
                block->finish_requests();
                resident_.erase(std::find_if(resident_.begin(), resident_.end(),
                                             [&](const auto& one) { return one.get() == block; }));
            }
        }
    } catch (...) {
        for (auto& one : resident_) one->cancel();
        throw;
    }
}

namespace {

// A launch that the next one may overtake.
std::function<void(Overtaking&)>& held() {
    static thread_local std::function<void(Overtaking&)> one;
    return one;
}

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

void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body, Start start) {
    if (!options().executes) return count_launch(false);
    Overtaking between;
    between.before = std::move(held());
    forget_held();
    if (start != Start::kEarly && between.before) between.before(between);
    check_configuration(grid, block, shared_bytes);
    const bool early = start == Start::kEarly && between.before;
    count_launch(early);
    note_launch();
    if (start == Start::kFollowed && options().early_launches) {
        held() = [=](Overtaking& next) {
            Device device(grid, block, shared_bytes, body);
            device.overtaken = &next;
            device.run();
        };
        return;
    }
    Device device(grid, block, shared_bytes, body);
    if (early) {
        device.early = &between;
        if (device.options.order == Order::kRandom && device.random() & 1) device.run_the_one_before();
    }
    device.run();
}

}  // namespace emu
