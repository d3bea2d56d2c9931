// Runs every CPU kernel for 64-bit ARM, `neon` and `portable`, without torch or Python and in guarded memory: each
// against plain loops in float64 (float32 for an optimizer), and all bits of `neon` against `portable`'s. The checks
// are those of tests/sanitize, at sizes that an emulator gets through; csrc/CMakeLists.txt builds it with
// -DQLK_ARM_CHECK=ON. It stops at the first failure, names the case and exits with 1.
#include <csignal>

#include "check.h"

namespace check {
namespace {

// An access beside a buffer. Whatever ran, the name of the case is in static memory.
void on_fault(int) {
    std::fprintf(stderr, "arm_check: FAILED: a fault in %s\n", current_case());
    std::_Exit(1);
}

// Every number of rows that the kernels for few rows take, none, and one more.
void check_few_rows(const std::vector<std::string>& isas) {
    Random random(11);
    struct Size {
        int64_t n, k;
    };
    const Size sizes[] = {
        {1, 64},    // one block
        {33, 320},  // a task and a row; a run of four blocks and one
        {7, 100},   // blocks that rows cut
        {35, 63},   // rows that begin in the middle of a byte
        {5, 1344},  // more than a part of K at 4 rows and more
    };
    const int64_t ranks[] = {0, 1, 5, 16, 65};
    int index = 0;
    for (int64_t m = 0; m <= 17; ++m) {
        for (const Size& size : sizes) {
            LinearShape s{m, size.n, size.k, ranks[(index + index / 5) % 5], 0.0f, false, false, 1};
            s.dropout = s.r > 0 && index % 4 == 0 ? 0.3f : 0.0f;
            s.bias = random.bits() % 2;
            s.double_quant = random.bits() % 2;
            s.threads = index % 2 ? 1 : 3;
            check_linear(s, isas, random, true);
            ++index;
        }
    }
}

// Constants that are no numbers or at an end of their range: what they decode to has the same bits too. Only a NaN is
// any NaN, as the compiler may make -1 * x a change of sign.
void check_special_constants(const std::vector<std::string>& isas) {
    constexpr uint32_t kBits[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7fc12345, 0xffd54321, 0x7fa00001, 0x00000001,
                                  0x80000fff, 0x33000000, 0x387fe000, 0x477ff000, 0x477fefff, 0x7f7fffff, 0xff7fffff};
    Random random(13);
    Weight weight(std::size(kBits), 64, false, random);
    std::memcpy(weight.absmax.data(), kBits, sizeof kBits);
    for (DType dtype : kDTypes) {
        SameBits bits;
        for (const std::string& isa : isas) {
            use(isa);
            name_case("dequantize %s %s special constants", isa.c_str(), name_of(dtype));
            Buffers buffers(Guard::kAfter);
            const size_t bytes = weight.n * weight.k * size_of(dtype);
            uint8_t* const out = buffers.output(bytes);
            qlk::cpu::dequantize({buffers.weight(weight), out, 0, weight.n, dtype, 1});
            for (size_t i = 0; i < bytes; i += size_of(dtype)) {
                if (std::isnan(load(dtype, out + i))) store(dtype, NAN, out + i);
            }
            bits.add("the weight", out, bytes);
            bits.rewind();
        }
    }
}

void check_large(const std::vector<std::string>& isas) {
    Random random(12);
    const LinearShape shapes[] = {
        // Long sums, of few rows and of more; with enough work for three threads.
        {1, 5, 53248, 2, 0.0f, true, true, 3},
        {16, 1, 53248, 0, 0.0f, false, false, 1},
        // More rows of x than scratch takes as float32.
        {16, 1, 131136, 0, 0.0f, false, true, 1},
        {3, 130, 4160, 3, 0.0f, true, true, 3},
        // Both halves of a block of 32 rows, a panel of 128 columns and more, and two superblocks.
        {33, 130, 192, 16, 0.3f, true, true, 3},
        {65, 33, 130, 33, 0.0f, false, false, 1},
        {520, 3, 64, 1, 0.0f, true, true, 1},
    };
    for (const LinearShape& s : shapes) check_linear(s, isas, random, true);
}

}  // namespace
}  // namespace check

int main() {
    using namespace check;
    std::signal(SIGSEGV, on_fault);
    std::signal(SIGBUS, on_fault);
    const std::vector<std::string> isas = instruction_sets();
    if (isas != std::vector<std::string>{"neon", "portable"}) fail("available here: %s", qlk::cpu::isas_available());
    check_few_rows(isas);
    check_large(isas);
    check_grouped(isas);
    check_special_constants(isas);
    check_dequantize(isas);
    check_quantize(isas);
    check_quantize_absmax(isas);
    check_optimizer(isas);
    std::printf("arm_check: %d cases passed\n", cases_named());
    return 0;
}
