// Runs every CPU kernel on every instruction set of this machine, without torch or Python, under AddressSanitizer and
// UBSan and in guarded memory, and holds the results against plain loops: float64, or an optimizer's float32. Built by
// csrc/CMakeLists.txt with -DQLK_SANITIZE=ON. It stops at the first failure, names the case and exits with 1.
//
// Without an argument it runs everything; "kernels_check 1" and "kernels_check 2" each run half of it, so that two
// processors can share the work.
//
// Each case runs twice: with the ends of all buffers touching a guard page, and with their beginnings doing so. Both
// must give the same bits. Inputs are read-only, outputs start as NaN, scratch memory is guarded and NaN as well.
#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <memory>
#include <sstream>
#include <string>

#include <sanitizer/common_interface_defs.h>

#include "cpu/scratch.h"
#include "guarded.h"
#include "kernels.h"
#include "naive.h"
#include "naive_optimizer.h"

namespace qlk::cpu {

// The real one, renamed by CMakeLists.txt.
char* arena_scratch(size_t bytes, int threads);

// Stands between the kernels and their scratch memory: fresh NaNs, and a fault beyond the end.
char* scratch(size_t bytes, int threads) {
    static std::unique_ptr<Guarded> area;
    if (bytes > kScratchPerThread * static_cast<size_t>(threads)) {
        std::fprintf(stderr, "%zu bytes of scratch for %d threads are more than 8 MiB each\n", bytes, threads);
        std::abort();
    }
    char* const real = arena_scratch(bytes, threads);
    if (reinterpret_cast<uintptr_t>(real) % 64 != 0) std::abort();
    if (bytes > 0) real[0] = real[bytes - 1] = 0;
    if (!area || area->bytes() < bytes) area = std::make_unique<Guarded>(bytes, Guard::kAfter, 0xff);
    uint8_t* const begin = area->data() + (area->bytes() - bytes) / 64 * 64;
    std::memset(begin, 0xff, bytes);
    return reinterpret_cast<char*>(begin);
}

}  // namespace qlk::cpu

namespace {

using qlk::DType;

char current[256] = "before the first case";
int cases = 0;

__attribute__((format(printf, 1, 2))) void name_case(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(current, sizeof current, format, arguments);
    va_end(arguments);
    ++cases;
}

// Called by the sanitizers' runtime after its own report, a fault in a guard page included.
void on_death() { std::fprintf(stderr, "kernels_check: FAILED in %s\n", current); }

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    std::fprintf(stderr, "kernels_check: FAILED: %s: ", current);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::exit(1);
}

const char* name_of(DType dtype) {
    return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Guard kGuards[] = {Guard::kAfter, Guard::kBefore};
constexpr int kNaN = 0xff;  // a byte of a NaN in all three dtypes

void expect_close(const char* what, DType dtype, const uint8_t* actual, const Expected& expected) {
    for (size_t i = 0; i < expected.value.size(); ++i) {
        const double value = load(dtype, actual + i * size_of(dtype));
        const double error = std::fabs(value - expected.value[i]);
        // Written so that NaN fails.
        if (!(error < expected.tolerance[i])) {
            fail("%s[%zu] is %.9g, should be %.9g within %.3g", what, i, value, expected.value[i],
                 expected.tolerance[i]);
        }
    }
}

// A set of guarded buffers: inputs to read, outputs to fill.
class Buffers {
  public:
    explicit Buffers(Guard guard) : guard_(guard) { list_.reserve(32); }

    // Null for nothing: the kernels take it for an absent argument.
    const uint8_t* input(const std::vector<uint8_t>& content) {
        list_.push_back(Guarded::input(content, guard_));
        return list_.back().data();
    }
    template <class T>
    const T* input(const std::vector<T>& content) {
        return reinterpret_cast<const T*>(input(bytes_of(content)));
    }
    // What is read and written.
    uint8_t* changing(const std::vector<uint8_t>& content) {
        uint8_t* const to = output(content.size());
        if (!content.empty()) std::memcpy(to, content.data(), content.size());
        return to;
    }
    uint8_t* output(size_t bytes) {
        list_.emplace_back(bytes, guard_, kNaN);
        return list_.back().data();
    }
    qlk::WeightView weight(const Weight& w) {
        qlk::WeightView view{};
        view.n = w.n;
        view.k = w.k;
        view.packed = input(w.packed);
        if (w.double_quant) {
            view.absmax_code = input(w.absmax_code);
            view.nested_absmax = input(w.nested_absmax);
            view.nested_table = input(w.nested_table);
            view.nested_offset = &w.nested_offset;
        } else {
            view.absmax = input(w.absmax);
        }
        return view;
    }
    void expect_rest_untouched() const {
        for (const Guarded& buffer : list_) {
            if (!buffer.rest_untouched()) fail("a write beside a buffer of %zu bytes", buffer.bytes());
        }
    }

  private:
    Guard guard_;
    std::vector<Guarded> list_;
};

// Results of the first run of a case: those that follow must have the same bits.
class SameBits {
  public:
    void add(const char* what, const uint8_t* data, size_t bytes) {
        std::vector<uint8_t> now(data, data + bytes);
        if (next_ == seen_.size()) {
            seen_.push_back(std::move(now));
        } else if (seen_[next_] != now) {
            fail("%s has other bits than in the run before", what);
        }
        ++next_;
    }
    void rewind() { next_ = 0; }

  private:
    std::vector<std::vector<uint8_t>> seen_;
    size_t next_ = 0;
};

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    std::istringstream list(qlk::cpu::isas_available());
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
}

void use(const std::string& isa) {
    setenv("QLORA_KERNELS_CPU_ISA", isa.c_str(), 1);
    if (isa != qlk::cpu::isa_in_use()) fail("asked for %s, got %s", isa.c_str(), qlk::cpu::isa_in_use());
}

// ----------------------------------------------------------------------------------------------------------- linear

struct LinearShape {
    int64_t m, n, k, r;
    float dropout;
    bool bias, double_quant;
    int threads;
};

void check_forward(const Linear& c, const std::string& isa, const std::string& shape, int threads) {
    SameBits bits;
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

// wanted: bit 0 for dx, 1 for da, 2 for db.
void check_backward(const Linear& c, const std::string& isa, const std::string& shape, int threads, int wanted) {
    SameBits bits;
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

void check_linear(const LinearShape& s, const std::vector<std::string>& isas, Random& random) {
    for (DType dtype : kDTypes) {
        const Linear c(dtype, s.m, s.n, s.k, s.r, s.dropout, s.bias, s.double_quant, random);
        char shape[160];
        std::snprintf(shape, sizeof shape,
                      "%s m=%" PRId64 " n=%" PRId64 " k=%" PRId64 " r=%" PRId64
                      " dropout=%g bias=%d double_quant=%d threads=%d",
                      name_of(dtype), s.m, s.n, s.k, s.r, s.dropout, s.bias, s.double_quant, s.threads);
        // Which gradients are wanted: all, or one that has to do without the others' intermediate results.
        constexpr int kSome[] = {1, 2, 4, 3, 5, 6};
        const int some = kSome[random.bits() % 6];
        for (const std::string& isa : isas) {
            // The same source for the same registers as avx512's, but for bfloat16.
            if (dtype != DType::kBFloat16 && (isa == "amx" || isa == "avx512_bf16")) continue;
            use(isa);
            check_forward(c, isa, shape, s.threads);
            check_backward(c, isa, shape, s.threads, 7);
            if (s.r > 0) check_backward(c, isa, shape, s.threads, some);
        }
    }
}

void check_linears(const std::vector<std::string>& isas) {
    Random random(1);
    // Rows of x: none; one to eight, for which some sets have a path of their own, and one more; one either side of a
    // tile of 16 and of a block of 32; two blocks and one.
    const int64_t rows[] = {0, 1, 2, 3, 4, 5, 8, 9, 11, 16, 17, 32, 33, 65};
    // W's rows: one; below a tile; a tile; a block and one; a backward panel of 128 and two.
    const int64_t outs[] = {1, 7, 16, 33, 130};
    // W's columns: odd ones, whose rows begin in the middle of a byte; around one block of 64; blocks that are cut by
    // rows (100); one, two, three and five blocks, as 128 columns are decoded at a time.
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
                check_linear(s, isas, random);
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
        if (part == 0 || index % 2 == part % 2) check_linear(s, isas, random);
        ++index;
    }
}

// ------------------------------------------------------------------------------------------------------- dequantize

void check_dequantize(const std::vector<std::string>& isas) {
    Random random(2);
    struct Shape {
        int64_t n, k;
    };
    const Shape shapes[] = {
        {1, 1},      // half a byte
        {3, 63},     // rows begin and end inside blocks and inside bytes
        {5, 64},     // a block a row
        {7, 65},     // odd, and a last block of a few elements
        {9, 100},    // two rows share a block
        {130, 64},   // an even number of blocks
        {33, 192},   // an odd number of blocks
        {40, 4160},  // several batches of 256 blocks and several groups of constants
        {41, 1000},  // the same with rows that cut blocks
        {1, 16448},  // one block more than a batch
    };
    for (const Shape& s : shapes) {
        const int64_t ranges[][2] = {{0, s.n}, {0, 0}, {0, 1}, {s.n - 1, s.n}, {s.n / 3, s.n / 3 + 1}, {s.n / 3, s.n}};
        for (const bool double_quant : {false, true}) {
            Weight weight(s.n, s.k, double_quant, random);
            if (!double_quant) {
                // Beyond float16's range, and rounding up to infinity in bfloat16.
                weight.absmax[0] = 70000.0f;
                weight.absmax.back() = 3.4028234e38f;
            }
            for (DType dtype : kDTypes) {
                std::vector<uint8_t> exact(s.n * s.k * size_of(dtype));
                for (int64_t i = 0; i < s.n * s.k; ++i)
                    store(dtype, weight.at(dtype, i), exact.data() + i * size_of(dtype));
                for (const std::string& isa : isas) {
                    use(isa);
                    for (const auto& range : ranges) {
                        for (Guard guard : kGuards) {
                            const int threads = 1 + static_cast<int>(random.bits() % 3);
                            name_case("dequantize %s %s n=%" PRId64 " k=%" PRId64 " rows %" PRId64 "-%" PRId64
                                      " double_quant=%d threads=%d",
                                      isa.c_str(), name_of(dtype), s.n, s.k, range[0], range[1], double_quant, threads);
                            Buffers buffers(guard);
                            const size_t first = range[0] * s.k * size_of(dtype),
                                         last = range[1] * s.k * size_of(dtype);
                            uint8_t* const out = buffers.output(last - first);
                            qlk::cpu::dequantize({buffers.weight(weight), out, range[0], range[1], dtype, threads});
                            buffers.expect_rest_untouched();
                            for (size_t i = 0; i < last - first; ++i) {
                                if (out[i] != exact[first + i]) {
                                    const size_t element = i / size_of(dtype);
                                    fail("element %zu is %.9g, should be %.9g, to the bit", element,
                                         load(dtype, out + element * size_of(dtype)),
                                         load(dtype, exact.data() + first + element * size_of(dtype)));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

// --------------------------------------------------------------------------------------------------------- quantize

// The nearest level's code for w in a block with this absmax; a tie goes down. Midpoints times absmax are exact.
int nearest_code(double w, double absmax) {
    if (absmax == 0) return qlk::kZeroCode;
    int code = 0;
    while (code < 15 && w > (static_cast<double>(qlk::kLevels[code]) + qlk::kLevels[code + 1]) / 2 * absmax) ++code;
    return code;
}

void check_quantize(const std::vector<std::string>& isas) {
    Random random(3);
    // Less than a byte, less than a block, around a block, around two, odd counts, and enough for three threads.
    const int64_t counts[] = {1, 2, 63, 64, 65, 127, 128, 129, 1000, 70001};
    for (int64_t count : counts) {
        for (DType dtype : kDTypes) {
            Matrix weight(dtype, count, random);
            // The second block is zeros, the third holds one number that is not and ties between levels.
            for (int64_t i = 64; i < std::min<int64_t>(count, 192); ++i) {
                const double tie = (static_cast<double>(qlk::kLevels[i % 15]) + qlk::kLevels[i % 15 + 1]) / 2;
                weight.value[i] = i < 128 ? 0.0 : i == 128 ? 1.0 : round_to(dtype, tie);
                store(dtype, weight.value[i], weight.bytes.data() + i * size_of(dtype));
            }
            const int64_t blocks = (count + 63) / 64;
            std::vector<float> absmax(blocks, 0.0f);
            std::vector<uint8_t> packed((count + 1) / 2, 0);
            for (int64_t i = 0; i < count; ++i) {
                absmax[i / 64] = std::max(absmax[i / 64], static_cast<float>(std::fabs(weight.value[i])));
            }
            for (int64_t i = 0; i < count + count % 2; ++i) {
                const int code = i < count ? nearest_code(weight.value[i], absmax[i / 64]) : qlk::kZeroCode;
                packed[i / 2] = static_cast<uint8_t>(packed[i / 2] | (i % 2 == 0 ? code << 4 : code));
            }
            // -1: all finite; else a number that is not, at this index, another at the end.
            for (const int64_t bad : {int64_t{-1}, int64_t{0}, count / 2, count - 1}) {
                Matrix input = weight;
                if (bad >= 0) {
                    store(dtype, NAN, input.bytes.data() + (count - 1) * size_of(dtype));
                    store(dtype, -INFINITY, input.bytes.data() + bad * size_of(dtype));
                }
                for (const std::string& isa : isas) {
                    use(isa);
                    for (Guard guard : kGuards) {
                        const int threads = 1 + static_cast<int>(random.bits() % 3);
                        name_case("quantize %s %s count=%" PRId64 " bad=%" PRId64 " threads=%d", isa.c_str(),
                                  name_of(dtype), count, bad, threads);
                        Buffers buffers(guard);
                        const uint8_t* const in = buffers.input(input.bytes);
                        uint8_t* const codes = buffers.output(packed.size());
                        uint8_t* const constants = buffers.output(blocks * sizeof(float));
                        const int64_t found =
                            qlk::cpu::quantize({in, codes, reinterpret_cast<float*>(constants), count, dtype, threads});
                        buffers.expect_rest_untouched();
                        if (found != bad) fail("found %" PRId64, found);
                        if (bad >= 0) continue;
                        if (std::memcmp(constants, absmax.data(), blocks * sizeof(float)) != 0) fail("wrong constants");
                        for (size_t i = 0; i < packed.size(); ++i) {
                            if (codes[i] != packed[i]) fail("byte %zu is %02x, should be %02x", i, codes[i], packed[i]);
                        }
                    }
                }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------- quantize_absmax

// Whether table[code] * scale is as near to value as any entry, and code the first with that entry. Products are exact.
NAIVE bool is_nearest_entry(const float* table, double value, double scale, int code) {
    const double distance = std::fabs(value - table[code] * scale);
    for (int other = 0; other < 256; ++other) {
        if (std::fabs(value - table[other] * scale) < distance) return false;
        if (other < code && table[other] == table[code]) return false;
    }
    return true;
}

void check_quantize_absmax(const std::vector<std::string>& isas) {
    Random random(4);
    // One constant, around a group of 256, and a mean of means (more than 256 groups).
    const int64_t counts[] = {1, 2, 255, 256, 257, 1000, 70001};
    for (int64_t count : counts) {
        // All the same: every difference is the rounding of the mean, or zero.
        for (const bool constant : {false, true}) {
            std::vector<float> absmax(count), table(256);
            for (float& value : absmax) value = constant ? 0.3f : static_cast<float>(1.0 + random.uniform());
            for (float& value : table) value = static_cast<float>(random.uniform());
            table[17] = table[200];  // the lower code is the one to take
            table[3] = -0.0f;
            double exact_mean = 0;
            for (float value : absmax) exact_mean += value / static_cast<double>(count);
            const int64_t groups = (count + 255) / 256;
            SameBits bits;
            for (const std::string& isa : isas) {
                use(isa);
                for (Guard guard : kGuards) {
                    const int threads = 1 + static_cast<int>(random.bits() % 3);
                    name_case("quantize_absmax %s count=%" PRId64 " constant=%d threads=%d", isa.c_str(), count,
                              constant, threads);
                    Buffers buffers(guard);
                    uint8_t* const code = buffers.output(count);
                    uint8_t* const nested_bytes = buffers.output(groups * sizeof(float));
                    uint8_t* const offset_bytes = buffers.output(sizeof(float));
                    float* const nested = reinterpret_cast<float*>(nested_bytes);
                    float* const offset = reinterpret_cast<float*>(offset_bytes);
                    qlk::cpu::quantize_absmax(
                        {buffers.input(absmax), buffers.input(table), code, nested, offset, count, threads});
                    buffers.expect_rest_untouched();
                    if (!(std::fabs(*offset - exact_mean) <= 0x1p-24 * exact_mean)) fail("offset %.9g", *offset);
                    for (int64_t g = 0; g < groups; ++g) {
                        const int64_t last = std::min(count, (g + 1) * 256);
                        float largest = 0;
                        for (int64_t i = g * 256; i < last; ++i) {
                            largest = std::max(largest, std::fabs(absmax[i] - *offset));
                        }
                        if (!(nested[g] == largest)) fail("nested_absmax[%" PRId64 "] %.9g", g, nested[g]);
                        for (int64_t i = g * 256; i < last; ++i) {
                            if (!is_nearest_entry(table.data(), absmax[i] - *offset, largest, code[i])) {
                                fail("code[%" PRId64 "] is %d, and another is nearer or comes before", i, code[i]);
                            }
                        }
                    }
                    bits.add("code", code, count);
                    bits.add("offset", offset_bytes, sizeof(float));
                    bits.rewind();
                }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- optimizer

void expect_same(const char* what, const uint8_t* actual, const std::vector<uint8_t>& expected, size_t width) {
    for (size_t i = 0; i < expected.size(); ++i) {
        if (actual[i] != expected[i]) fail("%s[%zu] is not what it should be to the bit", what, i / width);
    }
}

// A plane of states in memory of its own: its offset from `base`, as the kernels add it.
struct PlaneBuffer {
    uint8_t* data;
    int64_t offset;
    PlaneBuffer(Buffers& buffers, const std::vector<uint8_t>& content, const uint8_t* base)
        : data(buffers.changing(content)),
          offset(static_cast<int64_t>(reinterpret_cast<intptr_t>(data) - reinterpret_cast<intptr_t>(base))) {}
};

void check_optimizer_step(const OptimizerCase& c, SameBits& bits, Guard guard, int threads, bool measure) {
    using namespace qlk;
    Buffers buffers(guard);
    alignas(16) static unsigned char base[16];
    const size_t width = size_of(c.dtype), wide = c.narrow ? 1 : sizeof(float);
    const bool adam = c.algorithm == Algorithm::kAdamW;
    uint8_t* const param = buffers.changing(c.param);
    const uint8_t* const grad = buffers.input(c.grad);
    const PlaneBuffer first(buffers, c.narrow ? c.first_codes.code : bytes_of(c.first), base);
    const PlaneBuffer second(buffers,
                             !adam      ? bytes_of(std::vector<float>())
                             : c.narrow ? c.second_codes.code
                                        : bytes_of(c.second),
                             base);
    const PlaneBuffer first_absmax(buffers, bytes_of(c.first_codes.absmax), base);
    const PlaneBuffer second_absmax(buffers, bytes_of(c.second_codes.absmax), base);
    const PlaneBuffer master(buffers, bytes_of(c.master), base);

    // After the first chunk stands one of another tensor, which has no gradient, and nothing else either.
    std::vector<OptimizerChunk> chunks;
    for (int64_t at = 0; at < c.count; at += kChunk) {
        const int32_t size = static_cast<int32_t>(std::min<int64_t>(kChunk, c.count - at));
        const auto plane = [&](const PlaneBuffer& of, bool there, int64_t bytes) {
            return there ? of.offset + bytes : kNoPlane;
        };
        const int64_t constants = at / kStateBlock * static_cast<int64_t>(sizeof(float));
        chunks.push_back(
            {1,
             size,
             0,
             static_cast<int32_t>(c.dtype),
             at,
             {plane(first, true, at * static_cast<int64_t>(wide)), plane(second, adam, at * static_cast<int64_t>(wide)),
              plane(first_absmax, c.narrow, constants), plane(second_absmax, adam && c.narrow, constants),
              plane(master, c.with_master, at * static_cast<int64_t>(sizeof(float)))}});
        if (at == 0) {
            chunks.push_back(
                {0, 5, 0, static_cast<int32_t>(c.dtype), 0, {kNoPlane, kNoPlane, kNoPlane, kNoPlane, kNoPlane}});
        }
    }
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
    expect_same("param", param, c.param_after, width);
    expect_same("master", master.data, bytes_of(c.master_after), sizeof(float));
    if (c.narrow) {
        expect_same("first code", first.data, c.first_codes_after.code, 1);
        expect_same("first absmax", first_absmax.data, bytes_of(c.first_codes_after.absmax), sizeof(float));
        if (adam) expect_same("second code", second.data, c.second_codes_after.code, 1);
        expect_same("second absmax", second_absmax.data,
                    bytes_of(adam ? c.second_codes_after.absmax : c.second_codes.absmax), sizeof(float));
    } else {
        expect_same("first", first.data, bytes_of(c.first_after), sizeof(float));
        if (adam) expect_same("second", second.data, bytes_of(c.second_after), sizeof(float));
    }
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

void check_optimizer(const std::vector<std::string>& isas) {
    Random random(5);
    // One; less than a vector; around a block of 256; several and a part; around a chunk of 8192.
    const int64_t counts[] = {1, 7, 255, 256, 257, 1000, qlk::kChunk - 1, qlk::kChunk, qlk::kChunk + 1};
    int index = 0;
    for (int64_t count : counts) {
        for (DType dtype : kDTypes) {
            for (const auto rule : {qlk::Algorithm::kAdamW, qlk::Algorithm::kLion}) {
                for (int form = 0; form < (dtype == DType::kFloat32 ? 2 : 4); ++form, ++index) {
                    const bool narrow = form % 2, with_master = form / 2;
                    const bool measure = index % 2;
                    const OptimizerCase c(rule, dtype, count, narrow, with_master, index % 3 ? 0.0f : 3.0f,
                                          index % 4 ? 0.9 : 0.3, index % 5 ? 3 : 0, random);
                    SameBits bits;
                    for (const std::string& isa : isas) {
                        // The same source for the same registers as avx512's, but for bfloat16.
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

}  // namespace

int main(int count, char** arguments) {
    __sanitizer_set_death_callback(on_death);
    const std::string text = count > 1 ? arguments[1] : "0";
    const int part = text == "1" ? 1 : text == "2" ? 2 : 0;
    if (count > 2 || (count == 2 && part == 0)) {
        std::fprintf(stderr, "usage: kernels_check [1 | 2]\n");
        return 2;
    }
    const std::vector<std::string> isas = instruction_sets();
    std::printf("kernels_check: built in %s; available here %s\n", qlk::cpu::isas_built(), qlk::cpu::isas_available());
    std::fflush(stdout);
    if (part != 2) {
        check_optimizer(isas);
        check_quantize_absmax(isas);
        check_quantize(isas);
        check_dequantize(isas);
        check_linears(isas);
    }
    check_large_linears(isas, part);
    std::printf("kernels_check: %d cases passed\n", cases);
    return 0;
}
