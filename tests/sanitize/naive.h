// What the kernels should compute, written as directly as possible: float64 loops over the decoded weight.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "philox.h"

// The loops below only touch their own vectors. With instrumentation they would take most of the time.
#define NAIVE __attribute__((no_sanitize("address", "undefined")))

// Deterministic numbers (splitmix64, Steele et al. 2014).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    // In [-1, 1).
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1.0; }

  private:
    uint64_t state_;
};

inline size_t size_of(qlk::DType dtype) { return dtype == qlk::DType::kFloat32 ? 4 : 2; }

// Half a unit in the last place, relative.
inline double epsilon(qlk::DType dtype) {
    return dtype == qlk::DType::kFloat32 ? 0x1p-24 : dtype == qlk::DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

// x rounded to the nearest value of a dtype, ties to even.
NAIVE inline double round_to(qlk::DType dtype, double x) {
    if (x == 0 || !std::isfinite(x)) return x;
    const int digits = dtype == qlk::DType::kFloat32 ? 24 : dtype == qlk::DType::kBFloat16 ? 8 : 11;
    const int lowest = dtype == qlk::DType::kFloat16 ? -24 : dtype == qlk::DType::kBFloat16 ? -133 : -149;
    const double largest = dtype == qlk::DType::kFloat16 ? 65504.0 : std::ldexp(2.0 - std::ldexp(1.0, 1 - digits), 127);
    int exponent;
    std::frexp(x, &exponent);
    const int unit = exponent - digits > lowest ? exponent - digits : lowest;
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
    return std::fabs(rounded) > largest ? std::copysign(INFINITY, x) : rounded;
}

// Writes a value's bytes, and reads them back.
NAIVE inline void store(qlk::DType dtype, double value, uint8_t* at) {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    if (dtype == qlk::DType::kFloat32) {
        std::memcpy(at, &bits, 4);
        return;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == qlk::DType::kFloat16) {
        const uint16_t sign = half & 0x8000u;
        const double magnitude = std::fabs(value);
        if (std::isnan(value)) {
            half = 0x7e00u;
        } else if (std::isinf(value)) {
            half = sign | 0x7c00u;
        } else if (magnitude < 0x1p-14) {
            half = sign | static_cast<uint16_t>(magnitude * 0x1p24);
        } else {
            int exponent;
            const double mantissa = std::frexp(magnitude, &exponent);  // [0.5, 1)
            half = sign | static_cast<uint16_t>((exponent + 14) << 10 | static_cast<int>((mantissa * 2 - 1) * 1024));
        }
    }
    std::memcpy(at, &half, 2);
}

NAIVE inline double load(qlk::DType dtype, const uint8_t* at) {
    uint32_t bits = 0;
    if (dtype == qlk::DType::kFloat16) {
        uint16_t half;
        std::memcpy(&half, at, 2);
        const int exponent = half >> 10 & 31, mantissa = half & 1023;
        const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                                 : exponent == 0 ? std::ldexp(mantissa, -24)
                                                 : std::ldexp(1024 + mantissa, exponent - 25);
        return half & 0x8000u ? -magnitude : magnitude;
    }
    std::memcpy(
        dtype == qlk::DType::kFloat32 ? reinterpret_cast<uint8_t*>(&bits) : reinterpret_cast<uint8_t*>(&bits) + 2, at,
        size_of(dtype));
    float single;
    std::memcpy(&single, &bits, sizeof single);
    return single;
}

// A random matrix of one dtype: its bytes, and its values.
struct Matrix {
    std::vector<uint8_t> bytes;
    std::vector<double> value;

    Matrix() = default;
    Matrix(qlk::DType dtype, int64_t count, Random& random) : bytes(count * size_of(dtype)), value(count) {
        for (int64_t i = 0; i < count; ++i) {
            value[i] = round_to(dtype, random.uniform());
            store(dtype, value[i], bytes.data() + i * size_of(dtype));
        }
    }
};

template <class T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

// A quantized weight [n, k] of random codes.
struct Weight {
    int64_t n, k, blocks;
    bool double_quant;
    std::vector<uint8_t> packed, absmax_code;
    std::vector<float> absmax;  // plain, or decoded from the pieces below
    std::vector<float> nested_absmax, nested_table;
    float nested_offset = 0;

    NAIVE Weight(int64_t rows, int64_t columns, bool nested, Random& random)
        : n(rows),
          k(columns),
          blocks((n * k + 63) / 64),
          double_quant(nested),
          packed((n * k + 1) / 2),
          absmax(blocks) {
        // An odd count leaves half a byte that must not be read: it is random too.
        for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random.bits());
        if (!double_quant) {
            for (float& value : absmax) value = constant(random);
            return;
        }
        nested_offset = 0.75f;
        for (int i = 0; i < 256; ++i) nested_table.push_back(static_cast<float>(random.uniform()));
        for (int64_t g = 0; g < (blocks + 255) / 256; ++g)
            nested_absmax.push_back(0.5f + 0.25f * static_cast<float>(g % 3));
        for (int64_t b = 0; b < blocks; ++b) {
            absmax_code.push_back(static_cast<uint8_t>(random.bits()));
            const float product = nested_table[absmax_code[b]] * nested_absmax[b / 256];
            absmax[b] = product + nested_offset;
        }
    }

    // Element i, decoded and rounded to dtype.
    NAIVE double at(qlk::DType dtype, int64_t i) const {
        const int code = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
        const float product = qlk::kLevels[code] * absmax[i / 64];
        return round_to(dtype, product);
    }

    // All elements, not rounded.
    NAIVE std::vector<double> dense() const {
        std::vector<double> values(n * k);
        for (int64_t i = 0; i < n * k; ++i) {
            const int code = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
            values[i] = static_cast<double>(qlk::kLevels[code]) * absmax[i / 64];
        }
        return values;
    }

  private:
    // Mostly near one. Some need special paths: zero; so small that a bf16 or float32 product is subnormal; negative (a
    // double-quantized constant can decode to that).
    static float constant(Random& random) {
        const double size = 1.0 + 0.75 * random.uniform();
        switch (random.bits() % 32) {
            case 0: return 0.0f;
            case 1: return static_cast<float>(size * 0x1p-127);
            case 2: return static_cast<float>(size * 0x1p-122);
            case 3: return static_cast<float>(-size);
            default: return static_cast<float>(size);
        }
    }
};

// Exact values of a result, and how far a kernel may be from each.
struct Expected {
    std::vector<double> value, tolerance;
};

// Tolerance for float32 accumulation: a few units per sqrt(length) terms, relative to the sum of the terms' sizes.
constexpr double kAccumulation = 0x1p-20;

// A kernel may round each weight to the dtype, and need not: the root of the sum of the terms' squares, times this and
// half a unit in the last place, is about six standard deviations of what that changes.
constexpr double kWeightRounding = 3;

// sum over p of a[i * a_row + p * a_step] * b[j * b_row + p * b_step] for all i and j, with the sums of sizes and the
// roots of the sums of squares.
struct Product {
    std::vector<double> sum, size, root;
};

NAIVE inline Product product(int64_t rows, int64_t columns, int64_t depth, const double* a, int64_t a_row,
                             int64_t a_step, const double* b, int64_t b_row, int64_t b_step) {
    Product out{std::vector<double>(rows * columns), std::vector<double>(rows * columns),
                std::vector<double>(rows * columns)};
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            double sum = 0, size = 0, squares = 0;
            for (int64_t p = 0; p < depth; ++p) {
                const double term = a[i * a_row + p * a_step] * b[j * b_row + p * b_step];
                sum += term;
                size += std::fabs(term);
                squares += term * term;
            }
            out.root[i * columns + j] = std::sqrt(squares);
            out.sum[i * columns + j] = sum;
            out.size[i * columns + j] = size;
        }
    }
    return out;
}

// All inputs of linear_forward and linear_backward, and what they should write.
struct Linear {
    qlk::DType dtype;
    int64_t m, r;
    float scaling, dropout;
    uint64_t seed;
    Weight weight;
    Matrix x, a, b, dy, u_in;
    std::vector<float> bias;
    Expected y, u, dx, da, db;

    NAIVE Linear(qlk::DType type, int64_t rows, int64_t n, int64_t k, int64_t rank, float drop, bool with_bias,
                 bool double_quant, Random& random)
        : dtype(type),
          m(rows),
          r(rank),
          scaling(1.5f),
          dropout(drop),
          seed(random.bits()),
          weight(n, k, double_quant, random),
          x(type, m * k, random),
          a(type, r * k, random),
          b(type, n * r, random),
          dy(type, m * n, random),
          u_in(type, m * r, random) {
        if (with_bias) {
            for (int64_t i = 0; i < n; ++i) bias.push_back(static_cast<float>(random.uniform()));
        }
        const std::vector<double> w = weight.dense();
        std::vector<char> kept(m * k, 1);
        std::vector<double> masked = x.value;
        if (dropout > 0) {
            for (int64_t i = 0; i < m * k; ++i) {
                uint32_t words[4];
                qlk::philox_blocks(seed, static_cast<uint64_t>(i / 4), 1, words);
                kept[i] = words[i % 4] >= qlk::dropout_threshold(dropout);
                if (!kept[i]) masked[i] = 0;
            }
        }
        expect_forward(w, masked);
        expect_backward(w, masked, kept);
    }

  private:
    NAIVE void expect_forward(const std::vector<double>& w, const std::vector<double>& masked) {
        const int64_t n = weight.n, k = weight.k;
        const double scale = scaling / (1.0f - dropout);
        const double eps = epsilon(dtype);
        // u = scale * masked A^T;  y = x W^T + u B^T + bias
        const Product xa = product(m, r, k, masked.data(), k, 1, a.value.data(), k, 1);
        std::vector<double> u_exact(m * r);
        for (int64_t i = 0; i < m * r; ++i) {
            u_exact[i] = scale * xa.sum[i];
            expect(u, u_exact[i], scale * xa.size[i], eps * std::fabs(u_exact[i]));
        }
        const Product xw = product(m, n, k, x.value.data(), k, 1, w.data(), k, 1);
        const Product ub = product(m, n, r, u_exact.data(), r, 1, b.value.data(), r, 1);
        for (int64_t i = 0; i < m * n; ++i) {
            const double shift = bias.empty() ? 0.0 : bias[i % n];
            const double value = xw.sum[i] + ub.sum[i] + shift;
            // u is rounded to the dtype on the way.
            const double low_rank_error = through(xa, scale, i / n, b, i % n * r, 1);
            expect(y, value, xw.size[i] + ub.size[i] + std::fabs(shift) + low_rank_error,
                   eps * (std::fabs(value) + ub.size[i] + kWeightRounding * xw.root[i]));
        }
    }

    NAIVE void expect_backward(const std::vector<double>& w, const std::vector<double>& masked,
                               const std::vector<char>& kept) {
        const int64_t n = weight.n, k = weight.k;
        const double scale = scaling / (1.0f - dropout);
        const double eps = epsilon(dtype);
        // v = scale * dy B;  dx = dy W + mask(v A);  da = v^T masked;  db = dy^T u
        const Product dyb = product(m, r, n, dy.value.data(), n, 1, b.value.data(), 1, r);
        std::vector<double> v(m * r);
        for (int64_t i = 0; i < m * r; ++i) v[i] = scale * dyb.sum[i];
        const Product dyw = product(m, k, n, dy.value.data(), n, 1, w.data(), 1, k);
        const Product va = product(m, k, r, v.data(), r, 1, a.value.data(), 1, k);
        for (int64_t i = 0; i < m * k; ++i) {
            const double low_rank = kept[i] ? va.sum[i] : 0.0, low_rank_size = kept[i] ? va.size[i] : 0.0;
            const double value = dyw.sum[i] + low_rank;
            const double low_rank_error = kept[i] ? through(dyb, scale, i / k, a, i % k, k) : 0.0;
            expect(dx, value, dyw.size[i] + low_rank_size + low_rank_error,
                   eps * (std::fabs(value) + low_rank_size + kWeightRounding * dyw.root[i]));
        }
        const Product vx = product(r, k, m, v.data(), 1, r, masked.data(), 1, k);
        for (int64_t i = 0; i < r * k; ++i) {
            double low_rank_error = 0;
            for (int64_t row = 0; row < m; ++row) {
                low_rank_error += scale * dyb.size[row * r + i / k] * std::fabs(masked[row * k + i % k]);
            }
            expect(da, vx.sum[i], vx.size[i] + low_rank_error, eps * vx.size[i]);
        }
        const Product dyu = product(n, r, m, dy.value.data(), 1, n, u_in.value.data(), 1, r);
        for (int64_t i = 0; i < n * r; ++i) expect(db, dyu.sum[i], dyu.size[i], 0);
    }

    // Sizes that pass through one row's low-rank step, whose float32 sums have an error of their own.
    NAIVE double through(const Product& inner, double scale, int64_t row, const Matrix& outer, int64_t first,
                         int64_t step) const {
        double size = 0;
        for (int64_t i = 0; i < r; ++i)
            size += scale * inner.size[row * r + i] * std::fabs(outer.value[first + i * step]);
        return size;
    }

    // The last term is for numbers below float16's normal range, which have an absolute error.
    static void expect(Expected& out, double value, double size, double rounding) {
        out.value.push_back(value);
        out.tolerance.push_back(kAccumulation * size + 1.01 * rounding + 0x1p-24);
    }
};
