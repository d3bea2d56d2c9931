// Bulk and tensor copies, which run beside the threads and are counted by mbarriers or waited for in groups.
#include <algorithm>

#include "block.h"
#include "managed.h"
#include "mbarrier.h"

namespace emu {
namespace {

// 16 bytes of a copy. Bytes [skip, skip + bytes) come from or go to global memory; a load clears the others.
struct Piece {
    unsigned char* shared;
    unsigned char* global;
    uint32_t skip, bytes;
};

void check_shared(const Block& block, const void* shared, size_t bytes, size_t alignment, Site site) {
    const auto* byte = static_cast<const unsigned char*>(shared);
    if (reinterpret_cast<uintptr_t>(shared) % alignment != 0) {
        fail(site, "a bulk copy at a shared address that is not a multiple of " + std::to_string(alignment));
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
        const unsigned char* const from = piece.global + piece.skip;
        if (device.operands) device.check_operands(kind, from, piece.bytes, site_number(site));
        if (any_managed) touch(from, piece.bytes, site);
        if (device.early || device.overtaken) device.check_overtaking(self, kind, from, piece.bytes, site);
    }
}

void count_copy(const std::vector<Piece>& pieces, Kind global, Site site) {
    const uint32_t number = site_number(site);
    const size_t bytes = pieces.size() * 16;
    const Kind shared = global == Kind::kLoad ? Kind::kStore : Kind::kLoad;
    count_bulk(Space::kShared, shared, 0, bytes, (bytes + 127) / 128, (bytes + 127) / 128, number);
    // Neighbours in global memory count together.
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
        fail(site, "a bulk copy to an address or with an mbarrier of another block");
    for (Block* to : own.cluster->blocks) {
        if (blocks ? !(blocks >> to->rank & 1) : to != &own) continue;
        check_shared(*to, to->shared + at, bytes, alignment, site);
        const FoundBarrier found = find_barrier(to->shared + barrier_at, site);
        MBarrier* const barrier = &found.barrier;
        if (!barrier->told) fail(site, "a copy whose mbarrier no fence has made visible to the asynchronous proxy");
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
    // Only a wait makes it happen, or the end of the launch.
    const Landing landing = own.device.options.landing;
    if (landing == Landing::kEarliest || (landing == Landing::kRandom && own.device.random() & 1)) copy->land();
    self.stores.open.push_back(copy);
}

std::vector<Piece> range(void* shared, const void* global, size_t bytes, Site site) {
    if (bytes == 0 || bytes % 16 != 0)
        fail(site, "a bulk copy of " + std::to_string(bytes) + " bytes: not a multiple of 16");
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        fail(site, "a bulk copy at a global address that is not a multiple of 16");
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
            const int64_t from = column * element + j;  // offset in the row
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
    if (reinterpret_cast<uintptr_t>(t.memory) % 16 != 0) refuse("for memory that is not aligned to 16 bytes");
    for (int i = 0; i < 2; ++i) {
        if (t.size[i] == 0 || t.size[i] > uint64_t{1} << 32) refuse("for a size of 0, or beyond 2^32");
        if (t.box[i] == 0 || t.box[i] > 256) refuse("with a box of " + std::to_string(t.box[i]));
    }
    if (t.stride % 16 != 0 || t.stride >= uint64_t{1} << 40)
        refuse("with rows that are not a multiple of 16 bytes apart");
    if (row % 16 != 0) refuse("with a box whose rows are not a multiple of 16 bytes");
    const uint64_t span[] = {row, 32, 64, 128};
    const uint64_t limit = span[static_cast<int>(t.swizzle)];
    if (row > limit)
        refuse("with a box of " + std::to_string(row) + " bytes a row, swizzled by " + std::to_string(limit));
    // The driver allows it, but nothing documents where the next row begins.
    if (row < limit) refuse("with a box narrower than its swizzle: not emulated");
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

}  // namespace emu
