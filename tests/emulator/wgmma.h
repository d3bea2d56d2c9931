// Products of warpgroups (wgmma), which run beside the threads that ask for them.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "emulator.h"

namespace emu {

class Block;
struct Thread;

struct WarpGroup {
    explicit WarpGroup(Block& owner) : block(owner) {}

    // One instruction, of which each warp asks for a quarter of the rows.
    struct Asked {
        Product product;  // what all lanes have in common
        Site site;
        uint32_t fragments[4][32][4];
        const uint32_t* fragment_at[4][32];
        float* sums_at[4][32];
    };
    // Sums that a product adds to, and nobody has waited for.
    struct Sums {
        float* at[32];
        size_t many = 0;            // of a lane
        std::vector<float> values;  // [32, many], when they are not there yet and their registers are NaN
        uint64_t last = 0;          // the newest of the products
    };
    struct Warp {
        uint64_t asked = 0, executed = 0;  // products
        std::vector<uint64_t> groups;      // how many products had been asked for at each commit
        uint32_t waited = 0;               // groups
        bool fenced = false;
        std::map<float*, Sums> pending;  // by the first lane's
    };

    void ask(int warp, const Product (&lanes)[32], Site site);
    // Executes a warp's products until there are `until`.
    void execute(int warp, uint64_t until);
    void finish(int warp, uint32_t group, Site site);
    void check_registers() const;

    Block& block;
    Warp warps[4];
    std::deque<Asked> products;  // the first is number `first`
    uint64_t first = 0;
    std::vector<Thread*> waiting;
    std::vector<std::pair<int, Site>> registers[4];  // that each warp asked for; fewer are negative
    int agent = -1;                                  // of races

  private:
    void execute_one(int warp, const Asked& asked, Sums& sums);
    void note_reads(int warp, const Asked& asked);
};

}  // namespace emu
