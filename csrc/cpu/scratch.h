// Scratch memory: one arena for each calling thread, grown when needed and kept, so that a call in a loop pays for
// fresh pages only once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlk::cpu {

// What one thread may use (the contract that a full-precision copy of a weight never exists rests on it).
constexpr size_t kScratchPerThread = 8u << 20;

// At least `bytes` bytes, aligned to 64; valid until this thread asks again. `threads` share it: for the record of
// the peak. Throws std::bad_alloc.
char* scratch(size_t bytes, int threads);

// In an unnamed namespace, because each instruction set compiles its own copy.
// Hands out aligned pieces of a scratch area; with base null it only counts.
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
}  // namespace

}  // namespace qlk::cpu
