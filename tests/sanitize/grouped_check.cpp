// linear_grouped_forward and linear_grouped_backward, against float64 loops.
#include "check.h"

namespace check {
namespace {

// The experts of a mixture as stacks: each is a Linear with rows, operands and results of its own.
struct Experts {
    std::vector<Linear> each;
    std::vector<int64_t> offsets = {0};
    std::vector<uint8_t> packed, x, a, b, dy, u_in;
    std::vector<float> absmax, bias;
    Expected y, u, dx, da, db;
    DType dtype;
    int64_t n, k, r;

    Experts(DType type, const std::vector<int64_t>& rows, int64_t outs, int64_t columns, int64_t rank, bool with_bias,
            Random& random)
        : dtype(type), n(outs), k(columns), r(rank) {
        for (int64_t m : rows) {
            each.emplace_back(type, m, n, k, r, 0.0f, with_bias, false, random);
            const Linear& one = each.back();
            offsets.push_back(offsets.back() + m);
            append(packed, one.weight.packed);
            append(absmax, one.weight.absmax);
            append(bias, one.bias);
            append(x, one.x.bytes);
            append(a, one.a.bytes);
            append(b, one.b.bytes);
            append(dy, one.dy.bytes);
            append(u_in, one.u_in.bytes);
            append(y, one.y);
            append(u, one.u);
            append(dx, one.dx);
            append(da, one.da);
            append(db, one.db);
        }
    }

    template <class T>
    static void append(std::vector<T>& to, const std::vector<T>& more) {
        to.insert(to.end(), more.begin(), more.end());
    }
    static void append(Expected& to, const Expected& more) {
        append(to.value, more.value);
        append(to.tolerance, more.tolerance);
    }
    qlk::WeightView first(Buffers& buffers) const {
        qlk::WeightView view{};
        view.n = n;
        view.k = k;
        view.packed = buffers.input(packed);
        view.absmax = buffers.input(absmax);
        return view;
    }
};

void check_forward(const Experts& c, int threads, SameBits& bits) {
    for (Guard guard : kGuards) {
        Buffers buffers(guard);
        qlk::GroupedForwardParams all{};
        qlk::LinearForwardParams& p = all.first;
        p.weight = c.first(buffers);
        p.x = buffers.input(c.x);
        if (c.r > 0) {
            p.lora_a = buffers.input(c.a);
            p.lora_b = buffers.input(c.b);
        }
        if (!c.bias.empty()) p.bias = buffers.input(c.bias);
        p.m = c.offsets.back();
        const size_t y_bytes = p.m * c.n * size_of(c.dtype), u_bytes = p.m * c.r * size_of(c.dtype);
        uint8_t* const y = buffers.output(y_bytes);
        uint8_t* const u = buffers.output(u_bytes);
        p.y = y;
        p.u = c.r > 0 ? u : nullptr;
        p.r = c.r;
        p.scaling = c.each[0].scaling;
        p.dtype = c.dtype;
        p.threads = threads;
        all.offsets = buffers.input(c.offsets);
        all.experts = static_cast<int64_t>(c.each.size());
        qlk::cpu::linear_grouped_forward(all);
        buffers.expect_rest_untouched();
        expect_close("u", c.dtype, u, c.u);
        expect_close("y", c.dtype, y, c.y);
        bits.add("y", y, y_bytes);
        bits.add("u", u, u_bytes);
        bits.rewind();
    }
}

void check_backward(const Experts& c, int threads, SameBits& bits) {
    for (Guard guard : kGuards) {
        Buffers buffers(guard);
        qlk::GroupedBackwardParams all{};
        qlk::LinearBackwardParams& p = all.first;
        p.weight = c.first(buffers);
        p.m = c.offsets.back();
        p.dy = buffers.input(c.dy);
        const int64_t experts = static_cast<int64_t>(c.each.size());
        const size_t dx_bytes = p.m * c.k * size_of(c.dtype);
        const size_t da_bytes = experts * c.r * c.k * sizeof(float), db_bytes = experts * c.n * c.r * sizeof(float);
        uint8_t* const dx = buffers.output(dx_bytes);
        uint8_t* const da = buffers.output(da_bytes);
        uint8_t* const db = buffers.output(db_bytes);
        p.dx = dx;
        if (c.r > 0) {
            p.lora_a = buffers.input(c.a);
            p.lora_b = buffers.input(c.b);
            p.x = buffers.input(c.x);
            p.u = buffers.input(c.u_in);
            p.da = reinterpret_cast<float*>(da);
            p.db = reinterpret_cast<float*>(db);
        }
        p.r = c.r;
        p.scaling = c.each[0].scaling;
        p.dtype = c.dtype;
        p.threads = threads;
        all.offsets = buffers.input(c.offsets);
        all.experts = experts;
        qlk::cpu::linear_grouped_backward(all);
        buffers.expect_rest_untouched();
        expect_close("dx", c.dtype, dx, c.dx);
        expect_close("da", DType::kFloat32, da, c.da);
        expect_close("db", DType::kFloat32, db, c.db);
        bits.add("dx", dx, dx_bytes);
        bits.add("da", da, da_bytes);
        bits.add("db", db, db_bytes);
        bits.rewind();
    }
}

}  // namespace

void check_grouped(const std::vector<std::string>& isas) {
    Random random(23);
    struct Size {
        std::vector<int64_t> rows;
        int64_t n, k, r;
        int threads;
    };
    const Size sizes[] = {
        {{1}, 33, 64, 3, 3},                    // one expert, for all threads
        {{0, 2, 0, 17, 1, 0}, 65, 128, 16, 2},  // some without rows
        {{1, 1, 1}, 600, 64, 0, 3},             // few and short: each is cut
        {{40, 0, 1}, 520, 192, 5, 7},           // more threads than experts, and one with most of the rows
        {{3, 5}, 300, 100, 2, 3},               // blocks that rows cut
        {{3, 0, 9}, 40, 600, 4, 7},             // dx in parts
        {{0, 1, 0}, 7, 63, 1, 1},               // rows that begin in the middle of a byte
    };
    int index = 0;
    for (const Size& size : sizes) {
        for (DType dtype : kDTypes) {
            const bool with_bias = index++ % 2;
            const Experts c(dtype, size.rows, size.n, size.k, size.r, with_bias, random);
            for (const std::string& isa : isas) {
                if (dtype != DType::kBFloat16 && (isa == "amx" || isa == "avx512_bf16")) continue;
                use(isa);
                SameBits bits[2];
                for (int threads : {size.threads, 1}) {
                    name_case("linear_grouped %s %s n=%" PRId64 " k=%" PRId64 " r=%" PRId64 " threads=%d", isa.c_str(),
                              name_of(dtype), size.n, size.k, size.r, threads);
                    check_forward(c, threads, bits[0]);
                    check_backward(c, threads, bits[1]);
                }
            }
        }
    }
}

}  // namespace check
