// What the checks share: cases with names, buffers in guarded memory, comparisons.
#pragma once

#include <cinttypes>
#include <memory>
#include <string>
#include <vector>

#include "guarded.h"
#include "kernels.h"
#include "naive.h"

namespace check {

using qlk::DType;

// Names the case that runs from here on, for messages, and counts it.
__attribute__((format(printf, 1, 2))) void name_case(const char* format, ...);
const char* current_case();
// How many cases have begun.
int cases_named();
// Reports the case and exits with 1.
__attribute__((format(printf, 1, 2))) [[noreturn]] void fail(const char* format, ...);

inline const char* name_of(DType dtype) {
    return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Guard kGuards[] = {Guard::kAfter, Guard::kBefore};
constexpr int kNaN = 0xff;  // fills all three dtypes with NaN

// Fails unless every value is within its tolerance.
void expect_close(const char* what, DType dtype, const uint8_t* actual, const Expected& expected);

// A set of guarded buffers: inputs to read, outputs to fill.
class Buffers {
  public:
    explicit Buffers(Guard guard) : guard_(guard) { list_.reserve(32); }

    // An input. Null if it is empty: the kernels take that for an absent argument.
    const uint8_t* input(const std::vector<uint8_t>& content) {
        list_.push_back(Guarded::input(content, guard_));
        return list_.back().data();
    }
    template <class T>
    const T* input(const std::vector<T>& content) {
        return reinterpret_cast<const T*>(input(bytes_of(content)));
    }
    // A buffer that is read and written.
    uint8_t* changing(const std::vector<uint8_t>& content) {
        uint8_t* const to = output(content.size());
        if (!content.empty()) std::memcpy(to, content.data(), content.size());
        return to;
    }
    uint8_t* output(size_t bytes) {
        list_.emplace_back(bytes, guard_, kNaN);
        return list_.back().data();
    }
    qlk::WeightView weight(const Weight& w) {
        qlk::WeightView view{};
        view.n = w.n;
        view.k = w.k;
        view.packed = input(w.packed);
        if (w.double_quant) {
            view.absmax_code = input(w.absmax_code);
            view.nested_absmax = input(w.nested_absmax);
            view.nested_table = input(w.nested_table);
            view.nested_offset = &w.nested_offset;
        } else {
            view.absmax = input(w.absmax);
        }
        return view;
    }
    void expect_rest_untouched() const {
        for (const Guarded& buffer : list_) {
            if (!buffer.rest_untouched()) fail("a write beside a buffer of %zu bytes", buffer.bytes());
        }
    }

  private:
    Guard guard_;
    std::vector<Guarded> list_;
};

// The results of a case's first run: later runs have to give the same bits.
class SameBits {
  public:
    void add(const char* what, const uint8_t* data, size_t bytes) {
        std::vector<uint8_t> now(data, data + bytes);
        if (next_ == seen_.size()) {
            seen_.push_back(std::move(now));
        } else if (seen_[next_] != now) {
            fail("%s has other bits than in the run before", what);
        }
        ++next_;
    }
    void rewind() { next_ = 0; }

  private:
    std::vector<std::vector<uint8_t>> seen_;
    size_t next_ = 0;
};

// The instruction sets of this machine, best first.
std::vector<std::string> instruction_sets();
// Has the kernels use an instruction set from here on.
void use(const std::string& isa);

struct LinearShape {
    int64_t m, n, k, r;
    float dropout;
    bool bias, double_quant;
    int threads;
};
// Forward and backward in all three types. same_bits: whether all of these sets give the same.
void check_linear(const LinearShape& shape, const std::vector<std::string>& isas, Random& random, bool same_bits);

// The checks. isas: instruction sets of this machine.
void check_linears(const std::vector<std::string>& isas);
// part: 0 for all shapes, 1 or 2 for half of them.
void check_large_linears(const std::vector<std::string>& isas, int part);
// A mixture's experts; some without rows, one with most of them.
void check_grouped(const std::vector<std::string>& isas);
void check_dequantize(const std::vector<std::string>& isas);
void check_quantize(const std::vector<std::string>& isas);
void check_quantize_absmax(const std::vector<std::string>& isas);
void check_optimizer(const std::vector<std::string>& isas);

}  // namespace check
