// Bank conflicts, sectors, instruction counts.
#include <algorithm>

#include "block.h"

namespace emu {
namespace {

struct Sites {
    std::vector<Site> list;
    std::unordered_map<uint64_t, uint32_t> number;
};
Sites& sites() {
    static thread_local Sites all;
    return all;
}

const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Passes through the banks: 32 banks of 4 bytes. Lanes with 8 bytes go in two halves, with 16 bytes in four quarters
// (the lanes of a phase are neighbours); within a phase, lanes that read the same word share it.
void count_banks(const Request& request, Traffic& traffic) {
    const uint32_t size = std::max(4u, *std::max_element(request.bytes, request.bytes + 32));
    const int lanes = static_cast<int>(std::max<uint32_t>(1, 128 / size));
    for (int first = 0; first < 32; first += lanes) {
        std::vector<uintptr_t> words[32];
        size_t distinct = 0;
        for (int i = first; i < std::min(first + lanes, 32); ++i) {
            if (!(request.lanes >> i & 1)) continue;
            for (uintptr_t word = request.address[i] / 4; word * 4 < request.address[i] + request.bytes[i]; ++word) {
                auto& bank = words[word % 32];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word), ++distinct;
            }
        }
        if (distinct == 0) continue;
        size_t passes = 0;
        for (const auto& bank : words) passes = std::max(passes, bank.size());
        traffic.actual += passes;
        traffic.minimum += (distinct + 31) / 32;
    }
}

void count_sectors(const Request& request, Traffic& traffic) {
    std::vector<uintptr_t> sectors, words;
    for (int i = 0; i < 32; ++i) {
        if (!(request.lanes >> i & 1)) continue;
        const uintptr_t end = request.address[i] + request.bytes[i];
        for (uintptr_t s = request.address[i] / 32; s * 32 < end; ++s) sectors.push_back(s);
        for (uintptr_t b = request.address[i]; b < end; ++b) words.push_back(b);
    }
    const auto distinct = [](std::vector<uintptr_t>& all) {
        std::sort(all.begin(), all.end());
        return static_cast<uint64_t>(std::unique(all.begin(), all.end()) - all.begin());
    };
    traffic.actual += distinct(sectors);
    traffic.minimum += (distinct(words) + 31) / 32;
}

void append(std::string& out, const std::map<std::string, Traffic>& all) {
    out += "{";
    for (const auto& [name, t] : all) {
        if (out.back() != '{') out += ", ";
        out += "\"" + name + "\": {\"requests\": " + std::to_string(t.requests) +
               ", \"bytes\": " + std::to_string(t.bytes) + ", \"actual\": " + std::to_string(t.actual) +
               ", \"minimum\": " + std::to_string(t.minimum) + "}";
    }
    out += "}";
}

}  // namespace

uint32_t site_number(Site site) {
    // A file's name is one literal for each file that includes it: its address serves as a key.
    Sites& all = sites();
    const uint64_t key = reinterpret_cast<uintptr_t>(site.file) * 65536 + static_cast<uint64_t>(site.line);
    const auto [entry, fresh] = all.number.emplace(key, static_cast<uint32_t>(all.list.size()));
    if (fresh) all.list.push_back(site);
    return entry->second;
}

Site site_of(uint32_t number) { return sites().list[number]; }

Counters& counters() {
    static thread_local Counters all;
    return all;
}

void count(const char* instruction, Site) { ++counters().instructions[instruction]; }

// The n-th time that a lane comes to a line belongs to the same instruction as the n-th time of the other lanes.
void collect(Thread& thread, Space space, Kind kind, const void* address, size_t bytes, Site site) {
    const uint32_t number = site_number(site);
    const uint32_t slot = number * 6 + static_cast<uint32_t>(space) * 3 + static_cast<uint32_t>(kind);
    if (thread.executions.size() <= slot) thread.executions.resize(slot + 1, 0);
    const uint64_t key = static_cast<uint64_t>(slot) << 32 | thread.executions[slot]++;
    Warp& warp = thread.block->warps[thread.linear / 32];
    Request& request = warp.requests[key];
    if (request.lanes == 0) std::fill_n(request.bytes, 32, 0);
    const int lane = thread.linear % 32;
    request.lanes |= 1u << lane;
    request.bytes[lane] = static_cast<uint32_t>(bytes);
    request.address[lane] = reinterpret_cast<uintptr_t>(address);
    if (request.lanes == 0xffffffffu) {
        finish(key, request);
        warp.requests.erase(key);
    }
}

void finish(uint64_t key, const Request& request) {
    const uint32_t slot = static_cast<uint32_t>(key >> 32);
    const Site site = site_of(slot / 6);
    const bool shared = slot % 6 / 3 == static_cast<uint32_t>(Space::kShared);
    const char* const kinds[] = {"load", "store", "atomic"};
    const std::string name =
        std::string(base_name(site.file)) + ":" + std::to_string(site.line) + " " + kinds[slot % 3];
    Traffic& traffic = (shared ? counters().shared : counters().global)[name];
    ++traffic.requests;
    for (int i = 0; i < 32; ++i) traffic.bytes += request.bytes[i];
    shared ? count_banks(request, traffic) : count_sectors(request, traffic);
}

std::string Counters::json() const {
    std::string out = "{\"launches\": " + std::to_string(launches) + ", \"blocks\": " + std::to_string(blocks) +
                      ", \"instructions\": {";
    for (const auto& [name, times] : instructions) {
        if (out.back() != '{') out += ", ";
        out += "\"" + name + "\": " + std::to_string(times);
    }
    out += "}, \"shared\": ";
    append(out, shared);
    out += ", \"global\": ";
    append(out, global);
    return out + "}";
}

}  // namespace emu
