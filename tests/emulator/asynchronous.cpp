// mbarriers, bulk copies and clusters: what sm_90 brought for copies that run beside the threads.
#include <algorithm>

#include "block.h"
#include "managed.h"

namespace emu {
namespace {

constexpr uint32_t kMost = (1u << 20) - 1;  // of arrivals, and of bytes either way (PTX ISA, mbarrier, "Contents")

struct Found {
    Block& block;
    MBarrier& barrier;
};

Found find(void* at, Site site) {
    Block* const block = holder(at);
    if (!block) fail(site, "an mbarrier operation outside of shared memory");
    const auto found = block->mbarriers.find(static_cast<size_t>(static_cast<unsigned char*>(at) - block->shared));
    if (found == block->mbarriers.end()) fail(site, "an mbarrier operation on what mbarrier.init has not made one");
    if (block->live == 0) fail(site, "an mbarrier of a block that has ended");
    return {*block, found->second};
}

// Operations on mbarriers exclude each other; what they do not exclude is that one is made or ends meanwhile.
void use(const Found& found, void* at, Site site, bool visits = true) {
    Thread& self = this_thread();
    Races* const races = self.block->races;
    if (races && visits && &found.block != self.block) {
        races->visit(static_cast<int>(found.block.rank), self.racer, site_number(site));
    }
    if (races && !found.barrier.known) {
        races->access(self.racer, Kind::kAtomic, found.block.offset_in_cluster(at), 8, site_number(site));
    }
}

void wake_all(std::vector<Thread*>& waiting) {
    for (Thread* thread : waiting) thread->block->wake(*thread);
    waiting.clear();
}

// Of the copies that count on an mbarrier those that are still under way.
bool copies_pending(const Block& block, const MBarrier& barrier) {
    for (const auto& copy : block.device.under_way) {
        if (copy->mbarrier == &barrier && copy->phase == barrier.phase) return true;
    }
    return false;
}

void maybe_complete(Block& block, MBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    if (copies_pending(block, barrier)) {
        throw Error(
            "a phase of an mbarrier ends while a copy that tells it of its bytes is under way: it was told to "
            "expect fewer");
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
    if (bytes > int64_t{kMost} || bytes < -int64_t{kMost}) {
        throw Error("an mbarrier that expects " + std::to_string(bytes) + " bytes: at most 2^20 - 1");
    }
}

// 16 bytes of a copy: those of [skip, skip + bytes) come from or go to global memory; a load makes the others 0.
struct Piece {
    unsigned char* shared;
    unsigned char* global;
    uint32_t skip, bytes;
};

void check_shared(const Block& block, const void* shared, size_t bytes, size_t alignment, Site site) {
    const auto* byte = static_cast<const unsigned char*>(shared);
    if (reinterpret_cast<uintptr_t>(shared) % alignment != 0) {
        fail(site, "a bulk copy at an address of shared memory that is no multiple of " + std::to_string(alignment));
    }
    if (bytes == 0 || !block.holds(byte) || !block.holds(byte + bytes - 1)) {
        fail(site, "a bulk copy of " + std::to_string(bytes) + " bytes at offset " +
                       std::to_string(byte - block.shared) + " of " + std::to_string(block.shared_size) +
                       " of shared memory");
    }
    for (const auto& [offset, barrier] : block.mbarriers) {
        if (block.shared + offset + 8 > byte && block.shared + offset < byte + bytes) {
            fail(site, "a bulk copy over an mbarrier object");
        }
    }
}

void check_global(const std::vector<Piece>& pieces, Kind kind, Site site) {
    Thread& self = this_thread();
    Device& device = self.block->device;
    for (const Piece& piece : pieces) {
        if (piece.bytes == 0) continue;
        if (any_managed) touch(piece.global, piece.bytes, site);
        if (device.early || device.overtaken) device.check_overtaking(self, kind, piece.global, piece.bytes, site);
    }
}

void count_copy(const std::vector<Piece>& pieces, Kind global, Site site) {
    const uint32_t number = site_number(site);
    const size_t bytes = pieces.size() * 16;
    const Kind shared = global == Kind::kLoad ? Kind::kStore : Kind::kLoad;
    count_bulk(Space::kShared, shared, 0, bytes, (bytes + 127) / 128, (bytes + 127) / 128, number);
    // Neighbours in global memory together.
    for (size_t i = 0; i < pieces.size();) {
        size_t many = 1;
        while (i + many < pieces.size() && pieces[i + many].global == pieces[i].global + 16 * many) ++many;
        const auto from = reinterpret_cast<uintptr_t>(pieces[i].global) + pieces[i].skip;
        const auto to = reinterpret_cast<uintptr_t>(pieces[i + many - 1].global) + pieces[i + many - 1].skip +
                        pieces[i + many - 1].bytes;
        if (to > from) count_bulk(Space::kGlobal, global, from, to - from, 0, 0, number);
        i += many;
    }
}

void load(void* shared, const std::vector<Piece>& pieces, void* mbarrier, uint32_t blocks, size_t alignment,
          Site site) {
    count("cp.async.bulk", site);
    Thread& self = this_thread();
    Block& own = *self.block;
    const size_t bytes = pieces.size() * 16;
    check_global(pieces, Kind::kLoad, site);
    count_copy(pieces, Kind::kLoad, site);
    if (blocks >> own.cluster->blocks.size() != 0) fail(site, "a copy to blocks that the cluster does not have");
    const std::ptrdiff_t at = static_cast<unsigned char*>(shared) - own.shared;
    const std::ptrdiff_t barrier_at = static_cast<unsigned char*>(mbarrier) - own.shared;
    if (!own.holds(shared) || !own.holds(mbarrier))
        fail(site, "a bulk copy whose place or mbarrier is not this block's");
    for (Block* to : own.cluster->blocks) {
        if (blocks ? !(blocks >> to->rank & 1) : to != &own) continue;
        check_shared(*to, to->shared + at, bytes, alignment, site);
        const Found found = find(to->shared + barrier_at, site);
        MBarrier* const barrier = &found.barrier;
        if (!barrier->told) fail(site, "a copy whose mbarrier no fence has told the asynchronous proxy of");
        use(found, to->shared + barrier_at, site, false);
        if (own.races) {
            if (barrier->agent < 0) barrier->agent = own.races->agent();
            own.races->access_by(barrier->agent, barrier->phase + 1, self.racer, Kind::kStore,
                                 to->offset_in_cluster(to->shared + at), bytes, site_number(site));
            if (to != &own) {
                own.races->visit(static_cast<int>(to->rank), barrier->agent, barrier->phase + 1, site_number(site));
            }
        }
        const auto copy = std::make_shared<Bulk>();
        copy->blocks = {to};
        copy->mbarrier = barrier;
        copy->phase = barrier->phase;
        copy->write = [=, moved = to->shared - own.shared] {
            for (const Piece& piece : pieces) {
                unsigned char* const place = piece.shared + moved;
                std::memset(place, 0, 16);
                if (piece.bytes) std::memcpy(place + piece.skip, piece.global + piece.skip, piece.bytes);
            }
            barrier->bytes -= static_cast<int64_t>(bytes);
            check_bytes(barrier->bytes);
            ++to->device.progress;
            maybe_complete(*to, *barrier);
        };
        own.device.begin(copy);
    }
}

void store(const void* shared, const std::vector<Piece>& pieces, size_t alignment, Site site) {
    count("cp.async.bulk", site);
    Thread& self = this_thread();
    Block& own = *self.block;
    const size_t bytes = pieces.size() * 16;
    check_shared(own, shared, bytes, alignment, site);
    check_global(pieces, Kind::kStore, site);
    count_copy(pieces, Kind::kStore, site);
    if (own.races) {
        if (self.stores.agent < 0) self.stores.agent = own.races->agent();
        own.races->access_by(self.stores.agent, self.stores.committed + 1, self.racer, Kind::kLoad,
                             own.offset_in_cluster(shared), bytes, site_number(site));
    }
    const auto copy = std::make_shared<Bulk>();
    copy->blocks = {&own};
    const auto held = std::make_shared<std::vector<unsigned char>>(bytes);
    copy->read = [=] {
        for (size_t i = 0; i < pieces.size(); ++i) std::memcpy(held->data() + 16 * i, pieces[i].shared, 16);
    };
    copy->write = [=] {
        for (size_t i = 0; i < pieces.size(); ++i) {
            const Piece& piece = pieces[i];
            if (piece.bytes) std::memcpy(piece.global + piece.skip, held->data() + 16 * i + piece.skip, piece.bytes);
        }
    };
    // Nothing but a wait makes it happen, or the end of the launch.
    const Landing landing = own.device.options.landing;
    if (landing == Landing::kEarliest || (landing == Landing::kRandom && own.device.random() & 1)) copy->land();
    self.stores.open.push_back(copy);
}

std::vector<Piece> range(void* shared, const void* global, size_t bytes, Site site) {
    if (bytes == 0 || bytes % 16 != 0) fail(site, "a bulk copy of " + std::to_string(bytes) + " bytes: not of 16 each");
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        fail(site, "a bulk copy at an address of global memory that is no multiple of 16");
    }
    std::vector<Piece> pieces;
    for (size_t at = 0; at < bytes; at += 16) {
        pieces.push_back({static_cast<unsigned char*>(shared) + at,
                          const_cast<unsigned char*>(static_cast<const unsigned char*>(global)) + at, 0, 16});
    }
    return pieces;
}

std::vector<Piece> box(void* shared, const Tensor& t, int column, int row) {
    const Block& own = *this_thread().block;
    const int64_t element = static_cast<int64_t>(t.element), row_bytes = t.box[0] * element;
    const int64_t end = static_cast<int64_t>(t.size[0]) * element;
    std::vector<Piece> pieces;
    for (uint32_t i = 0; i < t.box[1]; ++i) {
        const int64_t y = int64_t{row} + i;
        for (int64_t j = 0; j < row_bytes; j += 16) {
            const int64_t from = column * element + j;  // of the row
            int64_t first = std::clamp<int64_t>(from, 0, end), last = std::clamp<int64_t>(from + 16, 0, end);
            if (y < 0 || y >= static_cast<int64_t>(t.size[1])) first = last = from;
            const size_t offset = static_cast<size_t>(static_cast<unsigned char*>(shared) - own.shared);
            const bool any = last > first;
            pieces.push_back({own.shared + swizzled(t.swizzle, offset + static_cast<size_t>(i * row_bytes + j)),
                              t.memory + (any ? y * static_cast<int64_t>(t.stride) + from : 0),
                              any ? static_cast<uint32_t>(first - from) : 0,
                              any ? static_cast<uint32_t>(last - first) : 0});
        }
    }
    return pieces;
}

}  // namespace

// ----------------------------------------------------------------------------------------------------- mbarriers

void mbarrier_init(void* at, uint32_t arrivals, Site site) {
    count("mbarrier", site);
    Thread& self = this_thread();
    Block& block = *self.block;
    if (arrivals == 0 || arrivals > kMost) fail(site, "an mbarrier of " + std::to_string(arrivals) + " arrivals");
    if (!block.holds(at)) fail(site, "mbarrier.init outside of the block's shared memory");
    const auto offset = static_cast<size_t>(static_cast<unsigned char*>(at) - block.shared);
    if (block.mbarriers.count(offset)) fail(site, "mbarrier.init of what is an mbarrier already");
    access(Space::kShared, Kind::kStore, at, 8, site);
    MBarrier& barrier = block.mbarriers[offset];
    barrier.expected = barrier.pending = arrivals;
    barrier.owner = self.linear;
}

void mbarrier_invalidate(void* at, Site site) {
    count("mbarrier", site);
    const Found found = find(at, site);
    if (&found.block != this_thread().block) fail(site, "mbarrier.inval of another block's");
    if (!found.barrier.waiting.empty()) fail(site, "mbarrier.inval while threads wait");
    if (copies_pending(found.block, found.barrier)) fail(site, "mbarrier.inval while copies are under way");
    found.block.mbarriers.erase(static_cast<size_t>(static_cast<unsigned char*>(at) - found.block.shared));
    access(Space::kShared, Kind::kStore, at, 8, site);
}

void mbarrier_arrive(void* at, uint32_t arrivals, uint32_t bytes, Site site) {
    count("mbarrier", site);
    const Found found = find(at, site);
    MBarrier& barrier = found.barrier;
    Thread& self = this_thread();
    use(found, at, site);
    if (barrier.phase > 0 && !barrier.observed) {
        fail(site, "arrives at an mbarrier although nobody has waited for the phase before to end");
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
    const Found found = find(at, site);
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
        find(at, site).barrier.waiting.push_back(&self);
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

// --------------------------------------------------------------------------------------------------- bulk copies

void Bulk::do_read() {
    if (!is_read && read) read();
    is_read = true;
}

void Bulk::land() {
    do_read();
    if (!is_written) {
        is_written = true;
        write();
    }
}

size_t swizzled(Swizzle swizzle, size_t address) {
    const size_t mask = swizzle == Swizzle::k128 ? 7 : swizzle == Swizzle::k64 ? 3 : swizzle == Swizzle::k32 ? 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
}

// The conditions of cuTensorMapEncodeTiled (CUDA driver API), without interleaving.
void check(const Tensor& t) {
    const auto refuse = [](const std::string& why) { throw std::invalid_argument("a tensor map " + why); };
    const uint64_t row = t.box[0] * t.element;
    if (reinterpret_cast<uintptr_t>(t.memory) % 16 != 0) refuse("of memory that is not aligned to 16 bytes");
    for (int i = 0; i < 2; ++i) {
        if (t.size[i] == 0 || t.size[i] > uint64_t{1} << 32) refuse("of a size of 0, or beyond 2^32");
        if (t.box[i] == 0 || t.box[i] > 256) refuse("with a box of " + std::to_string(t.box[i]));
    }
    if (t.stride % 16 != 0 || t.stride >= uint64_t{1} << 40) refuse("with rows that are no multiple of 16 bytes apart");
    if (row % 16 != 0) refuse("with a box whose rows are no multiple of 16 bytes");
    const uint64_t span[] = {row, 32, 64, 128};
    const uint64_t limit = span[static_cast<int>(t.swizzle)];
    if (row > limit)
        refuse("with a box of " + std::to_string(row) + " bytes a row, swizzled by " + std::to_string(limit));
    // That is allowed, but nothing says where the next row begins.
    if (row < limit) refuse("with a box that is narrower than what it is swizzled by: not emulated");
}

void tensor_load(void* shared, const Tensor& tensor, int column, int row, void* mbarrier, uint32_t blocks, Site site) {
    load(shared, box(shared, tensor, column, row), mbarrier, blocks, 128, site);
}
void bulk_load(void* shared, const void* global, size_t bytes, void* mbarrier, uint32_t blocks, Site site) {
    load(shared, range(shared, global, bytes, site), mbarrier, blocks, 16, site);
}
void tensor_store(const Tensor& tensor, int column, int row, const void* shared, Site site) {
    store(shared, box(const_cast<void*>(shared), tensor, column, row), 128, site);
}
void bulk_store(void* global, const void* shared, size_t bytes, Site site) {
    store(shared, range(const_cast<void*>(shared), global, bytes, site), 16, site);
}

void bulk_commit(Site site) {
    count("cp.async.bulk.commit_group", site);
    BulkStores& stores = this_thread().stores;
    stores.groups.push_back(std::move(stores.open));
    stores.open.clear();
    ++stores.committed;
}

void bulk_wait(int pending, bool only_read, Site site) {
    count("cp.async.bulk.wait_group", site);
    Thread& self = this_thread();
    BulkStores& stores = self.stores;
    const size_t done = stores.groups.size() - std::min<size_t>(pending, stores.groups.size());
    for (size_t i = 0; i < done; ++i) {
        for (const auto& copy : stores.groups[i]) only_read ? copy->do_read() : copy->land();
    }
    if (!only_read)
        stores.groups.erase(stores.groups.begin(), stores.groups.begin() + static_cast<std::ptrdiff_t>(done));
    if (stores.committed <= static_cast<uint32_t>(pending)) return;
    stores.waited = std::max(stores.waited, stores.committed - static_cast<uint32_t>(pending));
    if (self.block->races && stores.agent >= 0) self.block->races->see(self.racer, stores.agent, stores.waited);
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
    // What fence.mbarrier_init says is for the whole cluster, even if no more is released.
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
    if (!own.holds(shared)) fail(site, "mapa of what is not in the block's shared memory");
    return own.cluster->blocks[rank]->shared + (static_cast<const unsigned char*>(shared) - own.shared);
}

}  // namespace emu
