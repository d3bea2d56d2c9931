// Bank conflicts, sectors, instruction counts.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "block.h"

namespace emu {
namespace {

struct Sites {
    std::vector<Site> list;
    std::unordered_map<uint64_t, uint32_t> number;
    std::pair<uint64_t, uint32_t> recent[256] = {};  // of `number`, by a hash of the key
};
Sites& sites() {
    static thread_local Sites all;
    return all;
}

// The counts. Names are added when they are asked for.
struct Tally {
    uint64_t launches = 0, blocks = 0, early = 0;
    std::vector<std::pair<const char*, uint64_t>> instructions;  // by the address of the name
    std::vector<Traffic> traffic;                                // by slot
    std::vector<const void*> kernels;
};
Tally& tally() {
    static thread_local Tally all;
    return all;
}

// A slot is a line, a space and a kind of access.
bool is_shared(uint32_t slot) { return slot % 6 / 3 == static_cast<uint32_t>(Space::kShared); }

const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Passes through the 32 banks of 4 bytes. Lanes with 8 bytes go in two phases, lanes with 16 bytes in four, neighbours
// together. Within a phase, lanes that read the same word share it.
void count_banks(const Request& request, Traffic& traffic) {
    const int size = std::max<int>(4, *std::max_element(request.bytes, request.bytes + 32));
    const int lanes = std::max(1, 128 / size);
    uintptr_t words[32][32];  // distinct words of each bank; a phase has at most 32
    for (int first = 0; first < 32; first += lanes) {
        int many[32] = {}, distinct = 0;
        for (int i = first; i < first + lanes; ++i) {
            if (!(request.lanes >> i & 1)) continue;
            for (uintptr_t word = request.address[i] / 4; word * 4 < request.address[i] + request.bytes[i]; ++word) {
                uintptr_t* const bank = words[word % 32];
                int& used = many[word % 32];
                if (std::find(bank, bank + used, word) == bank + used) bank[used++] = word, ++distinct;
            }
        }
        if (distinct == 0) continue;
        traffic.actual += static_cast<uint64_t>(*std::max_element(many, many + 32));
        traffic.minimum += static_cast<uint64_t>(distinct + 31) / 32;
    }
}

// An access is aligned to its size, at most 32 bytes, so it lies in one sector.
void count_sectors(const Request& request, Traffic& traffic) {
    std::pair<uintptr_t, uintptr_t> ranges[32];
    int many = 0;
    for (int i = 0; i < 32; ++i) {
        if (request.lanes >> i & 1) ranges[many++] = {request.address[i], request.address[i] + request.bytes[i]};
    }
    std::sort(ranges, ranges + many);
    uint64_t sectors = 0, bytes = 0;
    uintptr_t sector = ~uintptr_t{0}, end = 0;
    for (int i = 0; i < many; ++i) {
        const auto [from, to] = ranges[i];
        if (from / 32 != sector) ++sectors;
        sector = from / 32;
        if (to > end) bytes += to - std::max(from, end);
        end = std::max(end, to);
    }
    traffic.actual += sectors;
    traffic.minimum += (bytes + 31) / 32;
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
    // A file name's literal has one address for each file that includes it, so the address can be a key.
    Sites& all = sites();
    const uint64_t key = reinterpret_cast<uintptr_t>(site.file) * 65536 + static_cast<uint64_t>(site.line);
    auto& [known, number] = all.recent[key * 0x9e3779b97f4a7c15ull >> 56];
    if (known == key) return number;
    const auto [entry, fresh] = all.number.emplace(key, static_cast<uint32_t>(all.list.size()));
    if (fresh) all.list.push_back(site);
    known = key;
    return number = entry->second;
}

Site site_of(uint32_t number) { return sites().list[number]; }

Counters counters() {
    Counters all;
    all.launches = tally().launches;
    all.early = tally().early;
    all.blocks = tally().blocks;
    for (const auto& [name, times] : tally().instructions) all.instructions[name] += times;
    const char* const kinds[] = {"load", "store", "atomic"};
    for (uint32_t slot = 0; slot < tally().traffic.size(); ++slot) {
        const Traffic& one = tally().traffic[slot];
        if (one.requests == 0) continue;
        const Site site = site_of(slot / 6);
        const std::string name =
            std::string(base_name(site.file)) + ":" + std::to_string(site.line) + " " + kinds[slot % 3];
        Traffic& sum = (is_shared(slot) ? all.shared : all.global)[name];
        sum.requests += one.requests;
        sum.bytes += one.bytes;
        sum.actual += one.actual;
        sum.minimum += one.minimum;
    }
    return all;
}

void reset_counters() { tally() = {}; }
void count_launch(bool early) {
    ++tally().launches;
    tally().early += early;
}
void count_block() { ++tally().blocks; }
void count_kernel(const void* kernel) {
    auto& all = tally().kernels;
    if (std::find(all.rbegin(), all.rend(), kernel) == all.rend()) all.push_back(kernel);
}
std::vector<const void*> kernels_run() { return tally().kernels; }

void count(const char* instruction, Site) {
    auto& all = tally().instructions;
    for (auto& [name, times] : all) {
        if (name == instruction) {
            ++times;
            return;
        }
    }
    all.emplace_back(instruction, 1);
}

// A lane's n-th visit to a line belongs to the same instruction as the other lanes' n-th visits.
void collect(Thread& thread, Space space, Kind kind, const void* address, size_t bytes, uint32_t site) {
    const uint32_t slot = site * 6 + static_cast<uint32_t>(space) * 3 + static_cast<uint32_t>(kind);
    if (thread.executions.size() <= slot) thread.executions.resize(slot + 1, 0);
    auto& all = thread.block->warps[thread.linear / 32].requests;
    if (all.size() <= slot) all.resize(slot + 1);
    Requests& requests = all[slot];
    const size_t at = thread.executions[slot]++ - requests.finished;
    while (requests.open.size() <= at) requests.open.emplace_back();
    Request& request = requests.open[at];
    const int lane = thread.linear % 32;
    request.lanes |= 1u << lane;
    request.bytes[lane] = static_cast<uint8_t>(bytes);
    request.address[lane] = reinterpret_cast<uintptr_t>(address);
    if (request.lanes != 0xffffffffu) return;
    finish(slot, request);
    if (++requests.complete == requests.open.size()) {
        requests.finished += requests.complete;
        requests.complete = 0;
        requests.open.clear();
    }
}

namespace {
Traffic& traffic_of(uint32_t slot) {
    auto& all = tally().traffic;
    if (all.size() <= slot) all.resize(slot + 1);
    return all[slot];
}
}  // namespace

void count_bulk(Space space, Kind kind, uintptr_t address, size_t bytes, uint64_t actual, uint64_t minimum,
                uint32_t site) {
    Traffic& traffic = traffic_of(site * 6 + static_cast<uint32_t>(space) * 3 + static_cast<uint32_t>(kind));
    ++traffic.requests;
    traffic.bytes += bytes;
    const bool shared = space == Space::kShared;
    traffic.actual += shared ? actual : (address + bytes + 31) / 32 - address / 32;
    traffic.minimum += shared ? minimum : (bytes + 31) / 32;
}

void finish(uint32_t slot, const Request& request) {
    Traffic& traffic = traffic_of(slot);
    ++traffic.requests;
    for (int i = 0; i < 32; ++i) traffic.bytes += request.bytes[i];
    is_shared(slot) ? count_banks(request, traffic) : count_sectors(request, traffic);
}

std::string Counters::json() const {
    std::string out = "{\"launches\": " + std::to_string(launches) + ", \"early\": " + std::to_string(early) +
                      ", \"blocks\": " + std::to_string(blocks) + ", \"instructions\": {";
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
