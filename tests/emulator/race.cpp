#include "race.h"

#include <algorithm>

#include "block.h"

namespace emu {
namespace {

template <class T>
std::vector<std::unique_ptr<T>>& spare() {
    static thread_local std::vector<std::unique_ptr<T>> all;
    return all;
}

}  // namespace

Races::Races(size_t shared_bytes, int threads) : clocks_(threads), clock_epochs_(threads, 0) {
    auto& shadows = spare<Shadow>();
    if (shadows.empty()) shadows.push_back(std::make_unique<Shadow>());
    shadow_ = std::move(shadows.back());
    shadows.pop_back();
    shadow_->words.resize(std::max(shadow_->words.size(), (shared_bytes + 3) / 4));
    ++shadow_->epoch;
}

Races::~Races() { spare<Shadow>().push_back(std::move(shadow_)); }

Clock& Races::clock(int thread) {
    Clock& c = clocks_[thread];
    if (clock_epochs_[thread] != shadow_->epoch) {
        c.assign(clocks_.size(), 0);
        c[thread] = 1;
        clock_epochs_[thread] = shadow_->epoch;
    }
    return c;
}

void Races::all_meet() { ++shadow_->epoch; }

void Races::meet(const std::vector<int>& threads) {
    Clock all(clocks_.size(), 0);
    for (int t : threads) {
        const Clock& c = clock(t);
        for (size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], c[i]);
    }
    for (int t : threads) {
        clocks_[t] = all;
        ++clocks_[t][t];
    }
}

void Races::release(int by, Clock& into) {
    Clock& c = clock(by);
    into.resize(c.size(), 0);
    for (size_t i = 0; i < c.size(); ++i) into[i] = std::max(into[i], c[i]);
    ++c[by];
}

void Races::acquire(int by, const Clock& from) {
    Clock& c = clock(by);
    for (size_t i = 0; i < from.size(); ++i) c[i] = std::max(c[i], from[i]);
}

void Races::check(const Records& records, int thread, uint8_t bytes, Kind kind, const char* did, size_t offset,
                  uint32_t site) {
    for (const Record& r : records.list) {
        if (r.thread == thread || !(r.bytes & bytes) || (r.atomic && kind == Kind::kAtomic)) continue;
        if (clock(thread)[r.thread] >= r.time) continue;
        const char* const does = kind == Kind::kLoad ? "reads" : "writes";
        const Site there = site_of(r.site);
        const char* slash = std::strrchr(there.file, '/');
        fail(site_of(site), std::string("a race: it ") + does + " shared memory at offset " + std::to_string(offset) +
                                ", which thread " + std::to_string(r.thread) + " of the block " + did + " at " +
                                (slash ? slash + 1 : there.file) + ":" + std::to_string(there.line) +
                                ", and nothing orders the two");
    }
}

// The newest record of a thread stands for its older ones.
void Races::note(Records& records, const Record& record) {
    const uint64_t bit = 1ull << record.thread % 64;
    if (records.threads & bit) {
        for (Record& r : records.list) {
            if (r.thread != record.thread || r.bytes != record.bytes || r.atomic != record.atomic) continue;
            r = record;
            return;
        }
    }
    records.threads |= bit;
    records.list.push_back(record);
}

void Races::access(int thread, Kind kind, size_t offset, size_t bytes, uint32_t site) {
    const uint32_t time = clock(thread)[thread];
    for (size_t at = offset / 4 * 4; at < offset + bytes; at += 4) {
        uint8_t mask = 0;
        for (size_t i = 0; i < 4; ++i) {
            if (at + i >= offset && at + i < offset + bytes) mask |= static_cast<uint8_t>(1 << i);
        }
        Word& word = shadow_->words[at / 4];
        if (word.epoch != shadow_->epoch) {
            word.epoch = shadow_->epoch;
            word.reads.clear();
            word.writes.clear();
        }
        const Record record{thread, time, site, mask, kind == Kind::kAtomic};
        check(word.writes, thread, mask, kind, "wrote", at, site);
        if (kind == Kind::kLoad) {
            note(word.reads, record);
            continue;
        }
        check(word.reads, thread, mask, kind, "read", at, site);
        // All that touched these bytes before is ordered before this: only what comes after it can race with it.
        const auto covered = [&](const Record& r) { return (r.bytes & ~mask) == 0 && !(r.atomic && record.atomic); };
        for (auto* list : {&word.reads.list, &word.writes.list}) {
            list->erase(std::remove_if(list->begin(), list->end(), covered), list->end());
        }
        note(word.writes, record);
    }
}

}  // namespace emu
