// Scratch memory: one arena for each calling thread. It grows when needed and is kept, so that calls in a loop pay for
// fresh pages only once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlk::cpu {

// The most bytes that one thread may use. The promise that a full-precision copy of a weight never exists depends on
// it.
constexpr size_t kScratchPerThread = 8u << 20;

// At least `bytes` bytes, aligned to 64, valid until this thread asks again. threads: how many share it, for the
// recorded peak. Throws std::bad_alloc.
char* scratch(size_t bytes, int threads);

constexpr size_t kHugePage = 2u << 20;

// Asks the system for huge pages within [data, data + bytes). A weight that is streamed once a call misses the TLB on
// every page, and on virtual machines a miss costs as much as reading the page: 4 KB pages held one thread to 14-29
// GB/s where 2 MB pages gave over 60. collapse: also turn existing pages into huge ones, now.
void prefer_huge_pages(void* data, size_t bytes, bool collapse);

// Hands out aligned pieces of a scratch area; with a null base it only counts. In an unnamed namespace, because each
// instruction set compiles its own copy.
namespace {
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    template <class T>
    T* take(size_t count) {
        char* const here = base_ ? base_ + used_ : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(here);
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

// Whether `bytes` are within what `threads` may use together.
inline bool scratch_suffices(size_t bytes, int threads) { return bytes <= kScratchPerThread * threads; }
}  // namespace

}  // namespace qlk::cpu
