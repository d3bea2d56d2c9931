// The definitions of check.h, and scratch memory for the kernels under check.
#include "check.h"

#include <cstdarg>
#include <sstream>

#include "cpu/scratch.h"

namespace qlk::cpu {

// The real scratch(), renamed by CMakeLists.txt.
char* arena_scratch(size_t bytes, int threads);

// Replaces it for the kernels: scratch memory is fresh NaNs, and an access past its end is a fault.
char* scratch(size_t bytes, int threads) {
    thread_local std::unique_ptr<Guarded> area;  // as the real one has an arena for each calling thread
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

}  // namespace

void name_case(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(current, sizeof current, format, arguments);
    va_end(arguments);
    ++cases;
}

const char* current_case() { return current; }
int cases_named() { return cases; }

void fail(const char* format, ...) {
    std::fprintf(stderr, "%s: FAILED: %s: ", program_invocation_short_name, current);
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

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    std::istringstream list(qlk::cpu::isas_available());
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
}

void use(const std::string& isa) {
    setenv("QLORA_KERNELS_CPU_ISA", isa.c_str(), 1);
    if (isa != qlk::cpu::isa_in_use()) fail("asked for %s, got %s", isa.c_str(), qlk::cpu::isa_in_use());
}

}  // namespace check
