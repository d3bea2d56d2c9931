#include "samples.h"

#include "operands.h"

#include <memory>
#include <optional>
#include <stdexcept>

#include <memory.cuh>
#include <ptx.cuh>

namespace emu {
namespace {

using namespace qlk::cuda;
constexpr uint32_t kAll = 0xffffffffu;

struct Arguments {
    const uint32_t* in;
    uint32_t* out;
    uint32_t* between;  // as large as the input: what the first of two launches makes for the second
};

int id() { return static_cast<int>(threadIdx.x); }
int size() { return static_cast<int>(blockDim.x); }
uint32_t* words() { return reinterpret_cast<uint32_t*>(shared_bytes()); }

// out[i] = in[n - 1 - i] through shared memory.
template <bool kBarrier>
void reverse(Arguments a) {
    store_shared(words() + id(), load_global(a.in + id()));
    if (kBarrier) __syncthreads();
    store_global(a.out + id(), load_shared(words() + size() - 1 - id()));
}

// Four rounds through one buffer: each thread reads what its neighbour wrote. Without a round's second barrier, the
// buffer is overwritten while others still read.
template <bool kBefore, bool kAfter>
void rounds(Arguments a) {
    uint32_t value = load_global(a.in + id());
    for (int round = 0; round < 4; ++round) {
        store_shared(words() + id(), value);
        if (kBefore) __syncthreads();
        value = load_shared(words() + (id() + 33) % size()) + 1;
        if (kAfter) __syncthreads();
    }
    store_global(a.out + id(), value);
}

// The same within a warp.
template <bool kBefore, bool kAfter>
void warp_rounds(Arguments a) {
    uint32_t value = load_global(a.in + id());
    const int first = id() / 32 * 32;
    for (int round = 0; round < 4; ++round) {
        store_shared(words() + id(), value);
        if (kBefore) __syncwarp();
        value = load_shared(words() + first + (id() + 1) % 32) + 1;
        if (kAfter) __syncwarp();
    }
    store_global(a.out + id(), value);
}

// A ring of three stages of copies, two of them under way. kWait = 1 is right; 2 waits for one group too few. kAhead =
// 2 fills the stage that was read a step ago; 3 fills the one that others are still reading.
template <int kWait, int kAhead>
void pipeline(Arguments a) {
    constexpr int kStages = 3, kSteps = 8;
    const auto slot = [](int stage, int thread) { return words() + (stage * size() + thread) * 4; };
    const auto issue = [&](int step) {
        if (step < kSteps) cp_async_16(slot(step % kStages, id()), a.in + (step * size() + id()) * 4);
        cp_async_commit();
    };
    for (int step = 0; step < kAhead; ++step) issue(step);
    uint32_t sum = 0;
    for (int step = 0; step < kSteps; ++step) {
        cp_async_wait<kWait + kAhead - 2>();
        __syncthreads();
        sum = sum * 31 + load_shared(slot(step % kStages, (id() + 1) % size()));
        issue(step + kAhead);
    }
    store_global(a.out + id(), sum);
}

// Half of the threads produce, half consume, through two named barriers.
template <bool kFull, bool kEmpty>
void producer_consumer(Arguments a) {
    const int half = size() / 2;
    uint32_t sum = 0;
    for (int round = 0; round < 4; ++round) {
        if (id() < half) {
            if (kEmpty && round > 0) bar_sync(2, size());
            store_shared(words() + id(), load_global(a.in + round * half + id()));
            if (kFull) bar_arrive(1, size());
        } else {
            if (kFull) bar_sync(1, size());
            sum = sum * 31 + load_shared(words() + (id() + 33) % half);
            if (kEmpty && round < 3) bar_arrive(2, size());
        }
    }
    if (id() >= half) store_global(a.out + id() - half, sum);
}

void shared_sum(Arguments a) {
    if (id() == 0) store_shared(words(), 0u);
    __syncthreads();
    atomicAdd(words(), load_global(a.in + id()));
    __syncthreads();
    if (id() == 0) store_global(a.out + blockIdx.x, load_shared(words()));
}

void warp_sum(Arguments a) {
    uint32_t value = load_global(a.in + id());
    for (int stride = 16; stride > 0; stride /= 2) value += __shfl_down_sync(kAll, value, stride);
    if (id() % 32 == 0) store_global(a.out + id() / 32, value);
}

void count_odd(Arguments a) {
    const int odd = __syncthreads_count(load_global(a.in + id()) % 2);
    store_global(a.out + id(), static_cast<uint32_t>(odd));
}

// The second half of the threads leaves; the others go on meeting.
void early_exit(Arguments a) {
    if (id() >= size() / 2) return;
    store_shared(words() + id(), load_global(a.in + id()));
    __syncthreads();
    store_global(a.out + id(), load_shared(words() + size() / 2 - 1 - id()));
}

// Block 0 waits for a flag that block 1 sets.
void wait_for_block(Arguments a) {
    if (id() != 0) return;
    if (blockIdx.x == 1) {
        atomicExch(a.out, 42u);
    } else {
        while (atomicAdd(a.out, 0u) != 42u) spin(Site::here());
        store_global(a.out + 1, 1u);
    }
}

template <int kStride>
void strided(Arguments a) {
    store_shared(words() + id() * kStride, static_cast<uint32_t>(id()));
    store_global(a.out + id() * kStride, load_shared(words() + id() * kStride));
}

void wide(Arguments a) {
    const auto* in = reinterpret_cast<const uint4*>(a.in) + id();
    auto* shared = reinterpret_cast<uint4*>(shared_bytes()) + id();
    store_shared(shared, load_global(in));
    store_global(reinterpret_cast<uint4*>(a.out) + id(), load_shared(shared));
}

void unset(Arguments a) { store_global(a.out + id(), load_shared(words() + id())); }
void shared_out_of_range(Arguments) { store_shared(words() + (1 << 14), 1u); }
void misaligned(Arguments a) {
    store_global(reinterpret_cast<uint32_t*>(reinterpret_cast<unsigned char*>(a.out) + 2), 1u);
}
void barrier_in_a_branch(Arguments) {
    if (id() < size() / 2) {
        bar_sync(1, size());
    } else {
        bar_sync(2, size());
    }
}
void lane_that_left(Arguments a) {
    if (id() == 5) return;
    store_global(a.out + id(), __shfl_sync(kAll, 1u, 0));
}
void different_operations(Arguments a) {
    const uint32_t value = id() % 2 ? __shfl_sync(kAll, 1u, 0) : __ballot_sync(kAll, 1);
    store_global(a.out + id(), value);
}
void mask_without_self(Arguments a) { store_global(a.out + id(), __shfl_sync(1u, 1u, 0)); }
void barrier_of_33(Arguments) { bar_sync(1, 33); }
void copy_of_a_byte_too_many(Arguments a) { cp_async_16(words(), a.in, 17); }
void throws(Arguments) {
    __syncthreads();
    if (id() == 3) throw std::runtime_error("from thread 3");
    __syncthreads();
}
// By a plain access, of which the emulator learns nothing.
void read_beyond_the_input(Arguments a) { store_global(a.out + id(), a.in[id() + 1]); }

// Lanes meet in a shuffle between store and load, but a shuffle promises nothing about memory.
void shuffle_for_a_barrier(Arguments a) {
    store_shared(words() + id(), load_global(a.in + id()));
    (void)__shfl_sync(kAll, 0u, 0);
    store_global(a.out + id(), load_shared(words() + (id() ^ 31)));
}

void bytes_of_a_word(Arguments a) {
    store_shared(shared_bytes() + id(), static_cast<unsigned char>(load_global(a.in + id())));
    __syncthreads();
    if (id() < size() / 4) store_global(a.out + id(), load_shared(words() + id()));
}

// The last block adds what all have left. The right pattern, and without each of its parts.
template <bool kMeet, bool kPublish, bool kTakeUp>
void last_block_adds(Arguments a) {
    uint32_t* const left = a.out + 2;  // [blocks][threads]
    store_exchanged(left + blockIdx.x * size() + id(), load_global(a.in + id()));
    if (kMeet) __syncthreads();
    if (id() == 0) {
        if (kPublish) fence_acq_rel();
        const uint32_t before = kTakeUp ? atom_add_acquire(a.out, 1u) : atomicAdd(a.out, 1u);
        store_shared(words(), before + 2u == gridDim.x ? 1u : 0u);  // out starts as -1
    }
    __syncthreads();
    if (!load_shared(words())) return;
    uint32_t sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += load_exchanged(left + block * size() + id());
    atomicAdd(a.out + 1, sum);
}

// The last block overwrites what all have read. The right pattern, and without each of its parts.
template <bool kPublish, bool kTakeUp>
void last_block_overwrites(Arguments a) {
    store_global(a.out + 2 + blockIdx.x * size() + id(), load_exchanged(a.in + id()));
    __syncthreads();
    if (id() == 0) {
        if (kPublish) __threadfence();
        store_shared(words(), atomicAdd(a.out, 1u) + 2u == gridDim.x ? 1u : 0u);  // out starts as -1
        if (kTakeUp) __threadfence();
    }
    __syncthreads();
    if (load_shared(words())) store_exchanged(const_cast<uint32_t*>(a.in) + id(), id());
}

struct Sample {
    const char* name;
    void (*kernel)(Arguments);
    void (*before)(Arguments) = nullptr;  // a launch that this one may overtake
    bool overwrites = false;              // its input
    int carveout = -1;                    // of this launch alone
};

// The first of two launches: between[i] = 3 in[i], in all blocks.
template <bool kLetsNext = true>
void make_between(Arguments a) {
    const int i = static_cast<int>(blockIdx.x) * size() + id();
    if (kLetsNext) griddep_launch();
    store_global(a.between + i, 3 * load_global(a.in + i));
}

enum class Fault { kNone, kNoWait, kReadsBefore, kWritesBefore, kOneWaits, kEnds };
// The second: out[i] = in[i] + what the first made of the next element.
template <Fault kFault>
void early(Arguments a) {
    const int all = static_cast<int>(gridDim.x) * size(), i = static_cast<int>(blockIdx.x) * size() + id();
    const uint32_t mine = load_global(a.in + i);
    uint32_t before = 0;
    if (kFault == Fault::kEnds && id() == 3) return;
    if (kFault == Fault::kReadsBefore) before = load_changing(a.between + (i + 1) % all);
    if (kFault == Fault::kWritesBefore) store_global(a.out + i, mine);
    if (kFault != Fault::kNoWait && (kFault != Fault::kOneWaits || id() == 0)) griddep_wait();
    if (kFault == Fault::kOneWaits) __syncthreads();
    if (kFault != Fault::kReadsBefore) before = load_changing(a.between + (i + 1) % all);
    store_global(a.out + i, mine + before);
}

const Sample kSamples[] = {
    {"early", early<Fault::kNone>, make_between<>},
    {"early with another carve-out", early<Fault::kNone>, make_between<>, false, 100},
    {"early behind one that does not let it", early<Fault::kNone>, make_between<false>},
    {"early without a wait", early<Fault::kNoWait>, make_between<>},
    {"early of which a thread ends", early<Fault::kEnds>, make_between<>},
    {"early that reads before its wait", early<Fault::kReadsBefore>, make_between<>},
    {"early that writes before its wait", early<Fault::kWritesBefore>, make_between<>},
    {"early of which one thread waits", early<Fault::kOneWaits>, make_between<>},
    {"reverse", reverse<true>},
    {"reverse without its barrier", reverse<false>},
    {"rounds", rounds<true, true>},
    {"rounds without the first barrier", rounds<false, true>},
    {"rounds without the second barrier", rounds<true, false>},
    {"warp rounds", warp_rounds<true, true>},
    {"warp rounds without the first barrier", warp_rounds<false, true>},
    {"warp rounds without the second barrier", warp_rounds<true, false>},
    {"pipeline", pipeline<1, 2>},
    {"pipeline that waits for too little", pipeline<2, 2>},
    {"pipeline that reuses a stage too early", pipeline<1, 3>},
    {"producer and consumer", producer_consumer<true, true>},
    {"producer and consumer without full", producer_consumer<false, true>},
    {"producer and consumer without empty", producer_consumer<true, false>},
    {"shared sum", shared_sum},
    {"warp sum", warp_sum},
    {"count odd", count_odd},
    {"early exit", early_exit},
    {"wait for a block", wait_for_block},
    {"last block adds", last_block_adds<true, true, true>},
    {"last block adds without a barrier", last_block_adds<false, true, true>},
    {"last block adds without publishing", last_block_adds<true, false, true>},
    {"last block adds without taking up", last_block_adds<true, true, false>},
    {"last block overwrites", last_block_overwrites<true, true>, nullptr, true},
    {"last block overwrites without publishing", last_block_overwrites<false, true>, nullptr, true},
    {"last block overwrites without taking up", last_block_overwrites<true, false>, nullptr, true},
    {"stride 1", strided<1>},
    {"stride 2", strided<2>},
    {"stride 32", strided<32>},
    {"stride 33", strided<33>},
    {"wide", wide},
    {"unset shared memory", unset},
    {"shared access out of range", shared_out_of_range},
    {"misaligned access", misaligned},
    {"barrier in a branch", barrier_in_a_branch},
    {"lane that left", lane_that_left},
    {"different operations", different_operations},
    {"mask without self", mask_without_self},
    {"barrier of 33", barrier_of_33},
    {"copy of a byte too many", copy_of_a_byte_too_many},
    {"throws", throws},
    {"shuffle instead of a barrier", shuffle_for_a_barrier},
    {"bytes of a word", bytes_of_a_word},
    {"read beyond the input", read_beyond_the_input},
};

}  // namespace

std::vector<std::string> samples() {
    std::vector<std::string> names;
    for (const Sample& sample : kSamples) names.emplace_back(sample.name);
    return names;
}

std::vector<uint32_t> run_sample(const std::string& name, const std::vector<uint32_t>& input, size_t output,
                                 int threads, int blocks) {
    for (const Sample& sample : kSamples) {
        if (name != sample.name) continue;
        const Exact in(input.size()), out(output), between(input.size());
        std::copy(input.begin(), input.end(), in.words());
        std::fill_n(out.words(), output, 0xffffffffu);
        std::fill_n(between.words(), input.size(), 0xffffffffu);
        const Arguments arguments{in.words(), out.words(), between.words()};
        Operands all("a sample");
        sample.overwrites ? all.writes("in", in.words(), 4 * input.size())
                          : all.reads("in", in.words(), 4 * input.size());
        all.writes("out", out.words(), 4 * output);
        all.writes("between", between.words(), 4 * input.size());
        const Given given(std::move(all));
        const auto run = [&](void (*kernel)(Arguments), Start start, int carveout) {
            launch(
                {static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, 16 * 1024,
                [=] { kernel(arguments); }, start, 1, carveout);
        };
        if (sample.before) run(sample.before, Start::kFollowed, -1);
        run(sample.kernel, sample.before ? Start::kEarly : Start::kInOrder, sample.carveout);
        return {out.words(), out.words() + output};
    }
    throw std::invalid_argument("no sample '" + name + "'");
}

// ---------------------------------------------------------------------------------------------------------- devices

namespace {

void writes(Arguments a) { store_global(a.out, 1u); }

// A word of device 1's memory, freed in the end.
using Word = std::unique_ptr<uint32_t, void (*)(void*)>;
Word device_word() { return {static_cast<uint32_t*>(qlk::cuda::allocate_device(4, 1)), qlk::cuda::free_device}; }
Word managed_word() { return {static_cast<uint32_t*>(qlk::cuda::allocate_managed(4, 1)), qlk::cuda::free_managed}; }

struct DeviceSample {
    const char* name;
    void (*run)();
};
const DeviceSample kDeviceSamples[] = {
    {"launch",
     [] {
         const Exact word(1);
         qlk::cuda::launch(writes, 1, 1, 0, Stream{1, nullptr}, Arguments{nullptr, word.words(), nullptr});
     }},
    {"memory",
     [] {
         const Word word = device_word();
         qlk::cuda::launch(writes, 1, 1, 0, Stream{current_device(), nullptr}, Arguments{nullptr, word.get(), nullptr});
     }},
    {"managed memory",
     [] {
         const Word word = managed_word();
         qlk::cuda::launch(writes, 1, 1, 0, Stream{current_device(), nullptr}, Arguments{nullptr, word.get(), nullptr});
     }},
    {"prefetch",
     [] {
         const Word word = managed_word();
         const SideStream stream(1);
         qlk::cuda::prefetch(word.get(), 4, true, stream.get());
     }},
    {"memset",
     [] {
         const Word word = device_word();
         const SideStream stream(1);
         qlk::cuda::fill_zero(word.get(), 4, stream.get());
     }},
    {"event",
     [] {
         const SideStream stream(1);
         Event(1).record(stream.get());
     }},
    {"another device's event",
     [] {
         const SideStream stream(current_device());
         Event(1).record(stream.get());
     }},
    {"another device's stream",
     [] {
         const SideStream stream(current_device());
         synchronize({1, stream.get().handle});
     }},
    {"default stream", [] { synchronize({1, nullptr}); }},
};

}  // namespace

std::vector<std::string> device_samples() {
    std::vector<std::string> names;
    for (const DeviceSample& sample : kDeviceSamples) names.emplace_back(sample.name);
    return names;
}

void run_device_sample(const std::string& name, bool guarded) {
    for (const DeviceSample& sample : kDeviceSamples) {
        if (name != sample.name) continue;
        const DeviceGuard guard(guarded ? 1 : 0);
        return sample.run();
    }
    throw std::invalid_argument("no sample '" + name + "'");
}

}  // namespace emu
