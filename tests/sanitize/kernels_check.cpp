// Runs every CPU kernel on every instruction set of this machine, without torch or Python, under AddressSanitizer and
// UBSan and in guarded memory, and compares the results with plain loops: float64, or float32 for an optimizer.
// csrc/CMakeLists.txt builds it with -DQLK_SANITIZE=ON. It stops at the first failure, names the case and exits with 1.
//
// Without an argument it runs everything. "kernels_check 1" and "kernels_check 2" each run half of it, so that two
// processors can share the work.
//
// Each case runs twice: with the ends of all buffers at a guard page, and with their beginnings. Both have to give the
// same bits. Inputs are read-only, outputs start as NaN, and so does scratch memory, which is guarded too.
#include <cstdarg>
#include <sstream>

#include <sanitizer/common_interface_defs.h>

#include "check.h"
#include "cpu/scratch.h"

namespace qlk::cpu {

// The real scratch(), renamed by CMakeLists.txt.
char* arena_scratch(size_t bytes, int threads);

// Replaces it for the kernels: scratch memory is fresh NaNs, and an access past its end is a fault.
char* scratch(size_t bytes, int threads) {
    static std::unique_ptr<Guarded> area;
    if (bytes > kScratchPerThread * static_cast<size_t>(threads)) {
        std::fprintf(stderr, "%zu bytes of scratch for %d threads are more than 8 MiB each\n", bytes, threads);
        std::abort();
    }
    char* const real = arena_scratch(bytes, threads);
    if (reinterpret_cast<uintptr_t>(real) % 64 != 0) std::abort();
    if (bytes > 0) real[0] = real[bytes - 1] = 0;
    if (!area || area->bytes() < bytes) area = std::make_unique<Guarded>(bytes, Guard::kAfter, 0xff);
    uint8_t* const begin = area->data() + (area->bytes() - bytes) / 64 * 64;
    std::memset(begin, 0xff, bytes);
    return reinterpret_cast<char*>(begin);
}

}  // namespace qlk::cpu

namespace check {
namespace {

char current[256] = "before the first case";
int cases = 0;

// The sanitizers' runtime calls it after its own report, also for a fault in a guard page.
void on_death() { std::fprintf(stderr, "kernels_check: FAILED in %s\n", current); }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    std::istringstream list(qlk::cpu::isas_available());
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
}

}  // namespace

void name_case(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(current, sizeof current, format, arguments);
    va_end(arguments);
    ++cases;
}

void fail(const char* format, ...) {
    std::fprintf(stderr, "kernels_check: FAILED: %s: ", current);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::exit(1);
}

void expect_close(const char* what, DType dtype, const uint8_t* actual, const Expected& expected) {
    for (size_t i = 0; i < expected.value.size(); ++i) {
        const double value = load(dtype, actual + i * size_of(dtype));
        const double error = std::fabs(value - expected.value[i]);
        // Written so that NaN fails.
        if (!(error < expected.tolerance[i])) {
            fail("%s[%zu] is %.9g, should be %.9g within %.3g", what, i, value, expected.value[i],
                 expected.tolerance[i]);
        }
    }
}

void use(const std::string& isa) {
    setenv("QLORA_KERNELS_CPU_ISA", isa.c_str(), 1);
    if (isa != qlk::cpu::isa_in_use()) fail("asked for %s, got %s", isa.c_str(), qlk::cpu::isa_in_use());
}

}  // namespace check

int main(int count, char** arguments) {
    using namespace check;
    __sanitizer_set_death_callback(on_death);
    const std::string text = count > 1 ? arguments[1] : "0";
    const int part = text == "1" ? 1 : text == "2" ? 2 : 0;
    if (count > 2 || (count == 2 && part == 0)) {
        std::fprintf(stderr, "usage: kernels_check [1 | 2]\n");
        return 2;
    }
    const std::vector<std::string> isas = instruction_sets();
    std::printf("kernels_check: built in %s; available here %s\n", qlk::cpu::isas_built(), qlk::cpu::isas_available());
    std::fflush(stdout);
    if (part != 2) {
        check_optimizer(isas);
        check_quantize_absmax(isas);
        check_quantize(isas);
        check_dequantize(isas);
        check_linears(isas);
    }
    check_large_linears(isas, part);
    std::printf("kernels_check: %d cases passed\n", cases);
    return 0;
}
