// mbarriers, and the barrier of a cluster.
#include "mbarrier.h"

#include <algorithm>

namespace emu {
namespace {

void wake_all(std::vector<Thread*>& waiting) {
    for (Thread* thread : waiting) thread->block->wake(*thread);
    waiting.clear();
}

// Whether copies that count on an mbarrier's phase are still under way.
bool copies_pending(const Block& block, const MBarrier& barrier) {
    for (const auto& copy : block.device.under_way) {
        if (copy->mbarrier == &barrier && copy->phase == barrier.phase) return true;
    }
    return false;
}

}  // namespace

FoundBarrier find_barrier(void* at, Site site) {
    Block* const block = holder(at);
    if (!block) fail(site, "an mbarrier operation outside of shared memory");
    const auto found = block->mbarriers.find(static_cast<size_t>(static_cast<unsigned char*>(at) - block->shared));
    if (found == block->mbarriers.end())
        fail(site, "an mbarrier operation on memory that mbarrier.init has not initialised");
    if (block->live == 0) fail(site, "an mbarrier of a block that has ended");
    return {*block, found->second};
}

void use(const FoundBarrier& found, void* at, Site site, bool visits) {
    Thread& self = this_thread();
    Races* const races = self.block->races;
    if (races && visits && &found.block != self.block) {
        races->visit(static_cast<int>(found.block.rank), self.racer, site_number(site));
    }
    if (races && !found.barrier.known) {
        races->access(self.racer, Kind::kAtomic, found.block.offset_in_cluster(at), 8, site_number(site));
    }
}

void maybe_complete(Block& block, MBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    if (copies_pending(block, barrier)) {
        throw Error("a phase of an mbarrier ends while a copy that it counts is under way: it expected too few bytes");
    }
    ++block.device.progress;
    if (block.races) {
        if (barrier.agent >= 0) block.races->see(barrier.arriving, barrier.agent, barrier.phase + 1);
        auto& complete = barrier.complete;
        complete.resize(std::max(complete.size(), barrier.arriving.size()), 0);
        for (size_t i = 0; i < barrier.arriving.size(); ++i) complete[i] = std::max(complete[i], barrier.arriving[i]);
        barrier.arriving.clear();
    }
    ++barrier.phase;
    barrier.pending = barrier.expected;
    barrier.observed = false;
    wake_all(barrier.waiting);
}

void check_bytes(int64_t bytes) {
    if (bytes > int64_t{kMostOfMBarrier} || bytes < -int64_t{kMostOfMBarrier}) {
        throw Error("an mbarrier that expects " + std::to_string(bytes) + " bytes: at most 2^20 - 1");
    }
}

void mbarrier_init(void* at, uint32_t arrivals, Site site) {
    count("mbarrier", site);
    Thread& self = this_thread();
    Block& block = *self.block;
    if (arrivals == 0 || arrivals > kMostOfMBarrier)
        fail(site, "an mbarrier of " + std::to_string(arrivals) + " arrivals");
    if (!block.holds(at)) fail(site, "mbarrier.init outside of the block's shared memory");
    const auto offset = static_cast<size_t>(static_cast<unsigned char*>(at) - block.shared);
    if (block.mbarriers.count(offset)) fail(site, "mbarrier.init of an mbarrier that exists already");
    access(Space::kShared, Kind::kStore, at, 8, site);
    MBarrier& barrier = block.mbarriers[offset];
    barrier.expected = barrier.pending = arrivals;
    barrier.owner = self.linear;
}

void mbarrier_invalidate(void* at, Site site) {
    count("mbarrier", site);
    const FoundBarrier found = find_barrier(at, site);
    if (&found.block != this_thread().block) fail(site, "mbarrier.inval of another block's");
    if (!found.barrier.waiting.empty()) fail(site, "mbarrier.inval while threads wait");
    if (copies_pending(found.block, found.barrier)) fail(site, "mbarrier.inval while copies are under way");
    found.block.mbarriers.erase(static_cast<size_t>(static_cast<unsigned char*>(at) - found.block.shared));
    access(Space::kShared, Kind::kStore, at, 8, site);
}

void mbarrier_arrive(void* at, uint32_t arrivals, uint32_t bytes, Site site) {
    count("mbarrier", site);
    const FoundBarrier found = find_barrier(at, site);
    MBarrier& barrier = found.barrier;
    Thread& self = this_thread();
    use(found, at, site);
    if (barrier.phase > 0 && !barrier.observed) {
        fail(site, "arrives at an mbarrier although no thread has waited for the previous phase");
    }
    barrier.bytes += bytes;
    check_bytes(barrier.bytes);
    if (arrivals == 0 || arrivals > barrier.pending) {
        fail(site, std::to_string(arrivals) + " arrivals at an mbarrier that waits for " +
                       std::to_string(barrier.pending) + " more");
    }
    barrier.pending -= arrivals;
    if (self.block->races) self.block->races->release(self.racer, barrier.arriving);
    maybe_complete(found.block, barrier);
    if (self.block->device.options.order == Order::kRandom && self.block->device.random() & 1) {
        self.pause(Thread::kReady, "an mbarrier", site);
    }
}

bool mbarrier_test(void* at, uint32_t parity, Site site) {
    count("mbarrier", site);
    const FoundBarrier found = find_barrier(at, site);
    Thread& self = this_thread();
    if (&found.block != self.block) fail(site, "waits for an mbarrier of another block");
    if (parity > 1) fail(site, "a parity of " + std::to_string(parity));
    use(found, at, site);
    if ((found.barrier.phase & 1) == parity) return false;
    found.barrier.observed = true;
    if (self.block->races) self.block->races->acquire(self.racer, found.barrier.complete);
    return true;
}

void mbarrier_wait(void* at, uint32_t parity, Site site) {
    while (!mbarrier_test(at, parity, site)) {
        Thread& self = this_thread();
        find_barrier(at, site).barrier.waiting.push_back(&self);
        self.pause(Thread::kWaiting, "an mbarrier", site);
    }
}

void mbarrier_fence(Site site) {
    count("fence", site);
    const Thread& self = this_thread();
    for (auto& [offset, barrier] : self.block->mbarriers) {
        if (barrier.owner == self.linear) barrier.told = barrier.announced = true;
    }
}

void proxy_fence(Site site) {
    count("fence", site);
    const Thread& self = this_thread();
    for (auto& [offset, barrier] : self.block->mbarriers) barrier.told |= barrier.owner == self.linear;
    if (self.block->races) self.block->races->fence(self.racer);
}

// ------------------------------------------------------------------------------------------------------ clusters

unsigned cluster_rank() { return this_thread().block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(this_thread().block->cluster->blocks.size()); }

void Cluster::complete_phase() {
    ++blocks.front()->device.progress;
    ++phase;
    arrived = 0;
    complete = std::move(arriving);
    arriving.clear();
    // fence.mbarrier_init holds for the whole cluster, even if this barrier releases nothing else.
    for (Block* block : blocks) {
        for (auto& [offset, barrier] : block->mbarriers) barrier.known |= barrier.announced;
    }
    wake_all(waiting);
}

void cluster_arrive(bool release, Site site) {
    count("barrier.cluster", site);
    Thread& self = this_thread();
    Cluster& cluster = *self.block->cluster;
    if (self.in_cluster_barrier) fail(site, "arrives twice at the cluster's barrier");
    self.in_cluster_barrier = true;
    self.cluster_phase = cluster.phase;
    if (release && cluster.races) cluster.races->release(self.racer, cluster.arriving);
    if (++cluster.arrived >= cluster.live) cluster.complete_phase();
}

void cluster_wait(Site site) {
    count("barrier.cluster", site);
    Thread& self = this_thread();
    Cluster& cluster = *self.block->cluster;
    if (!self.in_cluster_barrier) fail(site, "waits at the cluster's barrier and has not arrived");
    while (cluster.phase == self.cluster_phase) {
        cluster.waiting.push_back(&self);
        self.pause(Thread::kWaiting, "the cluster's barrier", site);
    }
    self.in_cluster_barrier = false;
    if (cluster.races) cluster.races->acquire(self.racer, cluster.complete);
}

void* cluster_map(const void* shared, unsigned rank, Site site) {
    Block& own = *this_thread().block;
    if (rank >= own.cluster->blocks.size()) fail(site, "block " + std::to_string(rank) + " of a smaller cluster");
    if (!own.holds(shared)) fail(site, "mapa of an address outside the block's shared memory");
    return own.cluster->blocks[rank]->shared + (static_cast<const unsigned char*>(shared) - own.shared);
}

}  // namespace emu
