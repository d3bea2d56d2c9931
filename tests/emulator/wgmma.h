// Warpgroup products (wgmma), which run beside the threads that ask for them.
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

    // One instruction. Each warp asks for a quarter of its rows.
    struct Asked {
        Product product;  // what all lanes agree on
        Site site;
        uint32_t fragments[4][32][4];
        const uint32_t* fragment_at[4][32];
        float* sums_at[4][32];
    };
    // Sums that a product adds to, and no thread has waited for.
    struct Sums {
        float* at[32];
        size_t many = 0;            // for each lane
        std::vector<float> values;  // [32, many], while the registers are NaN
        uint64_t last = 0;          // the newest product
    };
    struct Warp {
        uint64_t asked = 0, executed = 0;  // products
        std::vector<uint64_t> groups;      // products asked for at each commit
        uint32_t waited = 0;               // groups
        bool fenced = false;
        std::map<float*, Sums> pending;  // by the first lane's address
    };

    void ask(int warp, const Product (&lanes)[32], Site site);
    // Executes a warp's products up to number `until`.
    void execute(int warp, uint64_t until);
    void finish(int warp, uint32_t group, Site site);
    void check_registers() const;

    Block& block;
    Warp warps[4];
    std::deque<Asked> products;  // starting with number `first`
    uint64_t first = 0;
    std::vector<Thread*> waiting;
    std::vector<std::pair<int, Site>> registers[4];  // that each warp asked for; negative: setmaxnreg.dec
    int agent = -1;                                  // in Races

  private:
    void execute_one(int warp, const Asked& asked, Sums& sums);
    void note_reads(int warp, const Asked& asked);
};

}  // namespace emu
