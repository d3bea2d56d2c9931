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

Races::Races(size_t shared_bytes, int threads, int blocks)
    : clocks_(threads),
      clock_epochs_(threads, 0),
      block_threads_(threads / blocks),
      width_(threads),
      starts_(threads, 0),
      fences_(threads),
      ended_(threads, false) {
    auto& shadows = spare<Shadow>();
    if (shadows.empty()) shadows.push_back(std::make_unique<Shadow>());
    shadow_ = std::move(shadows.back());
    shadows.pop_back();
    shadow_->words.resize(std::max(shadow_->words.size(), (shared_bytes + 3) / 4));
    birth_ = ++shadow_->epoch;
}

Races::~Races() { spare<Shadow>().push_back(std::move(shadow_)); }

Clock& Races::clock(int thread) {
    Clock& c = clocks_[thread];
    if (clock_epochs_[thread] != shadow_->epoch) {
        const uint32_t own = c.empty() ? 0 : c[thread];
        c.assign(width_, 0);
        c[thread] = own + 1;
        clock_epochs_[thread] = shadow_->epoch;
        starts_[thread] = c[thread];
    }
    c.resize(width_, 0);
    return c;
}

// After all threads have met, all know what any of them has seen to be complete.
void Races::forget_seen() {
    Clock most(width_, 0);
    for (size_t t = 0; t < clocks_.size(); ++t) {
        if (clock_epochs_[t] != shadow_->epoch || ended_[t]) continue;
        for (size_t i = clocks_.size(); i < clocks_[t].size(); ++i) most[i] = std::max(most[i], clocks_[t][i]);
    }
    const auto seen = [&](const Operation& operation) { return most[operation.agent] >= operation.time; };
    operations_.erase(std::remove_if(operations_.begin(), operations_.end(), seen), operations_.end());
    many_operations_ = std::max<size_t>(4096, 2 * operations_.size());
}

void Races::all_meet() {
    if (!operations_.empty()) forget_seen();
    ++shadow_->epoch;
    // Agents' pending operations carry over.
    for (const Operation& o : operations_) {
        for (size_t at = o.offset / 4 * 4; at < o.offset + o.bytes; at += 4) {
            Word& w = word(at);
            note(o.kind == Kind::kLoad ? w.reads : w.writes, {o.agent, o.time, o.site, 15, false});
        }
    }
}

void Races::meet(const std::vector<int>& threads) {
    Clock all(width_, 0);
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

int Races::agent() { return static_cast<int>(width_++); }

void Races::see(Clock& into, int agent, uint32_t time) {
    into.resize(width_, 0);
    into[agent] = std::max(into[agent], time);
}

void Races::see(int by, int agent, uint32_t time) { see(clock(by), agent, time); }

void Races::fence(int by) { fences_[by].push_back(clock(by)[by]++); }

void Races::ended(int by) { ended_[by] = true; }

void Races::visit(int block, int by, uint32_t time, uint32_t site) { visits_[{block, by}] = {time, site}; }

void Races::check_visits(int block) {
    for (const auto& [visit, when] : visits_) {
        const auto [visited, visitor] = visit;
        if (visited != block) continue;
        bool seen = false;
        for (int t = block * block_threads_; t < (block + 1) * block_threads_; ++t)
            seen |= clock(t)[visitor] >= when.first;
        if (seen) continue;
        throw Error(place(site_of(when.second)) + ": " + name_of(visitor) + " uses shared memory of block " +
                    std::to_string(block) + " of the cluster, and nothing orders that before the end of that block");
    }
}

std::string Races::name_of(int thread) const {
    const int threads = static_cast<int>(clocks_.size());
    if (thread >= threads) return "an asynchronous operation";
    const std::string block = threads == block_threads_
                                  ? "the block"
                                  : "block " + std::to_string(thread / block_threads_) + " of the cluster";
    return "thread " + std::to_string(thread % block_threads_) + " of " + block;
}

void Races::check(const Records& records, const Record& by, int thread, const char* did, const char* does,
                  size_t offset) {
    for (const Record& r : records.list) {
        if (r.thread == thread || !(r.bytes & by.bytes) || (r.atomic && by.atomic)) continue;
        if (clock(thread)[r.thread] >= r.time) continue;
        const std::string it = by.thread == thread ? "it" : "an asynchronous operation";
        fail(site_of(by.site), "a race: " + it + " " + does + " shared memory at offset " + std::to_string(offset) +
                                   ", which " + name_of(r.thread) + " " + did + " at " + place(site_of(r.site)) +
                                   ", and nothing orders the two");
    }
}

// A thread's newest record replaces its older ones.
void Races::note(Records& records, const Record& record) {
    const uint64_t bit = 1ull << record.thread % 64;
    if (records.threads & bit) {
        for (Record& r : records.list) {
            if (r.thread != record.thread || r.bytes != record.bytes || r.atomic != record.atomic) continue;
            if (r.time <= record.time) r = record;
            return;
        }
    }
    records.threads |= bit;
    records.list.push_back(record);
}

Races::Word& Races::word(size_t offset) {
    Word& word = shadow_->words[offset / 4];
    if (word.epoch != shadow_->epoch) {
        word.epoch = shadow_->epoch;
        word.reads.clear();
        word.writes.clear();
    }
    return word;
}

void Races::access_word(Word& word, const Record& by, int thread, Kind kind, size_t offset) {
    const char* const does = kind == Kind::kLoad ? "reads" : "writes";
    check(word.writes, by, thread, "wrote", does, offset);
    if (kind == Kind::kLoad) {
        note(word.reads, by);
        return;
    }
    check(word.reads, by, thread, "read", does, offset);
    // All earlier accesses to these bytes are ordered before this one, so later ones need only be compared with it.
    const auto covered = [&](const Record& r) { return (r.bytes & ~by.bytes) == 0 && !by.atomic; };
    for (auto* list : {&word.reads.list, &word.writes.list}) {
        list->erase(std::remove_if(list->begin(), list->end(), covered), list->end());
    }
    note(word.writes, by);
}

void Races::access(int thread, Kind kind, size_t offset, size_t bytes, uint32_t site) {
    const uint32_t time = clock(thread)[thread];
    for (size_t at = offset / 4 * 4; at < offset + bytes; at += 4) {
        uint8_t mask = 0;
        for (size_t i = 0; i < 4; ++i) {
            if (at + i >= offset && at + i < offset + bytes) mask |= static_cast<uint8_t>(1 << i);
        }
        Word& w = word(at);
        access_word(w, {thread, time, site, mask, kind == Kind::kAtomic}, thread, kind, at);
        if (kind == Kind::kLoad) continue;
        for (int i = 0; i < 4; ++i) {
            if (mask >> i & 1) w.written[i] = {shadow_->epoch, thread, time};
        }
    }
}

void Races::access_by(int agent, uint32_t time, int thread, Kind kind, size_t offset, size_t bytes, uint32_t site) {
    for (size_t at = offset / 4 * 4; at < offset + bytes; at += 4) {
        Word& w = word(at);
        access_word(w, {agent, time, site, 15, false}, thread, kind, at);
        for (auto& written : w.written) {
            if (written.epoch < birth_) continue;
            const Clock& fences = fences_[written.by];
            const auto fence = std::lower_bound(fences.begin(), fences.end(), written.time);
            clock(written.by);
            if (fence != fences.end() &&
                (written.by == thread || *fence < starts_[written.by] || clock(thread)[written.by] > *fence)) {
                continue;
            }
            fail(site_of(site), std::string("an asynchronous operation ") + (kind == Kind::kLoad ? "reads" : "writes") +
                                    " shared memory at offset " + std::to_string(at) + ", which " +
                                    name_of(written.by) +
                                    " wrote, and no fence.proxy.async of that thread comes between");
        }
        if (kind != Kind::kLoad) {
            for (auto& written : w.written) written.epoch = 0;
        }
    }
    if (operations_.size() > many_operations_) forget_seen();
    operations_.push_back({agent, time, kind, offset, bytes, site});
}

}  // namespace emu
