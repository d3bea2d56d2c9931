// Memory in which an access past the end (or before the beginning) is a fault.
//
// AddressSanitizer does not see what masked vector loads, gathers and AMX tile loads touch; the MMU does. A buffer has
// exactly the bytes asked for, and one of its ends touches a page without access rights.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

enum class Guard { kAfter, kBefore };

class Guarded {
  public:
    Guarded(size_t bytes, Guard guard, int fill) : bytes_(bytes), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
        room_ = (bytes + page_ - 1) / page_ * page_;
        void* const all = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) {
            std::perror("mmap");
            std::abort();
        }
        first_ = static_cast<uint8_t*>(all) + page_;
        if (room_ > 0) protect(PROT_READ | PROT_WRITE);
        data_ = guard == Guard::kAfter ? first_ + (room_ - bytes) : first_;
        // The rest of the pages is filled with a pattern, to detect writes.
        std::memset(first_, kUnused, static_cast<size_t>(data_ - first_));
        std::memset(data_, fill, bytes);
        std::memset(data_ + bytes, kUnused, static_cast<size_t>(first_ + room_ - (data_ + bytes)));
    }
    Guarded(Guarded&& other) noexcept
        : bytes_(other.bytes_),
          page_(other.page_),
          room_(other.room_),
          first_(std::exchange(other.first_, nullptr)),
          data_(other.data_) {}
    Guarded& operator=(Guarded&&) = delete;
    ~Guarded() {
        if (first_) munmap(first_ - page_, room_ + 2 * page_);
    }

    // A read-only copy of an input.
    static Guarded input(const std::vector<uint8_t>& content, Guard guard) {
        Guarded copy(content.size(), guard, 0);
        if (!content.empty()) {
            std::memcpy(copy.data_, content.data(), content.size());
            copy.protect(PROT_READ);
        }
        return copy;
    }

    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }

    // Whether the rest of the pages is unchanged.
    bool rest_untouched() const {
        for (const uint8_t* at = first_; at < first_ + room_; ++at) {
            if (at == data_) at += bytes_;
            if (at < first_ + room_ && *at != kUnused) return false;
        }
        return true;
    }

  private:
    static constexpr uint8_t kUnused = 0x5a;

    void protect(int rights) {
        if (mprotect(first_, room_, rights) != 0) {
            std::perror("mprotect");
            std::abort();
        }
    }

    size_t bytes_, page_, room_ = 0;
    uint8_t* first_ = nullptr;
    uint8_t* data_ = nullptr;
};
