// Accesses of threads to memory: checks, what blocks exchange, asynchronous copies, early launches.
#include <algorithm>

#include "block.h"
#include "managed.h"

namespace emu {

void access(Space space, Kind kind, const void* address, size_t bytes, Site site, size_t used) {
    Thread& self = this_thread();
    Block& block = *self.block;
    if (block.device.options.order == Order::kRandom && block.device.random() % 8 == 0) {
        self.pause(Thread::kReady, "an access", site);
    }
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes != 0) {
        fail(site, "a misaligned access of " + std::to_string(bytes) + " bytes");
    }
    const auto* byte = static_cast<const unsigned char*>(address);
    Block* const inside = holder(byte);
    if (space == Space::kShared && (!inside || !inside->holds(byte + bytes - 1))) {
        fail(site, "a shared access of " + std::to_string(bytes) + " bytes at offset " +
                       std::to_string(byte - block.shared) + " of " + std::to_string(block.shared_size));
    }
    if (inside && inside != &block && inside->live == 0) fail(site, "shared memory of a block that has ended");
    if (inside && !inside->mbarriers.empty()) {
        const auto next = inside->mbarriers.upper_bound(static_cast<size_t>(byte + bytes - 1 - inside->shared));
        if (next != inside->mbarriers.begin() &&
            std::prev(next)->first + 8 > static_cast<size_t>(byte - inside->shared)) {
            fail(site, "a plain access to an mbarrier object");
        }
    }
    if (space == Space::kGlobal && inside) fail(site, "a global access to shared memory");
    const uint32_t number = site_number(site);
    if (space == Space::kGlobal) {
        if (block.device.operands) block.device.check_operands(kind, address, std::min(bytes, used), number);
        if (any_managed) touch(address, bytes, site);
    }
    if ((block.device.early || block.device.overtaken) && space == Space::kGlobal) {
        block.device.check_overtaking(self, kind, address, bytes, site);
    }
    if (kind == Kind::kStore) ++block.device.progress;
    if (inside && inside != &block && block.races) {
        block.races->visit(static_cast<int>(inside->rank), self.racer, number);
    }
    if (inside && block.races) block.races->access(self.racer, kind, inside->offset_in_cluster(byte), bytes, number);
    collect(self, space, kind, address, bytes, number);
}

void changed() { ++this_thread().block->device.progress; }

void observed() {
    Thread& self = this_thread();
    Device& device = self.block->device;
    ++device.publications;
    for (const uintptr_t address : self.exchange.fenced) {
        auto& [store, readers] = device.exchanged[address];
        if (store.block == self.block->number) store.published = device.publications;
        const auto reader = readers.find(self.block->number);
        if (reader != readers.end()) reader->second = device.publications;
    }
    self.exchange.fenced.clear();
    self.exchange.observed = device.publications;
}

// What a thread knows itself, and by barriers. At a barrier for some threads, one that has waited there once also
// learns what others bring to it later.
static std::vector<Exchange*> known_to(Thread& self) {
    std::vector<Exchange*> known{&self.exchange, &self.block->exchange};
    for (int id = 0; id < 16; ++id) {
        if (self.met >> id & 1) known.push_back(&self.block->barriers[id].exchange);
    }
    return known;
}

void exchange(Kind kind, const void* address, Site site) {
    Thread& self = this_thread();
    Block& block = *self.block;
    auto& [store, readers] = block.device.exchanged[reinterpret_cast<uintptr_t>(address)];
    uint64_t taken_up = 0;
    for (const Exchange* known : known_to(self)) taken_up = std::max(taken_up, known->taken_up);
    self.exchange.unpublished.push_back(reinterpret_cast<uintptr_t>(address));
    if (kind == Kind::kStore) {
        for (const auto& [reader, published] : readers) {
            if (reader == block.number || (published && published <= taken_up)) continue;
            fail(site, "stores to what block " + std::to_string(reader) + " has read" +
                           (published ? ", and has not taken that up with a fence" : ", which no fence has published"));
        }
        readers.clear();
        store = {block.number, self.linear, site, 0};
        return;
    }
    readers[block.number] = 0;
    if (store.block == Device::Store::kNone || store.block == block.number) return;
    if (store.published && store.published <= taken_up) return;
    fail(site, "reads what thread " + std::to_string(store.thread) + " of block " + std::to_string(store.block) +
                   " stored at " + place(store.site) +
                   (store.published ? ", and has not taken it up with a fence" : ", which no fence has published"));
}

void fence(Site site) {
    count("fence", site);
    Thread& self = this_thread();
    for (Exchange* known : known_to(self)) {
        auto& stores = known->unpublished;
        self.exchange.fenced.insert(self.exchange.fenced.end(), stores.begin(), stores.end());
        stores.clear();
    }
    self.exchange.taken_up = self.exchange.observed;
}

void acquire() {
    Thread& self = this_thread();
    if (!self.exchange.weakened) self.exchange.taken_up = self.exchange.observed;
    self.exchange.weakened = false;
}

Weaken::Weaken(bool removed) { this_thread().exchange.weakened = removed; }

void Copy::land() {
    if (landed) return;
    landed = true;
    std::memcpy(to, from, valid);
    std::memset(static_cast<unsigned char*>(to) + valid, 0, bytes - valid);
}

void copy_async(void* shared, const void* global, size_t bytes, size_t valid, Site site) {
    count("cp.async", site);
    if (bytes != 4 && bytes != 8 && bytes != 16) fail(site, "cp.async copies 4, 8 or 16 bytes");
    if (valid > bytes) fail(site, "cp.async of more source bytes than it copies");
    access(Space::kShared, Kind::kStore, shared, bytes, site);
    if (valid > 0) access(Space::kGlobal, Kind::kLoad, global, bytes, site, valid);
    Thread& self = this_thread();
    Copy copy{shared, global, bytes, valid, false};
    const Landing landing = self.block->device.options.landing;
    if (landing == Landing::kEarliest || (landing == Landing::kRandom && coin())) copy.land();
    self.open.push_back(copy);
}

void copy_commit(Site site) {
    count("cp.async.commit_group", site);
    Thread& self = this_thread();
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}

void copy_wait(int pending, Site site) {
    count("cp.async.wait_group", site);
    Thread& self = this_thread();
    while (static_cast<int>(self.groups.size()) > pending) {
        for (Copy& copy : self.groups.front()) {
            copy.land();
            // For other threads, the copy is a write at the wait too, not only where it was issued.
            if (Races* races = self.block->races) {
                races->access(self.racer, Kind::kStore, self.block->offset_in_cluster(copy.to), copy.bytes,
                              site_number(site));
            }
        }
        self.groups.pop_front();
    }
}

void Device::check_operands(Kind kind, const void* address, size_t bytes, uint32_t line) {
    if (operand_of_line.size() <= line) operand_of_line.resize(line + 1, 0);
    operands->check(kind, address, bytes, operand_of_line[line], line);
}

void Device::check_overtaking(const Thread& thread, Kind kind, const void* address, size_t bytes, Site site) {
    const auto first = reinterpret_cast<uintptr_t>(address) / 16;
    const auto last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / 16;
    if (early && !thread.waited) {
        if (kind != Kind::kLoad) fail(site, "writes to global memory before griddepcontrol.wait");
        for (uintptr_t at = first; at <= last; ++at) {
            early->read.emplace(at, site_number(site));
            if (early->written.count(at)) fail(site, "reads what the launch before writes, before griddepcontrol.wait");
        }
    }
    if (!overtaken || kind == Kind::kLoad) return;
    for (uintptr_t at = first; at <= last; ++at) {
        overtaken->written.insert(at);
        const auto found = overtaken->read.find(at);
        if (found == overtaken->read.end()) continue;
        fail(site, "writes what the next launch has read at " + place(site_of(found->second)) +
                       ", before griddepcontrol.wait");
    }
}

void grid_launch(Site site) {
    count("griddepcontrol", site);
    this_thread().let_next = true;
}

void grid_wait(Site site) {
    count("griddepcontrol", site);
    Thread& self = this_thread();
    self.waited = true;
    self.block->device.run_the_one_before();
}

}  // namespace emu
