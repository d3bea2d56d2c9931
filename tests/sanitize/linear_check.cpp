// linear_forward and linear_backward, against float64 loops.
#include <algorithm>

#include "check.h"

namespace check {
namespace {

void check_forward(const Linear& c, const std::string& isa, const std::string& shape, int threads, SameBits& bits) {
    for (Guard guard : kGuards) {
        name_case("linear_forward %s %s", isa.c_str(), shape.c_str());
        Buffers buffers(guard);
        qlk::LinearForwardParams p{};
        p.weight = buffers.weight(c.weight);
        p.x = buffers.input(c.x.bytes);
        if (c.r > 0) {
            p.lora_a = buffers.input(c.a.bytes);
            p.lora_b = buffers.input(c.b.bytes);
        }
        if (!c.bias.empty()) p.bias = buffers.input(c.bias);
        const size_t y_bytes = c.m * c.weight.n * size_of(c.dtype), u_bytes = c.m * c.r * size_of(c.dtype);
        uint8_t* const y = buffers.output(y_bytes);
        uint8_t* const u = buffers.output(u_bytes);
        p.y = y;
        p.u = c.r > 0 ? u : nullptr;
        p.m = c.m;
        p.r = c.r;
        p.scaling = c.scaling;
        p.dropout = c.dropout;
        p.seed = c.seed;
        p.dtype = c.dtype;
        p.threads = threads;
        qlk::cpu::linear_forward(p);
        buffers.expect_rest_untouched();
        expect_close("u", c.dtype, u, c.u);
        expect_close("y", c.dtype, y, c.y);
        bits.add("y", y, y_bytes);
        bits.add("u", u, u_bytes);
        bits.rewind();
    }
}

// wanted: bit 0 for dx, bit 1 for da, bit 2 for db.
void check_backward(const Linear& c, const std::string& isa, const std::string& shape, int threads, int wanted,
                    SameBits& bits) {
    for (Guard guard : kGuards) {
        const bool dx_wanted = wanted & 1, da_wanted = (wanted & 2) && c.r > 0, db_wanted = (wanted & 4) && c.r > 0;
        name_case("linear_backward %s %s%s%s%s", isa.c_str(), shape.c_str(), dx_wanted ? " dx" : "",
                  da_wanted ? " da" : "", db_wanted ? " db" : "");
        Buffers buffers(guard);
        qlk::LinearBackwardParams p{};
        p.weight = buffers.weight(c.weight);
        p.dy = buffers.input(c.dy.bytes);
        if (da_wanted) p.x = buffers.input(c.x.bytes);
        if (db_wanted) p.u = buffers.input(c.u_in.bytes);
        if (c.r > 0) {
            p.lora_a = buffers.input(c.a.bytes);
            p.lora_b = buffers.input(c.b.bytes);
        }
        const size_t dx_bytes = dx_wanted ? c.m * c.weight.k * size_of(c.dtype) : 0;
        const size_t da_bytes = da_wanted ? c.r * c.weight.k * sizeof(float) : 0;
        const size_t db_bytes = db_wanted ? c.weight.n * c.r * sizeof(float) : 0;
        uint8_t* const dx = buffers.output(dx_bytes);
        uint8_t* const da = buffers.output(da_bytes);
        uint8_t* const db = buffers.output(db_bytes);
        p.dx = dx_wanted ? dx : nullptr;
        p.da = da_wanted ? reinterpret_cast<float*>(da) : nullptr;
        p.db = db_wanted ? reinterpret_cast<float*>(db) : nullptr;
        p.m = c.m;
        p.r = c.r;
        p.scaling = c.scaling;
        p.dropout = c.dropout;
        p.seed = c.seed;
        p.dtype = c.dtype;
        p.threads = threads;
        qlk::cpu::linear_backward(p);
        buffers.expect_rest_untouched();
        if (dx_wanted) expect_close("dx", c.dtype, dx, c.dx);
        if (da_wanted) expect_close("da", DType::kFloat32, da, c.da);
        if (db_wanted) expect_close("db", DType::kFloat32, db, c.db);
        bits.add("dx", dx, dx_bytes);
        bits.add("da", da, da_bytes);
        bits.add("db", db, db_bytes);
        bits.rewind();
    }
}

}  // namespace

void check_linear(const LinearShape& s, const std::vector<std::string>& isas, Random& random, bool same_bits) {
    for (DType dtype : kDTypes) {
        const Linear c(dtype, s.m, s.n, s.k, s.r, s.dropout, s.bias, s.double_quant, random);
        char shape[160];
        std::snprintf(shape, sizeof shape,
                      "%s m=%" PRId64 " n=%" PRId64 " k=%" PRId64 " r=%" PRId64
                      " dropout=%g bias=%d double_quant=%d threads=%d",
                      name_of(dtype), s.m, s.n, s.k, s.r, s.dropout, s.bias, s.double_quant, s.threads);
        // Gradients wanted: all, and some that have to do without the others' intermediate results.
        constexpr int kSome[] = {1, 2, 4, 3, 5, 6};
        const int some = kSome[random.bits() % 6];
        // Of forward, of backward for all gradients, and for some.
        SameBits bits[3];
        for (const std::string& isa : isas) {
            // Except for bfloat16, these are avx512's sources for the same registers.
            if (dtype != DType::kBFloat16 && (isa == "amx" || isa == "avx512_bf16")) continue;
            use(isa);
            if (!same_bits) std::fill(std::begin(bits), std::end(bits), SameBits{});
            check_forward(c, isa, shape, s.threads, bits[0]);
            check_backward(c, isa, shape, s.threads, 7, bits[1]);
            if (s.r > 0) check_backward(c, isa, shape, s.threads, some, bits[2]);
        }
    }
}

void check_linears(const std::vector<std::string>& isas) {
    Random random(1);
    // Rows of x: none; one to eight, for which some sets have their own path, and one more; around a tile of 16 and a
    // block of 32; two blocks and one.
    const int64_t rows[] = {0, 1, 2, 3, 4, 5, 8, 9, 11, 16, 17, 32, 33, 65};
    // W's rows: one; below a tile; a tile; a block and one; a backward panel of 128 and two.
    const int64_t outs[] = {1, 7, 16, 33, 130};
    // W's columns: odd ones, whose rows begin in the middle of a byte; around one block of 64; blocks that rows cut
    // (100); one, two, three and five blocks, since 128 columns are decoded at a time.
    const int64_t columns[] = {1, 63, 64, 65, 100, 128, 192, 320};
    // Ranks: none, one, a tile, a block and one, a panel and two.
    const int64_t ranks[] = {0, 1, 16, 33, 130};
    // All triples of the first three; of the rest every combination comes with many of them.
    int index = 0;
    for (int64_t m : rows) {
        for (int64_t n : outs) {
            for (int64_t k : columns) {
                LinearShape s{m, n, k, ranks[(index + index / 5) % 5], 0.0f, false, false, 1};
                s.dropout = s.r > 0 && random.bits() % 2 ? 0.3f : 0.0f;
                s.bias = random.bits() % 2;
                s.double_quant = random.bits() % 2;
                s.threads = 1 + static_cast<int>(random.bits() % 3);
                check_linear(s, isas, random, false);
                ++index;
            }
        }
    }
}

// part: 1 or 2 for every other one, 0 for all.
void check_large_linears(const std::vector<std::string>& isas, int part) {
    Random random(7);
    const LinearShape large[] = {
        // Many steps of the reduction, and enough work for three threads.
        {1, 130, 4160, 16, 0.0f, true, true, 3},
        {2, 33, 4160, 16, 0.0f, true, false, 2},
        {5, 300, 4160, 33, 0.0f, true, true, 3},
        {33, 130, 4160, 16, 0.3f, false, true, 3},
        // More rows than fit in one superblock of packed x: float32 rows of 4160 take 16 KB of the thread's 4 MiB.
        {260, 7, 4160, 1, 0.3f, true, false, 1},
        // More rows than a superblock ever has, so that da and db are sums of two.
        {1057, 33, 64, 16, 0.3f, false, false, 1},
        {1057, 33, 65, 16, 0.3f, true, true, 1},
        // Tasks of several panels of W, and more than 256 block constants' groups.
        {3, 1100, 128, 16, 0.0f, true, true, 1},
        {17, 1100, 192, 33, 0.0f, false, true, 1},
        {5, 33, 1100, 16, 0.3f, false, false, 1},
        // Sums too long for 64 packed rows of x, or of dy in backward, to fit in the scratch memory meant for them, in
        // whole blocks of 64 or not; and too long for what the kernels for few rows keep of x.
        {33, 7, 66048, 16, 0.3f, true, true, 1},
        {65, 3, 70001, 1, 0.0f, false, false, 2},
        {65, 66001, 5, 1, 0.3f, true, true, 2},
        {1, 128256, 64, 0, 0.0f, false, true, 1},
        {8, 64, 131072, 0, 0.0f, true, true, 1},
        {4, 3, 600064, 1, 0.0f, false, true, 1},
        // A rank above those that da and db take at a time.
        {33, 40, 64, 1100, 0.3f, false, true, 1},
        // A rank above the depth of a panel.
        {17, 65, 320, 300, 0.3f, true, true, 1},
        {2, 65, 320, 300, 0.0f, true, true, 1},
    };
    int index = 0;
    for (const LinearShape& s : large) {
        if (part == 0 || index % 2 == part % 2) check_linear(s, isas, random, false);
        ++index;
    }
}

}  // namespace check
