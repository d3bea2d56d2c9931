#include "cpu/scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
        const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        arena.data = static_cast<char*>(std::aligned_alloc(kHugePage, rounded));
        if (!arena.data) throw std::bad_alloc();
        prefer_huge_pages(arena.data, rounded, true);
        arena.size = rounded;
    }
    return arena.data;
}

void prefer_huge_pages(void* data, size_t bytes, bool collapse) {
#if defined(__linux__)
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
    if (first >= last) return;
    void* const start = reinterpret_cast<void*>(first);
    // A hint: if it is refused, the memory works as before.
    if (madvise(start, last - first, MADV_HUGEPAGE) != 0 || !collapse) return;
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1: turns existing pages into huge ones, now
    (void)madvise(start, last - first, kCollapse);
#else
    (void)data, (void)bytes, (void)collapse;
#endif
}

int64_t scratch_peak_bytes(bool reset) { return reset ? peak.exchange(0) : peak.load(); }

}  // namespace qlk::cpu
