// Kernels that test the emulator itself: some are right, most have one fault that it has to find.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

namespace emu {

// Exactly this many words. A vector may own more than it holds, and AddressSanitizer would miss accesses there.
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
// Runs one on exactly sized copies of the input and returns its output; words that it did not write are 0xffffffff.
std::vector<uint32_t> run_sample(const std::string& name, const std::vector<uint32_t>& input, size_t output,
                                 int threads, int blocks);
// Calls that concern device 1. guarded: that device is current then; otherwise device 0 is, and each is an error.
std::vector<std::string> device_samples();
void run_device_sample(const std::string& name, bool guarded);
// Kernels with an access outside their operands. stated: the launch knows these, and the access is an error.
std::vector<std::string> operand_samples();
void run_operand_sample(const std::string& name, bool stated);
// The kernels of sm90_kernels.cuh, complete and without one of their parts: a product, input [2][64][K] of 16-bit
// elements, and a cluster. "product kFull" lacks that part. Tensors are exactly sized copies.
std::vector<std::string> sm90_samples();
std::vector<uint32_t> run_sm90_sample(const std::string& name, const std::vector<uint32_t>& input);

}  // namespace emu
