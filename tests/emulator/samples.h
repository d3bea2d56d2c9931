// Kernels that test the emulator itself: some right, most with one fault that it has to find.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

namespace emu {

// So many words and no byte more, for AddressSanitizer: a vector may own more than it holds.
class Exact {
  public:
    explicit Exact(size_t words) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, words ? words * 4 : 1) != 0) throw std::bad_alloc();
        words_ = static_cast<uint32_t*>(memory);
    }
    ~Exact() { std::free(words_); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;
    uint32_t* words() const { return words_; }

  private:
    uint32_t* words_;
};

std::vector<std::string> samples();
// Runs one on copies of the input, exactly as large, and gives its output; words that it did not write are 0xffffffff.
std::vector<uint32_t> run_sample(const std::string& name, const std::vector<uint32_t>& input, size_t output,
                                 int threads, int blocks);
// Those of sm90_kernels.cuh: a product, input [2][64][K] of 16-bit elements, or a cluster, whole and each without one
// of its parts. "product kFull" lacks that part. The tensors are of copies, exactly as large.
std::vector<std::string> sm90_samples();
std::vector<uint32_t> run_sm90_sample(const std::string& name, const std::vector<uint32_t>& input);

}  // namespace emu
