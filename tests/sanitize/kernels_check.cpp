// Runs every CPU kernel on every instruction set of this machine, without torch or Python, under AddressSanitizer and
// UBSan and in guarded memory, and compares the results with plain loops: float64, or float32 for an optimizer.
// csrc/CMakeLists.txt builds it with -DQLK_SANITIZE=ON. It stops at the first failure, names the case and exits with 1.
//
// Without an argument it runs everything. "kernels_check 1" and "kernels_check 2" each run half of it, so that two
// processors can share the work.
//
// Each case runs twice: with the ends of all buffers at a guard page, and with their beginnings. Both have to give the
// same bits. Inputs are read-only, outputs start as NaN, and so does scratch memory, which is guarded too.
#include <sanitizer/common_interface_defs.h>

#include "check.h"

// The sanitizers' runtime calls it after its own report, also for a fault in a guard page.
static void on_death() { std::fprintf(stderr, "kernels_check: FAILED in %s\n", check::current_case()); }

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
        check_grouped(isas);
        check_linears(isas);
    }
    check_large_linears(isas, part);
    std::printf("kernels_check: %d cases passed\n", cases_named());
    return 0;
}
