#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "../kernels.h"

namespace qlk::cpu {
namespace {

std::atomic<int64_t> peak{0};

struct Arena {
    char* data = nullptr;
    size_t size = 0;
    ~Arena() { std::free(data); }
};

thread_local Arena arena;

}  // namespace

char* scratch(size_t bytes, int threads) {
    const int64_t each = static_cast<int64_t>(bytes) / (threads > 0 ? threads : 1);
    int64_t seen = peak.load();
    while (each > seen && !peak.compare_exchange_weak(seen, each)) {
    }
    if (bytes > arena.size) {
        std::free(arena.data);
        arena.data = nullptr;
        arena.size = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        arena.data = static_cast<char*>(std::aligned_alloc(4096, rounded));
        if (!arena.data) throw std::bad_alloc();
        arena.size = rounded;
    }
    return arena.data;
}

int64_t scratch_peak_bytes(bool reset) {
    return reset ? peak.exchange(0) : peak.load();
}

}  // namespace qlk::cpu
