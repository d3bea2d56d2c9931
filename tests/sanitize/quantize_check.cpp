// quantize, quantize_absmax and dequantize, to the bit.
#include <algorithm>

#include "check.h"

namespace check {
namespace {

// The nearest level's code for w in a block with this absmax; a tie goes down. Midpoints times absmax are exact.
int nearest_code(double w, double absmax) {
    if (absmax == 0) return qlk::kZeroCode;
    int code = 0;
    while (code < 15 && w > (static_cast<double>(qlk::kLevels[code]) + qlk::kLevels[code + 1]) / 2 * absmax) ++code;
    return code;
}

// Whether no entry is nearer to value than table[code] * scale, and code is the first with that entry. Products are
// exact.
NAIVE bool is_nearest_entry(const float* table, double value, double scale, int code) {
    const double distance = std::fabs(value - table[code] * scale);
    for (int other = 0; other < 256; ++other) {
        if (std::fabs(value - table[other] * scale) < distance) return false;
        if (other < code && table[other] == table[code]) return false;
    }
    return true;
}

// Rows [begin, end) of a weight against exact, the bytes of all of it.
void check_rows(const Weight& weight, DType dtype, const std::vector<uint8_t>& exact, const std::string& isa,
                int64_t begin, int64_t end, int threads) {
    for (Guard guard : kGuards) {
        name_case("dequantize %s %s n=%" PRId64 " k=%" PRId64 " rows %" PRId64 "-%" PRId64
                  " double_quant=%d threads=%d",
                  isa.c_str(), name_of(dtype), weight.n, weight.k, begin, end, weight.double_quant, threads);
        Buffers buffers(guard);
        const size_t first = begin * weight.k * size_of(dtype), last = end * weight.k * size_of(dtype);
        uint8_t* const out = buffers.output(last - first);
        qlk::cpu::dequantize({buffers.weight(weight), out, begin, end, dtype, threads});
        buffers.expect_rest_untouched();
        for (size_t i = 0; i < last - first; ++i) {
            if (out[i] == exact[first + i]) continue;
            const size_t element = i / size_of(dtype);
            fail("element %zu is %.9g, should be %.9g, to the bit", element,
                 load(dtype, out + element * size_of(dtype)),
                 load(dtype, exact.data() + first + element * size_of(dtype)));
        }
    }
}

}  // namespace

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
                        const int threads = 1 + static_cast<int>(random.bits() % 3);
                        check_rows(weight, dtype, exact, isa, range[0], range[1], threads);
                    }
                }
            }
        }
    }
}

void check_quantize(const std::vector<std::string>& isas) {
    Random random(3);
    // Less than a byte, less than a block, around a block, around two, odd counts, and enough for three threads.
    const int64_t counts[] = {1, 2, 63, 64, 65, 127, 128, 129, 1000, 70001};
    for (int64_t count : counts) {
        for (DType dtype : kDTypes) {
            Matrix weight(dtype, count, random);
            // The second block is zeros; the third holds a one, and ties between levels.
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
            // -1: all finite. Otherwise one number that isn't at this index, and another at the end.
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

void check_quantize_absmax(const std::vector<std::string>& isas) {
    Random random(4);
    // One constant, around a group of 256, and a mean of means (more than 256 groups).
    const int64_t counts[] = {1, 2, 255, 256, 257, 1000, 70001};
    for (int64_t count : counts) {
        // constant: every difference is the rounding of the mean, or zero.
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

}  // namespace check
