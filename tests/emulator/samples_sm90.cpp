// The kernels of sm90_kernels.cuh with one part missing, and small kernels with one fault each.
#include <stdexcept>

#include "operands.h"
#include "samples.h"
#include "sm90_kernels.cuh"

// Not in emu, which has functions of the same names.
namespace sm90 {
namespace {

struct Sample {
    const char* name;
    void (*run)(const uint32_t* in, size_t words, uint32_t* out);
    size_t output;
};

template <ProductPart kMissing>
void product(const uint32_t* in, size_t words, uint32_t* out) {
    const int depth = static_cast<int>(words / 64);  // of two matrices of 64 rows, two elements a word
    auto* const left = reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(in));
    const auto map = [&](uint16_t* memory) {
        return make_tensor_map(memory, 64, depth, 2 * depth, 64, 64, Swizzle::k128);
    };
    const ProductParams p{map(left), map(left + 64 * depth), reinterpret_cast<float*>(out), depth / 64};
    qlk::cuda::launch(product_kernel<bf16, kMissing>, 1, kProductThreads, kProductBytes, {}, p);
}

template <ClusterPart kMissing>
void cluster(const uint32_t* in, size_t, uint32_t* out) {
    auto* const memory = reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(in));
    const ClusterParams p{in, out, make_tensor_map(memory, 128, 8, 16, 64, 8, Swizzle::kNone)};
    launch_clusters(cluster_kernel<kMissing>, 2, 2, kClusterThreads, kClusterBytes, {}, p);
}

// A kernel of one warpgroup, and memory for whatever it needs.
struct Params {
    const uint32_t* in;
    uint32_t* out;
};
struct Shared {
    uint16_t a[64 * 64], b[64 * 64];
    MBarrier barrier, other;
};
template <void (*kBody)(const Params&, Shared&)>
void group(Params p) {
    kBody(p, aligned_shared<Shared>());
}
template <void (*kBody)(const Params&, Shared&), int kThreads = 128, unsigned kCluster = 1>
void one(const uint32_t* in, size_t, uint32_t* out) {
    launch_clusters(group<kBody>, kCluster, kCluster, kThreads, sizeof(Shared) + 1024, {}, Params{in, out});
}
int id() { return static_cast<int>(threadIdx.x); }

void make(Shared& s, uint32_t arrivals) {
    if (id() == 0) {
        mbarrier_init(s.barrier, arrivals);
        fence_mbarrier_init();
    }
    __syncthreads();
}
uint64_t descriptor(const uint16_t* memory) { return wgmma_descriptor(memory, 16, 1024, Swizzle::k128); }
void fill(Shared& s) {
    for (int i = id(); i < 64 * 64; i += 128) {
        store_shared(&s.a[i], uint16_t{0});
        store_shared(&s.b[i], uint16_t{0});
    }
    fence_proxy_async();
    __syncthreads();
}

void arrivals_beyond(const Params&, Shared& s) {
    make(s, 127);
    mbarrier_arrive(s.barrier);
}
void nobody_waits(const Params&, Shared& s) {
    make(s, 128);
    mbarrier_arrive(s.barrier);
    mbarrier_arrive(s.barrier);
}
void not_made(const Params&, Shared& s) { mbarrier_arrive(s.barrier); }
void made_twice(const Params&, Shared& s) {
    if (id() == 0) {
        mbarrier_init(s.barrier, 1);
        mbarrier_init(s.barrier, 1);
    }
}
void plain_access(const Params&, Shared& s) {
    make(s, 1);
    if (id() == 0) store_shared(reinterpret_cast<uint32_t*>(&s.barrier), 0u);
}
void never_arrives(const Params&, Shared& s) {
    make(s, 128);
    if (id() > 0) mbarrier_arrive(s.barrier);
    mbarrier_wait(s.barrier, 0);
}
void copy_of_20(const Params& p, Shared& s) {
    make(s, 1);
    if (id() == 0) bulk_load(s.a, p.in, 20, s.barrier);
}
void copy_misaligned(const Params& p, Shared& s) {
    make(s, 1);
    if (id() == 0) bulk_load(s.a + 4, p.in, 32, s.barrier);
}
void copy_beyond(const Params& p, Shared& s) {
    make(s, 1);
    if (id() == 0) bulk_load(reinterpret_cast<unsigned char*>(&s) + sizeof(Shared) + 1008, p.in, 32, s.barrier);
}
void copy_left(const Params& p, Shared& s) {
    make(s, 1);
    if (id() == 0) {
        mbarrier_arrive_expect(s.barrier, 64);
        bulk_load(s.a, p.in, 64, s.barrier);
    }
}
void copy_twice(const Params& p, Shared& s) {
    make(s, 1);
    if (id() != 0) return;
    mbarrier_init(s.other, 1);
    fence_mbarrier_init();
    for (MBarrier* b : {&s.barrier, &s.other}) {
        mbarrier_arrive_expect(*b, 64);
        bulk_load(s.a, p.in, 64, *b);
    }
    mbarrier_wait(s.barrier, 0);
    mbarrier_wait(s.other, 0);
}
// The threads meet, but none has waited for the copy.
void barrier_for_a_wait(const Params& p, Shared& s) {
    make(s, 1);
    if (id() == 0) {
        mbarrier_arrive_expect(s.barrier, 64);
        bulk_load(s.a, p.in, 64, s.barrier);
    }
    __syncthreads();
    if (id() < 16) store_global(p.out + id(), load_shared(reinterpret_cast<uint32_t*>(s.a) + id()));
    mbarrier_wait(s.barrier, 0);
}
// Threads that do not meet give a stage back, and one of them is too early.
void one_gives_back_early(const Params& p, Shared& s) {
    make(s, 128);
    auto* const words = reinterpret_cast<uint32_t*>(s.a);
    store_shared(words + id(), 1u);
    __syncthreads();
    uint32_t sum = 0;
    if (id() == 77) mbarrier_arrive(s.barrier);
    sum += load_shared(words + (id() + 1) % 128);
    if (id() != 77) mbarrier_arrive(s.barrier);
    if (id() == 5) {
        mbarrier_wait(s.barrier, 0);
        store_shared(words + 78, sum);
    }
    store_global(p.out + id() % 16, sum);
}

void sums_too_early(const Params& p, Shared& s) {
    fill(s);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16, 64, false, false>(d, descriptor(s.a), descriptor(s.b), false);
    wgmma_commit();
    d[3] = 1;
    wgmma_wait<0>();
    store_global(p.out + id() % 16, __float_as_uint(d[3]));
}
void fragment_too_early(const Params& p, Shared& s) {
    fill(s);
    float d[32];
    uint32_t a[4] = {};
    wgmma_fence();
    wgmma_rs<bf16, 64, false>(d, a, descriptor(s.b), false);
    wgmma_commit();
    a[2] = 1;
    wgmma_wait<0>();
    store_global(p.out + id() % 16, __float_as_uint(d[3]) + a[2]);
}
void operand_too_early(const Params& p, Shared& s) {
    fill(s);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16, 64, false, false>(d, descriptor(s.a), descriptor(s.b), false);
    wgmma_commit();
    __syncthreads();
    store_shared(s.b + id(), uint16_t{1});
    wgmma_wait<0>();
    store_global(p.out + id() % 16, __float_as_uint(d[3]));
}
void three_warps(const Params& p, Shared& s) {
    fill(s);
    float d[32] = {};
    if (id() < 96) {
        wgmma_fence();
        wgmma_ss<bf16, 64, false, false>(d, descriptor(s.a), descriptor(s.b), false);
        wgmma_commit();
        wgmma_wait<0>();
    }
    store_global(p.out + id() % 16, __float_as_uint(d[3]));
}
void other_operand(const Params& p, Shared& s) {
    fill(s);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16, 64, false, false>(d, descriptor(id() < 96 ? s.a : s.b), descriptor(s.b), false);
    wgmma_commit();
    wgmma_wait<0>();
    store_global(p.out + id() % 16, __float_as_uint(d[3]));
}
void beyond_shared(const Params& p, Shared& s) {
    fill(s);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16, 64, false, false>(d, descriptor(s.a), descriptor(s.b + 4096), false);
    wgmma_commit();
    wgmma_wait<0>();
    store_global(p.out + id() % 16, __float_as_uint(d[3]));
}

// Two copies of one phase to the same place.
void copy_over_a_copy(const Params& p, Shared& s) {
    make(s, 1);
    if (id() != 0) return;
    mbarrier_arrive_expect(s.barrier, 128);
    for (int i = 0; i < 2; ++i) bulk_load(s.a, p.in + 16 * i, 64, s.barrier);
    mbarrier_wait(s.barrier, 0);
}
// The fence comes after the notification of the others, by an mbarrier and by a named barrier.
void fence_after_arriving(const Params& p, Shared& s) {
    make(s, 128);
    if (id() < 16) store_shared(reinterpret_cast<uint32_t*>(s.a) + id(), 1u);
    mbarrier_arrive(s.barrier);
    fence_proxy_async();
    if (id() != 127) return;
    mbarrier_wait(s.barrier, 0);
    bulk_store(p.out, s.a, 64);
    bulk_commit();
    bulk_wait<0>();
}
void fence_after_a_named_barrier(const Params& p, Shared& s) {
    if (id() < 64) {
        if (id() < 16) store_shared(reinterpret_cast<uint32_t*>(s.a) + id(), 1u);
        bar_arrive(2, 96);
        fence_proxy_async();
    } else if (id() < 96) {
        bar_sync(2, 96);
        if (id() != 64) return;
        bulk_store(p.out, s.a, 64);
        bulk_commit();
        bulk_wait<0>();
    }
}
// Two threads write halves of a word, and one of them does not execute the fence.
void half_a_fence(const Params& p, Shared& s) {
    if (id() < 32) store_shared(&s.a[id()], uint16_t{1});
    if (id() % 2 == 1) fence_proxy_async();
    __syncthreads();
    if (id() != 0) return;
    bulk_store(p.out, s.a, 64);
    bulk_commit();
    bulk_wait<0>();
}
// The only thread that waited for the copy has ended.
void who_knows_has_ended(const Params& p, Shared& s) {
    make(s, 1);
    if (id() == 100) {
        mbarrier_arrive_expect(s.barrier, 64);
        bulk_load(s.a, p.in, 64, s.barrier);
        mbarrier_wait(s.barrier, 0);
    }
    if (id() >= 64) return;
    __syncthreads();
    if (id() < 16) store_global(p.out + id(), load_shared(reinterpret_cast<uint32_t*>(s.a) + id()));
}
// The first two warps meet the thread that makes the mbarrier, the third does not.
void made_for_others(const Params&, Shared& s) {
    if (id() >= 96) return;
    if (id() == 0) {
        mbarrier_init(s.barrier, 96);
        fence_mbarrier_init();
    }
    if (id() < 64) bar_sync(1, 64);
    if (id() >= 64) {
        for (int i = 0; i < 3; ++i) bar_sync(2, 32);  // later, but nothing orders it
    }
    mbarrier_arrive(s.barrier);
}
void warp_without_its_group(const Params&, Shared&) {
    if (id() >= 128) setmaxnreg_dec<24>();
}
void warp_of_its_group(const Params&, Shared&) {
    if (id() < 96) setmaxnreg_inc<160>();
}
void nothing_committed(const Params& p, Shared&) {
    bulk_commit();
    if (id() < 16) store_global(p.out + id(), 1u);
}

void meet_cluster() {
    cluster_arrive();
    cluster_wait();
}
void other_may_have_ended(const Params& p, Shared& s) {
    auto* const words = reinterpret_cast<uint32_t*>(s.a);
    store_shared(words + id(), 1u);
    meet_cluster();
    if (cluster_rank() == 0 && id() < 16) store_global(p.out + id(), load_shared(cluster_map(words + id(), 1)));
}
void arrives_at_one_that_may_have_ended(const Params&, Shared& s) {
    make(s, 128);
    meet_cluster();
    if (cluster_rank() == 0) mbarrier_arrive_at(s.barrier, 1);
}
void told_only_copies(const Params&, Shared& s) {
    if (id() == 0) {
        mbarrier_init(s.barrier, 128);
        fence_proxy_async();
    }
    cluster_arrive_relaxed();
    cluster_wait();
    mbarrier_arrive_at(s.barrier, 1 - cluster_rank());
    mbarrier_wait(s.barrier, 0);
    meet_cluster();
}

#define PRODUCT(part) {"product " #part, product<ProductPart::part>, 64 * 64}
#define CLUSTER(part) {"cluster " #part, cluster<ClusterPart::part>, 128}
const Sample kSamples[] = {
    PRODUCT(kNone),
    PRODUCT(kInitFence),
    PRODUCT(kInitBarrier),
    PRODUCT(kFull),
    PRODUCT(kEmpty),
    PRODUCT(kFewerBytes),
    PRODUCT(kFence),
    PRODUCT(kCommit),
    PRODUCT(kWait),
    PRODUCT(kLastWait),
    PRODUCT(kRelease),
    PRODUCT(kStoreFence),
    PRODUCT(kStoreBarrier),
    PRODUCT(kStoreWait),
    CLUSTER(kNone),
    CLUSTER(kFirstBarrier),
    CLUSTER(kFull),
    CLUSTER(kArrive),
    CLUSTER(kReady),
    CLUSTER(kLastBarrier),
    {"arrivals beyond", one<arrivals_beyond>, 16},
    {"nobody waits", one<nobody_waits>, 16},
    {"not made", one<not_made>, 16},
    {"made twice", one<made_twice>, 16},
    {"plain access", one<plain_access>, 16},
    {"never arrives", one<never_arrives>, 16},
    {"copy of 20", one<copy_of_20>, 16},
    {"copy misaligned", one<copy_misaligned>, 16},
    {"copy beyond", one<copy_beyond>, 16},
    {"copy left", one<copy_left>, 16},
    {"copy twice", one<copy_twice>, 16},
    {"barrier for a wait", one<barrier_for_a_wait>, 16},
    {"one gives back early", one<one_gives_back_early>, 16},
    {"sums too early", one<sums_too_early>, 16},
    {"fragment too early", one<fragment_too_early>, 16},
    {"operand too early", one<operand_too_early>, 16},
    {"three warps", one<three_warps>, 16},
    {"half a warpgroup", one<three_warps, 96>, 16},
    {"other operand", one<other_operand>, 16},
    {"beyond shared memory", one<beyond_shared>, 16},
    {"copy over a copy", one<copy_over_a_copy>, 16},
    {"fence after arriving", one<fence_after_arriving>, 16},
    {"fence after a named barrier", one<fence_after_a_named_barrier>, 16},
    {"half a fence", one<half_a_fence>, 16},
    {"who knows has ended", one<who_knows_has_ended>, 16},
    {"made for others", one<made_for_others>, 16},
    {"warp without its group", one<warp_without_its_group, 160>, 16},
    {"warp of its group", one<warp_of_its_group>, 16},
    {"nothing committed", one<nothing_committed>, 16},
    {"other may have ended", one<other_may_have_ended, 128, 2>, 16},
    {"arrives at one that may have ended", one<arrives_at_one_that_may_have_ended, 128, 2>, 16},
    {"told only copies", one<told_only_copies, 128, 2>, 16},
};

}  // namespace
}  // namespace sm90

namespace emu {

std::vector<std::string> sm90_samples() {
    std::vector<std::string> names;
    for (const auto& sample : sm90::kSamples) names.emplace_back(sample.name);
    return names;
}

std::vector<uint32_t> run_sm90_sample(const std::string& name, const std::vector<uint32_t>& input) {
    for (const auto& sample : sm90::kSamples) {
        if (name != sample.name) continue;
        const Exact in(input.size()), out(sample.output);
        std::copy(input.begin(), input.end(), in.words());
        std::fill_n(out.words(), sample.output, 0xffffffffu);
        Operands all("a sample");
        all.reads("in", in.words(), 4 * input.size());
        all.writes("out", out.words(), 4 * sample.output);
        const Given given(std::move(all));
        sample.run(in.words(), input.size(), out.words());
        return {out.words(), out.words() + sample.output};
    }
    throw std::invalid_argument("no sample '" + name + "'");
}

}  // namespace emu
