// The operands that launches were given. Where they are known, a kernel may use no other memory, and may not store to
// those that a call only reads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "emulator.h"

namespace emu {

class Operands {
  public:
    // call: whose operands they are, for messages.
    explicit Operands(const char* call) : call_(call) {}

    // Bytes of global memory. Null is left out. number: which one of several with that name; -1: the only one.
    void reads(const char* name, const void* address, size_t bytes, int64_t number = -1);
    void writes(const char* name, const void* address, size_t bytes, int64_t number = -1);  // and may read them

    // The running thread's access, at a site of that number. Throws unless one operand holds all of it. last: the
    // operand that the same line used last, which this changes.
    void check(Kind kind, const void* address, size_t bytes, uint32_t& last, uint32_t line) const {
        const auto at = reinterpret_cast<uintptr_t>(address);
        if (last < all_.size() && all_[last].holds(kind, at, bytes)) return;
        last = find(kind, at, bytes, line);
    }
    // Throws if an operand begins within a tensor and ends outside it.
    void check_tensor(uintptr_t address, size_t bytes) const;

  private:
    friend class Given;
    struct Operand {
        const char* name;
        int64_t number;
        uintptr_t begin, end;
        bool writable;
        std::string text() const;
        bool holds(Kind kind, uintptr_t at, size_t bytes) const {
            return at >= begin && at + bytes <= end && (kind == Kind::kLoad || writable);
        }
    };
    void add(const char* name, const void* address, size_t bytes, int64_t number, bool writable);
    uint32_t find(Kind kind, uintptr_t address, size_t bytes, uint32_t line) const;
    [[noreturn]] void explain(Kind kind, uintptr_t address, size_t bytes, Site site) const;

    const char* call_;
    std::vector<Operand> all_;  // by `begin`, once they are given
};

// While it lives, launches of this host thread have these operands.
class Given {
  public:
    explicit Given(Operands operands);
    ~Given();
    Given(const Given&) = delete;
    Given& operator=(const Given&) = delete;

  private:
    std::shared_ptr<const Operands> before_;
};
// Null: nothing is known of the operands, and kernels may use any memory.
std::shared_ptr<const Operands> given();

// For tests: operands of that name count as so many bytes shorter, or as only read, until forgotten. A kernel that is
// right then does what one with a fault would do.
void misstate(const std::string& name, size_t fewer, bool read_only);
void forget_misstated();

}  // namespace emu
