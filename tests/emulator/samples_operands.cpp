// Kernels with one access outside the operands that their launch was given. There is memory all around these, so that
// nothing else would notice.
#include <stdexcept>

#include <ptx_sm90.cuh>

#include "operands.h"
#include "samples.h"

// Not in emu, which has functions of the same names.
namespace operands {
namespace {

using namespace qlk::cuda;

constexpr int kRoom = 64, kWords = 62;  // words of memory for each operand, and of the operand
constexpr size_t kBytes = 4 * kWords;

struct Arguments {
    const uint32_t* in;
    uint32_t* out;
    TensorMap in_map, out_map;  // rows of 16 bytes, one more than fits
};
struct Shared {
    uint32_t words[kRoom];
    MBarrier barrier;
};

int id() { return static_cast<int>(threadIdx.x); }

// Uses all of both operands, and no more: the last copy is half zeros, which are not read.
void all(Arguments a) {
    auto& s = shared_memory<Shared>();
    if (id() < kRoom / 4) cp_async_16(s.words + 4 * id(), a.in + 4 * id(), id() < kWords / 4 ? 16 : 8);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    if (id() < kWords) store_global(a.out + id(), load_shared(s.words + id()));
    if (id() < kWords) atomicAdd(a.out + id(), load_global(a.in + id()));
    if (id() != kRoom - 1) return;
    bulk_store(a.out, s.words, 16);
    bulk_commit();
    bulk_wait<0>();
}

void load_beyond(Arguments a) { load_global(a.in + kWords); }
void load_before(Arguments a) { load_global(a.in - 1); }
void load_across(Arguments a) { ld_global_once_16(a.in + kWords - 2); }
void changing_load_beyond(Arguments a) { load_changing(a.out + kWords); }
void exchanged_load_beyond(Arguments a) { load_exchanged(a.out + kWords + 1); }
void copy_across(Arguments a) { cp_async_16(shared_memory<Shared>().words, a.in + kWords - 2); }
void store_beyond(Arguments a) { store_global(a.out + kWords, 1u); }
void store_before(Arguments a) { store_global(a.out - 1, 1u); }
void store_across(Arguments a) { st_global_16(a.out + kWords - 2, uint4{}); }
void store_to_the_input(Arguments a) { store_global(const_cast<uint32_t*>(a.in) + 5, 1u); }
void exchanged_store_beyond(Arguments a) { store_exchanged(a.out + kWords, 1u); }
void atomic_beyond(Arguments a) { atomicAdd(a.out + kWords, 1u); }
void atomic_on_the_input(Arguments a) { atomicAdd(const_cast<uint32_t*>(a.in), 1u); }

// One thread's copies into and out of shared memory.
template <class Copy>
void load_by(Copy copy) {
    auto& s = shared_memory<Shared>();
    mbarrier_init(s.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(s.barrier, sizeof s.words);
    copy(s);
    mbarrier_wait(s.barrier, 0);
}
template <class Copy>
void store_by(Copy copy) {
    auto& s = shared_memory<Shared>();
    for (uint32_t& word : s.words) store_shared(&word, 1u);
    fence_proxy_async();
    copy(s);
    bulk_commit();
    bulk_wait<0>();
}
void bulk_load_across(Arguments a) {
    load_by([&](Shared& s) { bulk_load(s.words, a.in, sizeof s.words, s.barrier); });
}
void tensor_load_across(Arguments a) {
    load_by([&](Shared& s) { tensor_load(s.words, a.in_map, 0, 0, s.barrier); });
}
void bulk_store_across(Arguments a) {
    store_by([&](Shared& s) { bulk_store(a.out, s.words, sizeof s.words); });
}
void tensor_store_across(Arguments a) {
    store_by([&](Shared& s) { tensor_store(a.out_map, 0, 0, s.words); });
}
void bulk_store_to_the_input(Arguments a) {
    store_by([&](Shared& s) { bulk_store(const_cast<uint32_t*>(a.in), s.words, 16); });
}

// The first of two launches, which is held back until the second one waits for it.
void lets_next_and_loads_beyond(Arguments a) {
    griddep_launch();
    load_beyond(a);
}
void waits(Arguments) { griddep_wait(); }

struct Sample {
    const char* name;
    void (*kernel)(Arguments);
    int threads = 1;
    void (*next)(Arguments) = nullptr;  // a launch that may overtake this one
};
const Sample kSamples[] = {
    {"all", all, kRoom},
    {"load beyond", load_beyond},
    {"load before", load_before},
    {"load across the end", load_across},
    {"changing load beyond", changing_load_beyond},
    {"exchanged load beyond", exchanged_load_beyond},
    {"copy across the end", copy_across},
    {"store beyond", store_beyond},
    {"store before", store_before},
    {"store across the end", store_across},
    {"store to the input", store_to_the_input},
    {"exchanged store beyond", exchanged_store_beyond},
    {"atomic operation beyond", atomic_beyond},
    {"atomic operation on the input", atomic_on_the_input},
    {"bulk load across the end", bulk_load_across},
    {"tensor load across the end", tensor_load_across},
    {"bulk store across the end", bulk_store_across},
    {"tensor store across the end", tensor_store_across},
    {"bulk store to the input", bulk_store_to_the_input},
    {"launch that is overtaken", lets_next_and_loads_beyond, 1, waits},
};

}  // namespace
}  // namespace operands

namespace emu {

std::vector<std::string> operand_samples() {
    std::vector<std::string> names;
    for (const auto& sample : operands::kSamples) names.emplace_back(sample.name);
    return names;
}

void run_operand_sample(const std::string& name, bool stated) {
    using namespace operands;
    for (const Sample& sample : kSamples) {
        if (name != sample.name) continue;
        const Exact memory(4 * kRoom);
        std::fill_n(memory.words(), 4 * kRoom, 1u);
        uint32_t *const in = memory.words() + kRoom, *const out = in + kRoom;
        const auto map = [](uint32_t* words) {
            return make_tensor_map(reinterpret_cast<uint16_t*>(words), kRoom / 4, 8, 16, kRoom / 4, 8, Swizzle::kNone);
        };
        Operands all("the sample");
        all.reads("in", in, kBytes);
        all.writes("out", out, kBytes);
        const Arguments arguments{in, out, map(in), map(out)};
        {
            // Launches have the operands of the time when they are made, not of when they run.
            std::unique_ptr<Given> given;
            if (stated) given = std::make_unique<Given>(all);
            qlk::cuda::launch(sample.kernel, 1, sample.threads, sizeof(Shared), {}, arguments,
                              sample.next ? Start::kFollowed : Start::kInOrder);
        }
        if (sample.next) qlk::cuda::launch(sample.next, 1, 1, 0, {}, arguments, Start::kEarly);
        return;
    }
    throw std::invalid_argument("no sample '" + name + "'");
}

}  // namespace emu
