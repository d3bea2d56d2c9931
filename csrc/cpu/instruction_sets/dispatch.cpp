// Picks the instruction set at run time, at every call.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_set>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "error.h"

#if defined(QLK_HAVE_AMX)
#include <sys/syscall.h>
#endif
#include <unistd.h>

namespace qlk::cpu {

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

namespace {

struct Candidate {
    const Kernels* kernels;
    bool available;
};

#if defined(QLK_HAVE_AVX2)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// CPUID leaf 7, queried directly: compilers older than the instructions have no names for them.
bool cpuid7(unsigned subleaf, char reg, int bit) {
    unsigned a = 7, b = 0, c = subleaf, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const unsigned value = reg == 'a' ? a : d;
    return (value >> bit) & 1;
}

bool has_avx512_bf16() { return has_avx512() && cpuid7(1, 'a', 5); }
#endif

#if defined(QLK_HAVE_AMX)
bool has_amx() {
    // CPUID.7.0:EDX bits 24 (AMX-TILE) and 22 (AMX-BF16); then Linux has to grant the tile state, feature 18
    // (Documentation/arch/x86/xstate.rst).
    constexpr int kRequestPermission = 0x1023;
    constexpr int kTileData = 18;
    return has_avx512_bf16() && cpuid7(0, 'd', 24) && cpuid7(0, 'd', 22) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Registry {
    Candidate list[5];
    int count = 0;
    Registry() {
#if defined(QLK_HAVE_AVX2)
        __builtin_cpu_init();
#endif
#if defined(QLK_HAVE_AMX)
        list[count++] = {&amx::kernels, has_amx()};
#endif
#if defined(QLK_HAVE_AVX512_BF16)
        list[count++] = {&avx512_bf16::kernels, has_avx512_bf16()};
#endif
#if defined(QLK_HAVE_AVX512)
        list[count++] = {&avx512::kernels, has_avx512()};
#endif
#if defined(QLK_HAVE_AVX2)
        list[count++] = {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                             __builtin_cpu_supports("f16c")};
#endif
#if defined(QLK_HAVE_NEON)
        list[count++] = {&neon::kernels, true};  // part of every 64-bit ARM
#endif
        list[count++] = {&portable::kernels, true};
    }
    std::string names(bool available_only) const {
        std::string text;
        for (int i = 0; i < count; ++i) {
            if (available_only && !list[i].available) continue;
            text += (text.empty() ? "" : ",") + std::string(list[i].kernels->name);
        }
        return text;
    }
};

const Registry& registry() {
    static const Registry instance;
    return instance;
}

const Kernels& select() {
    const Registry& all = registry();
    const char* forced = std::getenv("QLORA_KERNELS_CPU_ISA");
    if (forced == nullptr || *forced == 0) {
        for (int i = 0; i < all.count; ++i) {
            if (all.list[i].available) return *all.list[i].kernels;
        }
    } else {
        for (int i = 0; i < all.count; ++i) {
            if (all.list[i].available && std::strcmp(forced, all.list[i].kernels->name) == 0) {
                return *all.list[i].kernels;
            }
        }
    }
    fail(__FILE__, __LINE__, "instruction set",
         "QLORA_KERNELS_CPU_ISA=" + std::string(forced ? forced : "") + " is not available here; built in: " +
             all.names(false) + "; available on this machine: " + all.names(true));
}

// How many threads are worth waking for `work` units of work, when a thread does about `per_thread` in the time that
// waking it takes (a few microseconds; much more when other processes want the cores).
int worthwhile(int threads, int64_t work, int64_t per_thread) {
    const int64_t most = work / per_thread + 1;
    return most < threads ? static_cast<int>(most) : threads;
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A large result is usually fresh memory. Huge pages take 512 times fewer page faults; with 4 KB pages the faults cost
// ten times as much as writing 32 MiB of decoded weights.
void fresh_output(void* data, int64_t bytes) {
    if (bytes >= static_cast<int64_t>(2 * kHugePage)) prefer_huge_pages(data, bytes, false);
}

const pid_t process_at_load = getpid();

// A weight is read once a call, and few rows read it at the speed of memory, which 4 KB pages halve. So it is moved to
// huge pages when it is first used; most weights come from files or copies and lie on small ones. What is remembered
// are addresses: memory that is freed and used for another weight at the same address is not looked at again.
void streamed_weight(const WeightView& w) {
    const int64_t bytes = w.n * w.k / 2;
    if (bytes < static_cast<int64_t>(2 * kHugePage)) return;
    // A forked child shares its parent's pages, and moving them would make copies of its own.
    if (getpid() != process_at_load) return;
    static std::mutex mutex;
    static std::unordered_set<const void*> seen;
    {
        // Whoever cannot have the list at once goes without: a child forked while it was held would wait forever.
        const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
        if (!lock) return;
        if (seen.size() > (1u << 16)) seen.clear();
        if (!seen.insert(w.packed).second) return;
    }
    prefer_huge_pages(const_cast<uint8_t*>(w.packed), bytes, true);
}

// For a layer's products with m rows: decoding a weight takes as long as about 16 multiplications.
int linear_threads(int threads, const WeightView& w, int64_t m) {
    return worthwhile(threads, w.n * w.k / 16 * (16 + m), 1 << 17);
}

int64_t experts_with_rows(const int64_t* offsets, int64_t experts) {
    int64_t count = 0;
    for (int64_t e = 0; e < experts; ++e) count += offsets[e + 1] > offsets[e];
    return count;
}

// As many experts as one weight.
WeightView stack_of(const WeightView& first, int64_t experts) {
    WeightView all = first;
    all.n *= experts;
    return all;
}

}  // namespace

int64_t quantize(const QuantizeParams& params) {
    QuantizeParams p = params;
    p.threads = worthwhile(p.threads, p.count, 1 << 15);
    fresh_output(p.packed, p.count / 2);
    return select().quantize(p);
}

void quantize_absmax(const QuantizeAbsmaxParams& params) {
    QuantizeAbsmaxParams p = params;
    p.threads = worthwhile(p.threads, p.count, 1 << 11);
    quantize_absmax(p, select().nearest_codes);
}

void dequantize(const DequantizeParams& params) {
    DequantizeParams p = params;
    const int64_t count = (p.row_end - p.row_begin) * p.weight.k;
    p.threads = worthwhile(p.threads, count, 1 << 16);
    fresh_output(p.out, count * size_of(p.dtype));
    select().dequantize(p);
}

void linear_forward(const LinearForwardParams& params) {
    LinearForwardParams p = params;
    p.threads = linear_threads(p.threads, p.weight, p.m);
    streamed_weight(p.weight);
    fresh_output(p.y, p.m * p.weight.n * size_of(p.dtype));
    select().linear_forward(p);
}

void linear_backward(const LinearBackwardParams& params) {
    LinearBackwardParams p = params;
    p.threads = linear_threads(p.threads, p.weight, p.m);
    if (p.dx) fresh_output(p.dx, p.m * p.weight.k * size_of(p.dtype));
    select().linear_backward(p);
}

void linear_grouped_forward(const GroupedForwardParams& params) {
    GroupedForwardParams all = params;
    LinearForwardParams& p = all.first;
    if (p.m == 0) return;
    const int64_t experts = experts_with_rows(all.offsets, all.experts);
    p.threads = linear_threads(p.threads, stack_of(p.weight, experts), p.m / experts);
    streamed_weight(stack_of(p.weight, all.experts));
    fresh_output(p.y, p.m * p.weight.n * size_of(p.dtype));
    grouped_forward(all, select());
}

void linear_grouped_backward(const GroupedBackwardParams& params) {
    GroupedBackwardParams all = params;
    LinearBackwardParams& p = all.first;
    const int64_t experts = std::max<int64_t>(1, experts_with_rows(all.offsets, all.experts));
    p.threads = linear_threads(p.threads, stack_of(p.weight, experts), p.m / experts);
    if (p.dx) fresh_output(p.dx, p.m * p.weight.k * size_of(p.dtype));
    grouped_backward(all, select());
}

static OptimizerParams with_worthwhile_threads(OptimizerParams p) {
    p.threads = worthwhile(p.threads, p.all_chunks * kChunk, 1 << 15);
    return p;
}

void optimizer_step(const OptimizerParams& params, const double* sum_of_squares) {
    optimizer_step(with_worthwhile_threads(params), sum_of_squares, select());
}

void optimizer_sums(const OptimizerParams& params) { optimizer_sums(with_worthwhile_threads(params), select()); }

void quantize_states(const float* values, uint8_t* code, float* absmax, int64_t count, bool is_signed) {
    select().quantize_states(values, code, absmax, count, is_signed);
}

const char* isa_in_use() { return select().name; }

const char* isas_built() {
    static const std::string names = registry().names(false);
    return names.c_str();
}

const char* isas_available() {
    static const std::string names = registry().names(true);
    return names.c_str();
}

}  // namespace qlk::cpu
