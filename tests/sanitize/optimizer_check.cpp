// An optimizer's step and the encoding of its states, against float32 loops, to the bit.
#include <algorithm>

#include "check.h"
#include "naive_optimizer.h"

namespace check {
namespace {

void expect_same(const char* what, const uint8_t* actual, const std::vector<uint8_t>& expected, size_t width) {
    for (size_t i = 0; i < expected.size(); ++i) {
        if (actual[i] != expected[i]) fail("%s[%zu] is not what it should be to the bit", what, i / width);
    }
}

// A plane of states in its own memory, and its offset from `base`, to which the kernels add it.
struct PlaneBuffer {
    uint8_t* data;
    int64_t offset;
    PlaneBuffer(Buffers& buffers, const std::vector<uint8_t>& content, const uint8_t* base)
        : data(buffers.changing(content)),
          offset(static_cast<int64_t>(reinterpret_cast<intptr_t>(data) - reinterpret_cast<intptr_t>(base))) {}
};

// The planes of a case in guarded memory.
struct Planes {
    const OptimizerCase& c;
    PlaneBuffer first, second, first_absmax, second_absmax, master;

    Planes(const OptimizerCase& a_case, Buffers& buffers, const uint8_t* base)
        : c(a_case),
          first(buffers, c.narrow ? c.first_codes.code : bytes_of(c.first), base),
          second(buffers,
                 !adam()    ? bytes_of(std::vector<float>())
                 : c.narrow ? c.second_codes.code
                            : bytes_of(c.second),
                 base),
          first_absmax(buffers, bytes_of(c.first_codes.absmax), base),
          second_absmax(buffers, bytes_of(c.second_codes.absmax), base),
          master(buffers, bytes_of(c.master), base) {}

    bool adam() const { return c.algorithm == qlk::Algorithm::kAdamW; }

    // The chunks of the case's tensor, number 1. After the first comes one of tensor 0, which has no gradient and no
    // states.
    std::vector<qlk::OptimizerChunk> chunks() const {
        using namespace qlk;
        std::vector<OptimizerChunk> all;
        const int32_t dtype = static_cast<int32_t>(c.dtype);
        const int64_t wide = c.narrow ? 1 : sizeof(float);
        const auto plane = [](const PlaneBuffer& buffer, bool exists, int64_t bytes) {
            return exists ? buffer.offset + bytes : kNoPlane;
        };
        for (int64_t at = 0; at < c.count; at += kChunk) {
            const int32_t size = static_cast<int32_t>(std::min<int64_t>(kChunk, c.count - at));
            const int64_t constants = at / kStateBlock * static_cast<int64_t>(sizeof(float));
            all.push_back(
                {1,
                 size,
                 0,
                 dtype,
                 at,
                 {plane(first, true, at * wide), plane(second, adam(), at * wide),
                  plane(first_absmax, c.narrow, constants), plane(second_absmax, adam() && c.narrow, constants),
                  plane(master, c.with_master, at * static_cast<int64_t>(sizeof(float)))}});
            if (at == 0) all.push_back({0, 5, 0, dtype, 0, {kNoPlane, kNoPlane, kNoPlane, kNoPlane, kNoPlane}});
        }
        return all;
    }

    // Compares them with what the step should leave.
    void expect_after() const {
        expect_same("master", master.data, bytes_of(c.master_after), sizeof(float));
        if (c.narrow) {
            expect_same("first code", first.data, c.first_codes_after.code, 1);
            expect_same("first absmax", first_absmax.data, bytes_of(c.first_codes_after.absmax), sizeof(float));
            if (adam()) expect_same("second code", second.data, c.second_codes_after.code, 1);
            expect_same("second absmax", second_absmax.data,
                        bytes_of(adam() ? c.second_codes_after.absmax : c.second_codes.absmax), sizeof(float));
        } else {
            expect_same("first", first.data, bytes_of(c.first_after), sizeof(float));
            if (adam()) expect_same("second", second.data, bytes_of(c.second_after), sizeof(float));
        }
    }
};

void check_optimizer_step(const OptimizerCase& c, SameBits& bits, Guard guard, int threads, bool measure) {
    using namespace qlk;
    Buffers buffers(guard);
    alignas(16) static unsigned char base[16];
    uint8_t* const param = buffers.changing(c.param);
    const uint8_t* const grad = buffers.input(c.grad);
    const Planes planes(c, buffers, base);
    const std::vector<OptimizerChunk> chunks = planes.chunks();
    const std::vector<OptimizerTensor> tensors = {
        {0, 0}, {reinterpret_cast<uintptr_t>(param), reinterpret_cast<uintptr_t>(grad)}};
    const std::vector<float> steps = {7.0f, static_cast<float>(c.done)};
    uint8_t* const counted = buffers.changing(bytes_of(steps));
    OptimizerControl control{};
    OptimizerParams p{};
    p.algorithm = c.algorithm;
    p.state_bits = c.narrow ? 8 : 32;
    p.chunks = buffers.input(chunks);
    p.all_chunks = static_cast<int64_t>(chunks.size());
    p.tensors = buffers.input(tensors);
    p.tensor_count = 2;
    p.groups = buffers.input(std::vector<OptimizerGroup>{c.group});
    p.control = &control;
    p.steps = reinterpret_cast<float*>(counted);
    p.partial = reinterpret_cast<double*>(buffers.output(chunks.size() * sizeof(double)));
    p.header = p.states = base;
    if (c.scale != 0) p.grad_scale = buffers.input(std::vector<float>{c.scale});
    p.found_inf = buffers.input(std::vector<float>{0.0f});
    p.max_grad_norm = measure && c.sum_of_squares < 1e60 ? 1e30 : 0.0;  // above the norm
    p.skip_nonfinite = measure;
    p.threads = threads;
    cpu::optimizer_step(p);

    buffers.expect_rest_untouched();
    expect_same("param", param, c.param_after, size_of(c.dtype));
    planes.expect_after();
    expect_same("steps", counted, bytes_of(std::vector<float>{7.0f, static_cast<float>(c.done + 1)}), sizeof(float));
    if (control.skipped != 0) fail("the step was left out");
    if (measure && !(std::fabs(control.sum_of_squares - c.sum_of_squares) <= 1e-12 * c.sum_of_squares)) {
        fail("the sum of squares is %.17g, should be %.17g", control.sum_of_squares, c.sum_of_squares);
    }
    bits.add("sum of squares", reinterpret_cast<const uint8_t*>(&control.sum_of_squares), sizeof(double));
    bits.rewind();
}

void check_quantize_states(const OptimizerCase& c, Guard guard) {
    for (const bool is_signed : {true, false}) {
        const std::vector<float>& values = is_signed ? c.first_after : c.second_after;
        const Codes& expected = is_signed ? c.first_codes_after : c.second_codes_after;
        Buffers buffers(guard);
        uint8_t* const code = buffers.output(values.size());
        uint8_t* const absmax = buffers.output(expected.absmax.size() * sizeof(float));
        qlk::cpu::quantize_states(buffers.input(values), code, reinterpret_cast<float*>(absmax), c.count, is_signed);
        buffers.expect_rest_untouched();
        expect_same("code", code, expected.code, 1);
        expect_same("absmax", absmax, bytes_of(expected.absmax), sizeof(float));
    }
}

}  // namespace

void check_optimizer(const std::vector<std::string>& isas) {
    Random random(5);
    // One; less than a vector; around a block of 256; several and a part; around a chunk of 8192.
    const int64_t counts[] = {1, 7, 255, 256, 257, 1000, qlk::kChunk - 1, qlk::kChunk, qlk::kChunk + 1};
    int index = 0;
    for (int64_t count : counts) {
        for (DType dtype : kDTypes) {
            for (const auto rule : {qlk::Algorithm::kAdamW, qlk::Algorithm::kLion}) {
                for (int variant = 0; variant < (dtype == DType::kFloat32 ? 2 : 4); ++variant, ++index) {
                    const bool narrow = variant % 2, with_master = variant / 2;
                    const bool measure = index % 2;
                    const OptimizerCase c(rule, dtype, count, narrow, with_master, index % 3 ? 0.0f : 3.0f,
                                          index % 4 ? 0.9 : 0.3, index % 5 ? 3 : 0, random);
                    SameBits bits;
                    for (const std::string& isa : isas) {
                        // Except for bfloat16, these are avx512's sources for the same registers.
                        if (dtype != DType::kBFloat16 && (isa == "amx" || isa == "avx512_bf16")) continue;
                        use(isa);
                        for (Guard guard : kGuards) {
                            const int threads = 1 + static_cast<int>(random.bits() % 3);
                            name_case("optimizer_step %s %s %s count=%" PRId64
                                      " bits=%d master=%d scale=%g measure=%d threads=%d",
                                      rule == qlk::Algorithm::kAdamW ? "AdamW" : "Lion", isa.c_str(), name_of(dtype),
                                      count, narrow ? 8 : 32, with_master, c.scale, measure, threads);
                            check_optimizer_step(c, bits, guard, threads, measure);
                            if (narrow) check_quantize_states(c, guard);
                        }
                    }
                }
            }
        }
    }
}

}  // namespace check
