// An optimizer's step on one tensor as float32 loops, one rounding for each operation: the kernels have to give the
// same bits. 8-bit states are looked up among all entries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "naive.h"
#include "optimizer.h"

// 8-bit states.
struct Codes {
    std::vector<uint8_t> code;
    std::vector<float> absmax;

    NAIVE std::vector<float> decoded(bool is_signed) const {
        std::vector<float> values(code.size());
        for (size_t i = 0; i < code.size(); ++i) {
            values[i] = qlk::dynamic_map(is_signed).value[code[i]] * absmax[i / qlk::kStateBlock];
        }
        return values;
    }
};

// The non-negative entry nearest to x in [0, 1], counted from zero; of two equally near ones the smaller. Between two
// entries, x is compared with their midpoint rounded to float32.
NAIVE inline int nearest_entry(const float* entries, int count, float x) {
    int best = 0;
    for (int i = 1; i < count; ++i) {
        const float middle = static_cast<float>((static_cast<double>(entries[i - 1]) + entries[i]) / 2);
        if (x > middle) best = i;
    }
    return best;
}

NAIVE inline Codes encoded(const std::vector<float>& values, bool is_signed) {
    constexpr float kMost = 3.4028234663852886e38f;
    const qlk::DynamicMap& map = qlk::dynamic_map(is_signed);
    const int zero = static_cast<int>(std::find(map.value, map.value + 256, 0.0f) - map.value);
    Codes out{std::vector<uint8_t>(values.size()), {}};
    for (size_t first = 0; first < values.size(); first += qlk::kStateBlock) {
        const size_t last = std::min(values.size(), first + qlk::kStateBlock);
        float largest = 0;
        for (size_t i = first; i < last; ++i) largest = std::max(largest, std::min(std::fabs(values[i]), kMost));
        out.absmax.push_back(largest);
        for (size_t i = first; i < last; ++i) {
            const float size = std::min(std::fabs(values[i]), kMost);
            const int rank = largest == 0 ? 0 : nearest_entry(map.value + zero, 256 - zero, size / largest);
            if (is_signed) {
                out.code[i] = static_cast<uint8_t>(values[i] < 0 ? zero - std::min(rank, zero) : zero + rank);
            } else {
                out.code[i] = static_cast<uint8_t>(rank == 0 && size > 0 ? 1 : rank);
            }
        }
    }
    return out;
}

struct OptimizerCase {
    qlk::Algorithm algorithm;
    qlk::DType dtype;
    int64_t count;
    bool narrow, with_master;
    float scale;  // divides the gradients; 0: none
    uint32_t done;
    qlk::OptimizerGroup group;

    std::vector<uint8_t> param, grad;  // of dtype
    std::vector<float> master, first, second;
    Codes first_codes, second_codes;

    // Expected after the step.
    double sum_of_squares = 0;
    std::vector<uint8_t> param_after;
    std::vector<float> master_after, first_after, second_after;
    Codes first_codes_after, second_codes_after;

    NAIVE OptimizerCase(qlk::Algorithm rule, qlk::DType type, int64_t size, bool eight_bits, bool master_weights,
                        float grad_scale, double beta1, uint32_t steps, Random& random)
        : algorithm(rule),
          dtype(type),
          count(size),
          narrow(eight_bits),
          with_master(master_weights),
          scale(grad_scale),
          done(steps),
          group{0.01, beta1, 0.99, 1e-8, 0.1, 0.0} {
        const size_t width = size_of(dtype);
        param.resize(count * width);
        grad.resize(count * width);
        std::vector<float> p(count), g(count);
        for (int64_t i = 0; i < count; ++i) {
            // Parameters that the master copy rounds to, and some that something else has written.
            const float exact = static_cast<float>(random.uniform());
            if (with_master) master.push_back(exact);
            p[i] = static_cast<float>(round_to(dtype, i % 11 == 5 ? random.uniform() : exact));
            // Gradients of all sizes, zeros, and numbers whose squares overflow float32.
            const double size = std::pow(10.0, 3 * random.uniform() - 1) * random.uniform();
            const bool huge = dtype == qlk::DType::kFloat32 && i % 97 == 13;
            g[i] = i % 17 == 3 ? 0.0f : static_cast<float>(huge ? 3e38 * random.uniform() : round_to(dtype, size));
            store(dtype, p[i], param.data() + i * width);
            store(dtype, g[i], grad.data() + i * width);
            first.push_back(static_cast<float>(random.uniform()));
            second.push_back(static_cast<float>(std::fabs(random.uniform())));
        }
        if (narrow) {
            for (int64_t i = 0; i < count; ++i) {
                first_codes.code.push_back(static_cast<uint8_t>(random.bits()));
                second_codes.code.push_back(static_cast<uint8_t>(random.bits()));
                if (i % qlk::kStateBlock) continue;
                // The second block is zeros.
                const bool zeros = i / qlk::kStateBlock == 1;
                first_codes.absmax.push_back(zeros ? 0.0f : static_cast<float>(1.5 + random.uniform()));
                second_codes.absmax.push_back(zeros ? 0.0f : static_cast<float>(1.5 + random.uniform()));
            }
            first = first_codes.decoded(true);
            second = second_codes.decoded(false);
        }
        step(p, g);
    }

  private:
    NAIVE void step(std::vector<float>& p, const std::vector<float>& g) {
        const bool adam = algorithm == qlk::Algorithm::kAdamW;
        double power1 = 1, power2 = 1;
        for (uint32_t i = 0; i <= done; ++i) {
            power1 *= group.beta1;
            power2 *= group.beta2;
        }
        const float decay = static_cast<float>(1 - group.lr * group.weight_decay);
        const float beta1 = static_cast<float>(group.beta1), rest1 = static_cast<float>(1 - group.beta1);
        const float beta2 = static_cast<float>(group.beta2), rest2 = static_cast<float>(1 - group.beta2);
        const float rate = static_cast<float>(adam ? group.lr / (1 - power1) : group.lr);
        const float root = static_cast<float>(std::sqrt(1 - power2)), eps = static_cast<float>(group.eps);
        const float coefficient = scale == 0 ? 1.0f : static_cast<float>(1.0 / static_cast<double>(scale));
        first_after = first;
        second_after = second;
        for (int64_t i = 0; i < count; ++i) {
            sum_of_squares += static_cast<double>(g[i]) * g[i];
            const float x = g[i] * coefficient;
            float &m = first_after[i], &v = second_after[i];
            float w = p[i];
            if (with_master && round_to(dtype, master[i]) == static_cast<double>(p[i])) w = master[i];
            if (adam) {
                m = rest1 < 0.5f ? m + rest1 * (x - m) : x - (x - m) * (1.0f - rest1);
                v = v * beta2 + rest2 * x * x;
                w = w * decay + -rate * m / (std::sqrt(v) / root + eps);
            } else {
                const float u = m * beta1 + rest1 * x;
                w = w * decay + -rate * (u > 0 ? 1.0f : u < 0 ? -1.0f : u);
                m = m * beta2 + rest2 * x;
            }
            if (with_master) master_after.push_back(w);
            p[i] = static_cast<float>(round_to(dtype, w));
        }
        param_after.resize(param.size());
        for (int64_t i = 0; i < count; ++i) store(dtype, p[i], param_after.data() + i * size_of(dtype));
        if (narrow) {
            first_codes_after = encoded(first_after, true);
            second_codes_after = encoded(second_after, false);
        }
    }
};
