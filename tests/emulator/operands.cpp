#include "operands.h"

#include <algorithm>

#include "block.h"

namespace emu {
namespace {

std::shared_ptr<const Operands>& current() {
    static thread_local std::shared_ptr<const Operands> one;
    return one;
}
struct Misstated {
    size_t fewer;
    bool read_only;
};
std::map<std::string, Misstated>& misstated() {
    static thread_local std::map<std::string, Misstated> all;
    return all;
}

}  // namespace

std::string Operands::Operand::text() const {
    return number < 0 ? name : std::string(name) + "[" + std::to_string(number) + "]";
}

void Operands::add(const char* name, const void* address, size_t bytes, int64_t number, bool writable) {
    if (!address) return;
    if (!misstated().empty()) {
        const auto found = misstated().find(name);
        if (found != misstated().end()) {
            bytes -= std::min(bytes, found->second.fewer);
            writable &= !found->second.read_only;
        }
    }
    const auto begin = reinterpret_cast<uintptr_t>(address);
    all_.push_back({name, number, begin, begin + bytes, writable});
}

void Operands::reads(const char* name, const void* address, size_t bytes, int64_t number) {
    add(name, address, bytes, number, false);
}
void Operands::writes(const char* name, const void* address, size_t bytes, int64_t number) {
    add(name, address, bytes, number, true);
}

uint32_t Operands::find(Kind kind, uintptr_t address, size_t bytes, uint32_t line) const {
    // Operands may overlap, so it need not be the last one that begins before the access.
    auto one = std::upper_bound(all_.begin(), all_.end(), address,
                                [](uintptr_t at, const Operand& candidate) { return at < candidate.begin; });
    while (one != all_.begin()) {
        --one;
        if (one->holds(kind, address, bytes)) return static_cast<uint32_t>(one - all_.begin());
    }
    explain(kind, address, bytes, site_of(line));
}

void Operands::explain(Kind kind, uintptr_t address, size_t bytes, Site site) const {
    const std::string does = kind == Kind::kLoad ? "reads " : kind == Kind::kStore ? "writes " : "changes ";
    const auto outside = [&](const Operand& one) {  // how many bytes away it ends, or begins
        return address < one.begin ? one.begin - address : address + bytes > one.end ? address + bytes - one.end : 0;
    };
    const auto nearest = std::min_element(all_.begin(), all_.end(),
                                          [&](const Operand& a, const Operand& b) { return outside(a) < outside(b); });
    if (nearest == all_.end()) fail(site, does + "global memory, and " + call_ + " was given none");
    if (outside(*nearest) == 0) fail(site, does + nearest->text() + ", which " + call_ + " only reads");
    const bool before = address < nearest->begin;
    const size_t far = before ? nearest->begin - address : outside(*nearest);
    fail(site, does + std::to_string(bytes) + (bytes == 1 ? " byte that reaches " : " bytes that reach ") +
                   std::to_string(far) + (before ? " before the start of " : " beyond the end of ") + nearest->text() +
                   ": " + call_ + " was given " + std::to_string(nearest->end - nearest->begin));
}

void Operands::check_tensor(uintptr_t address, size_t bytes) const {
    for (const Operand& one : all_) {
        if (one.begin < address || one.begin >= address + bytes || one.end <= address + bytes) continue;
        throw Error(std::string(call_) + " takes " + std::to_string(one.end - one.begin) + " bytes of " + one.text() +
                    ", and the tensor there has " + std::to_string(address + bytes - one.begin));
    }
}

Given::Given(Operands operands) : before_(current()) {
    std::stable_sort(operands.all_.begin(), operands.all_.end(),
                     [](const auto& a, const auto& b) { return a.begin < b.begin; });
    current() = std::make_shared<const Operands>(std::move(operands));
}
Given::~Given() { current() = before_; }

std::shared_ptr<const Operands> given() { return current(); }

void misstate(const std::string& name, size_t fewer, bool read_only) { misstated()[name] = {fewer, read_only}; }
void forget_misstated() { misstated().clear(); }

}  // namespace emu
