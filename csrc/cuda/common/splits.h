// Numbers that tell one launch's tickets from another's (splits.cuh).
#pragma once

#include <atomic>
#include <random>

namespace qlk::cuda {

// A different number at each call; its lowest byte is 0.
inline unsigned long long next_launch() {
    static std::atomic<unsigned long long> number{[] {
        std::random_device source;
        return static_cast<unsigned long long>(source()) << 32 | source();
    }()};
    return number.fetch_add(1, std::memory_order_relaxed) << 8;
}

}  // namespace qlk::cuda
