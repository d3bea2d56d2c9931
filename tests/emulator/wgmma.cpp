#include "wgmma.h"

#include <algorithm>

#include "block.h"

namespace emu {
namespace {

constexpr size_t kDepth = 16;  // of a product: 16-bit elements

// A matrix descriptor (PTX ISA, "Matrix Descriptor Format"): addresses and distances in units of 16 bytes, base offset,
// swizzle.
struct Layout {
    size_t start, leading, stride;
    Swizzle swizzle;

    static Layout from(uint64_t descriptor, Site site) {
        const auto bytes = [&](int at) { return static_cast<size_t>(descriptor >> at & 0x3fff) * 16; };
        if (descriptor >> 49 & 7) fail(site, "a matrix descriptor with a base offset: not emulated");
        if (descriptor & ~0xc00e3fff3fff3fffull) fail(site, "a matrix descriptor with unknown bits set");
        constexpr Swizzle ways[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
        return {bytes(0), bytes(16), bytes(32), ways[descriptor >> 62]};
    }

    // Where element (row, k) lies; for B, row is its column. The canonical layouts in "Strides".
    size_t at(bool transposed, size_t row, size_t k) const {
        const size_t span = swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : 32;
        size_t offset;
        if (swizzle == Swizzle::kNone) {
            offset = transposed ? row % 8 * 2 + row / 8 * stride + k % 8 * 16 + k / 8 * leading
                                : row % 8 * 16 + row / 8 * stride + k % 8 * 2 + k / 8 * leading;
        } else if (transposed) {
            offset = row % (span / 2) * 2 + row / (span / 2) * leading + k % 8 * span + k / 8 * stride;
        } else {
            offset = row % 8 * span + row / 8 * stride + k * 2;
        }
        return swizzled(swizzle, start + offset);
    }
};

uint16_t element(const Block& block, size_t at) {
    uint16_t bits;
    std::memcpy(&bits, block.shared + at, 2);
    return bits;
}

// Where the 16-byte runs of rows [first, first + rows) lie, by matrices of 8 x 8 elements.
std::vector<size_t> runs(const Layout& layout, bool transposed, size_t first, size_t rows) {
    std::vector<size_t> all;
    for (size_t row = first; row < first + rows; row += 8) {
        for (size_t k = 0; k < kDepth; k += 8) {
            for (size_t i = 0; i < 8; ++i) {
                all.push_back(transposed ? layout.at(true, row, k + i) : layout.at(false, row + i, k));
            }
        }
    }
    return all;
}

WarpGroup& group_of(const Thread& thread) {
    auto& group = thread.block->warp_groups[thread.linear / 128];
    if (!group) group = std::make_unique<WarpGroup>(*thread.block);
    return *group;
}
int warp_of(const Thread& thread) { return thread.linear / 32 % 4; }

}  // namespace

uint64_t wgmma_descriptor(const void* shared, size_t leading, size_t stride, Swizzle swizzle, Site site) {
    const Block& block = *this_thread().block;
    const auto start = static_cast<size_t>(static_cast<const unsigned char*>(shared) - block.shared);
    const auto units = [&](size_t bytes) -> uint64_t {
        if (bytes % 16 != 0 || bytes >= 1u << 18) {
            fail(site, "a matrix descriptor of " + std::to_string(bytes) + " bytes: a multiple of 16 below 2^18");
        }
        return bytes / 16;
    };
    constexpr uint64_t ways[] = {0, 3, 2, 1};
    return units(start) | units(leading) << 16 | units(stride) << 32 | ways[static_cast<int>(swizzle)] << 62;
}

void WarpGroup::note_reads(int warp, const Asked& asked) {
    Thread& self = this_thread();
    const auto& groups = warps[warp].groups;
    const uint32_t number = site_number(asked.site);
    const auto one = [&](uint64_t descriptor, bool transposed, size_t first, size_t rows, bool counted) {
        std::vector<size_t> all = runs(Layout::from(descriptor, asked.site), transposed, first, rows);
        for (const size_t at : all) {
            if (at + 16 > block.shared_size) {
                fail(asked.site, "wgmma reads shared memory at offset " + std::to_string(at) + " of " +
                                     std::to_string(block.shared_size));
            }
        }
        // Eight runs of a canonical layout lie across the banks, whatever the swizzle.
        if (counted)
            count_bulk(Space::kShared, Kind::kLoad, 0, all.size() * 16, all.size() / 8, all.size() / 8, number);
        if (!block.races) return;
        if (agent < 0) agent = block.races->agent();
        std::sort(all.begin(), all.end());
        for (size_t i = 0; i < all.size();) {
            size_t many = 1;
            while (i + many < all.size() && all[i + many] == all[i] + 16 * many) ++many;
            block.races->access_by(agent, static_cast<uint32_t>(groups.size()) + 1, self.racer, Kind::kLoad,
                                   block.rank * block.shared_size + all[i], many * 16, number);
            i += many;
        }
    };
    const Product& p = asked.product;
    if (!p.fragment) one(p.a, p.transposed_a, static_cast<size_t>(16 * warp), 16, true);
    // All four warps read all of B; on a card they share it.
    one(p.b, p.transposed_b, 0, static_cast<size_t>(p.columns), warp == 0);
}

void WarpGroup::ask(int warp, const Product (&lanes)[32], Site site) {
    Warp& own = warps[warp];
    const Product& p = lanes[0];
    if (p.columns % 8 != 0 || p.columns < 8 || p.columns > 256) fail(site, "wgmma of N = " + std::to_string(p.columns));
    for (const Product& other : lanes) {
        if (other.a != p.a || other.b != p.b || other.accumulate != p.accumulate) {
            fail(site, "wgmma whose lanes have different descriptors or predicates");
        }
    }
    if (static_cast<size_t>((this_thread().linear / 128 + 1) * 128) > block.threads.size()) {
        fail(site, "wgmma of a warpgroup that lacks warps");
    }
    // The first warp to arrive defines what the four ask for.
    while (products.size() <= own.asked - first) {
        products.emplace_back();
        products.back().product = p;
        products.back().site = site;
    }
    Asked& asked = products[own.asked - first];
    const Product& q = asked.product;
    if (q.columns != p.columns || q.a != p.a || q.b != p.b || q.accumulate != p.accumulate ||
        q.transposed_a != p.transposed_a || q.transposed_b != p.transposed_b || q.widen != p.widen ||
        !q.fragment != !p.fragment) {
        fail(site, "wgmma, while another warp of the warpgroup has asked for a different product");
    }
    const uint64_t number = own.asked;
    const auto [known, fresh] = own.pending.try_emplace(p.sums);
    Sums& sums = known->second;
    const auto many = static_cast<size_t>(p.columns / 2);
    if (fresh) sums.many = many;
    if (!own.fenced && (fresh || p.fragment)) {
        fail(site, "wgmma, and no wgmma.fence since its registers may have been used");
    }
    if (sums.many != many) fail(site, "wgmma of another N on sums that are under way");
    sums.last = number;
    for (int i = 0; i < 32; ++i) {
        asked.fragment_at[warp][i] = lanes[i].fragment;
        asked.sums_at[warp][i] = sums.at[i] = lanes[i].sums;
        if (p.fragment) std::memcpy(asked.fragments[warp][i], lanes[i].fragment, 16);
    }
    note_reads(warp, asked);
    ++own.asked;
    const Landing landing = block.device.options.landing;
    const bool now = landing == Landing::kEarliest || (landing == Landing::kRandom && block.device.random() & 1);
    if (sums.values.empty() && !(now && own.executed == number)) {
        // NaN until the sums are complete.
        for (float* at : sums.at) {
            sums.values.insert(sums.values.end(), at, at + many);
            std::memset(at, 0xff, many * sizeof(float));
        }
    }
    if (now) execute(warp, number + 1);
}

void WarpGroup::execute_one(int warp, const Asked& asked, Sums& sums) {
    const Product& p = asked.product;
    float left[16][kDepth];
    std::vector<float> right(static_cast<size_t>(p.columns) * kDepth);
    if (p.fragment) {
        for (int lane = 0; lane < 32; ++lane) {
            if (std::memcmp(asked.fragment_at[warp][lane], asked.fragments[warp][lane], 16) != 0) {
                fail(asked.site, "registers of wgmma's A have changed before wgmma.wait_group");
            }
            for (int i = 0; i < 8; ++i) {
                left[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                    p.widen(static_cast<uint16_t>(asked.fragments[warp][lane][i / 2] >> (16 * (i % 2))));
            }
        }
    } else {
        const Layout layout = Layout::from(p.a, asked.site);
        for (size_t row = 0; row < 16; ++row) {
            for (size_t k = 0; k < kDepth; ++k) {
                const size_t of_group = static_cast<size_t>(16 * warp) + row;
                left[row][k] = p.widen(element(block, layout.at(p.transposed_a, of_group, k)));
            }
        }
    }
    const Layout layout = Layout::from(p.b, asked.site);
    for (size_t column = 0; column < static_cast<size_t>(p.columns); ++column) {
        for (size_t k = 0; k < kDepth; ++k) {
            right[column * kDepth + k] = p.widen(element(block, layout.at(p.transposed_b, column, k)));
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* const d = sums.values.empty() ? sums.at[lane] : sums.values.data() + lane * p.columns / 2;
        for (int v = 0; v < p.columns / 2; ++v) {
            const int row = lane / 4 + v / 2 % 2 * 8, column = v / 4 * 8 + lane % 4 * 2 + v % 2;
            double sum = p.accumulate ? d[v] : 0.0;
            for (size_t k = 0; k < kDepth; ++k) {
                sum += static_cast<double>(left[row][k]) *
                       static_cast<double>(right[static_cast<size_t>(column) * kDepth + k]);
            }
            d[v] = static_cast<float>(sum);  // one rounding; a card's rounding is not specified
        }
    }
}

void WarpGroup::execute(int warp, uint64_t until) {
    Warp& own = warps[warp];
    for (; own.executed < until; ++own.executed) {
        Asked& asked = products[own.executed - first];
        execute_one(warp, asked, own.pending.at(asked.sums_at[warp][0]));
    }
    while (!products.empty() && std::all_of(warps, warps + 4, [&](const Warp& w) { return w.executed > first; })) {
        products.pop_front();
        ++first;
    }
}

// Groups up to `group` are complete, and this warp has seen it.
void WarpGroup::finish(int warp, uint32_t group, Site site) {
    Warp& own = warps[warp];
    if (group <= own.waited) return;
    const uint64_t until = own.groups[group - 1];
    for (int other = 0; other < 4; ++other) {
        if (warps[other].groups[group - 1] != until) {
            fail(site, "the warps of a warpgroup have put different products into one group of wgmma");
        }
        // One product of all four warps, although each has its own part of the registers.
        execute(other, until);
    }
    for (auto entry = own.pending.begin(); entry != own.pending.end();) {
        Sums& sums = entry->second;
        if (sums.last >= until) {
            ++entry;
            continue;
        }
        for (size_t lane = 0; lane < 32 && !sums.values.empty(); ++lane) {
            const auto* bytes = reinterpret_cast<const unsigned char*>(sums.at[lane]);
            if (std::any_of(bytes, bytes + sums.many * sizeof(float), [](unsigned char b) { return b != 0xff; })) {
                fail(site, "sums of wgmma were written before wgmma.wait_group");
            }
            std::copy_n(sums.values.data() + lane * sums.many, sums.many, sums.at[lane]);
        }
        entry = own.pending.erase(entry);
    }
    own.waited = group;
    own.fenced = false;
}

void wgmma(const Product& product, Site site) {
    warp_meet(
        "wgmma", 0xffffffffu, &product, sizeof(product), nullptr, 0,
        [&](uint32_t, LaneData& in, LaneData&) {
            Product lanes[32];
            for (int i = 0; i < 32; ++i) std::memcpy(static_cast<void*>(&lanes[i]), in[i], sizeof(Product));
            const Thread& self = this_thread();
            group_of(self).ask(warp_of(self), lanes, site);
        },
        site);
}

void wgmma_fence(Site site) {
    warp_meet(
        "wgmma.fence", 0xffffffffu, nullptr, 0, nullptr, 0,
        [&](uint32_t, LaneData&, LaneData&) {
            const Thread& self = this_thread();
            group_of(self).warps[warp_of(self)].fenced = true;
        },
        site);
}

void set_registers(int registers, bool more, Site site) {
    warp_meet(
        "setmaxnreg", 0xffffffffu, nullptr, 0, nullptr, 0,
        [&](uint32_t, LaneData&, LaneData&) {
            const Thread& self = this_thread();
            if (static_cast<size_t>((self.linear / 128 + 1) * 128) > self.block->threads.size()) {
                fail(site, "setmaxnreg of a warpgroup that lacks warps");
            }
            group_of(self).registers[warp_of(self)].emplace_back(more ? registers : -registers, site);
        },
        site);
}

void WarpGroup::check_registers() const {
    for (const auto& of_warp : registers) {
        for (size_t i = 0; i < of_warp.size(); ++i) {
            for (const auto& other : registers) {
                if (i < other.size() && other[i].first == of_warp[i].first) continue;
                throw Error(std::string(of_warp[i].second.file) + ":" + std::to_string(of_warp[i].second.line) +
                            ": setmaxnreg, and not all warps of the warpgroup have executed it");
            }
        }
    }
}

void wgmma_commit(Site site) {
    warp_meet(
        "wgmma.commit_group", 0xffffffffu, nullptr, 0, nullptr, 0,
        [&](uint32_t, LaneData&, LaneData&) {
            const Thread& self = this_thread();
            WarpGroup& group = group_of(self);
            WarpGroup::Warp& own = group.warps[warp_of(self)];
            own.groups.push_back(own.asked);
            ++self.block->device.progress;
            for (Thread* thread : group.waiting) thread->block->wake(*thread);
            group.waiting.clear();
        },
        site);
}

void wgmma_wait(int pending, Site site) {
    warp_meet("wgmma.wait_group", 0xffffffffu, nullptr, 0, nullptr, 0, [](uint32_t, LaneData&, LaneData&) {}, site);
    Thread& self = this_thread();
    WarpGroup& group = group_of(self);
    const int warp = warp_of(self);
    const auto committed = static_cast<int>(group.warps[warp].groups.size());
    if (committed <= pending) return;
    const auto until = static_cast<uint32_t>(committed - pending);
    const auto behind = [&](const WarpGroup::Warp& w) { return w.groups.size() < until; };
    while (std::any_of(group.warps, group.warps + 4, behind)) {
        group.waiting.push_back(&self);
        self.pause(Thread::kWaiting, "wgmma.wait_group, for the other warps of its warpgroup", site);
    }
    group.finish(warp, until, site);
    if (self.block->races && group.agent >= 0) self.block->races->see(self.racer, group.agent, until);
}

void Block::check_all_waited(const Thread& thread) const {
    const auto refuse = [&](const char* what) {
        throw Error("thread " + std::to_string(thread.linear) + " of block " + std::to_string(number) +
                    " has ended, and " + what);
    };
    if (thread.in_cluster_barrier) refuse("has arrived at the cluster's barrier and not waited there");
    const BulkStores& stores = thread.stores;
    bool unread = !stores.open.empty();
    const size_t after = std::min<size_t>(stores.committed - stores.waited, stores.groups.size());
    for (size_t i = stores.groups.size() - after; i < stores.groups.size(); ++i) unread |= !stores.groups[i].empty();
    if (unread) {
        refuse("has not waited for a bulk copy out of shared memory to have read it");
    }
    for (const auto& group : stores.groups) {
        device.last_stores.insert(device.last_stores.end(), group.begin(), group.end());
    }
    const auto& group = warp_groups[static_cast<size_t>(thread.linear / 128)];
    if (!group) return;
    const WarpGroup::Warp& own = group->warps[warp_of(thread)];
    if (own.asked > (own.waited ? own.groups[own.waited - 1] : 0)) refuse("has not waited for a product of wgmma");
}

}  // namespace emu
