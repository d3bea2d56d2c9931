// The second quantization: block constants to 8 bits, in groups of 256. There are about N*K/64 elements, so plain C++
// is fast enough, except for the search in the table, which isa.h's nearest_codes does.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "error.h"

namespace qlk::cpu {
namespace {

// The sum of up to 256 float64 values as a fixed tree (halving strides), so that every backend gets the same bits.
double tree_sum(const double* values, int64_t count) {
    double s[kNestedBlock] = {0};
    std::copy(values, values + count, s);
    for (int stride = kNestedBlock / 2; stride > 0; stride /= 2) {
        for (int i = 0; i < stride; ++i) s[i] += s[i + stride];
    }
    return s[0];
}

// The mean, by trees of 256, then trees of their sums, until one is left.
float mean(const float* values, int64_t count, int threads) {
    std::vector<double> sums((count + kNestedBlock - 1) / kNestedBlock);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < static_cast<int64_t>(sums.size()); ++g) {
        double group[kNestedBlock];
        const int64_t first = g * kNestedBlock, size = std::min<int64_t>(kNestedBlock, count - first);
        std::copy(values + first, values + first + size, group);
        sums[g] = tree_sum(group, size);
    }
    while (sums.size() > 1) {
        std::vector<double> next((sums.size() + kNestedBlock - 1) / kNestedBlock);
        for (size_t g = 0; g < next.size(); ++g) {
            const size_t first = g * kNestedBlock;
            next[g] = tree_sum(sums.data() + first, std::min<size_t>(kNestedBlock, sums.size() - first));
        }
        sums.swap(next);
    }
    return static_cast<float>(sums[0] / static_cast<double>(count));
}

// The table's distinct values, ascending, each with its lowest code, and the exact midpoints between neighbours.
struct SortedTable {
    int size = 0;
    uint8_t code[256];
    double midpoint[256];  // padded with +infinity
    int zero;              // position of the entry nearest to 0

    explicit SortedTable(const float* table) {
        std::pair<float, int> entries[256];
        for (int i = 0; i < 256; ++i) {
            QLK_CHECK(std::isfinite(table[i]),
                      "the nested table holds a value that is not finite at entry " + std::to_string(i));
            entries[i] = {table[i] + 0.0f, i};  // -0 becomes +0
        }
        std::sort(entries, entries + 256);
        float value[256];
        for (const auto& [entry, index] : entries) {
            if (size > 0 && value[size - 1] == entry) continue;
            value[size] = entry;
            code[size++] = static_cast<uint8_t>(index);
        }
        for (int i = 0; i < 256; ++i) {
            midpoint[i] = i + 1 < size ? (static_cast<double>(value[i]) + value[i + 1]) / 2 : INFINITY;
        }
        zero = 0;
        for (int i = 0; i < size; ++i) {
            if (std::fabs(value[i]) < std::fabs(value[zero])) zero = i;
        }
    }
};

}  // namespace

void quantize_absmax(const QuantizeAbsmaxParams& p, NearestCodes nearest) {
    if (p.count == 0) {
        *p.offset = 0;
        return;
    }
    const SortedTable table(p.table);
    const float offset = mean(p.absmax, p.count, p.threads);
    *p.offset = offset;
    const int64_t groups = (p.count + kNestedBlock - 1) / kNestedBlock;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * kNestedBlock;
        const int count = static_cast<int>(std::min<int64_t>(kNestedBlock, p.count - first));
        float difference[kNestedBlock];
        float largest = 0;
        for (int i = 0; i < count; ++i) {
            difference[i] = p.absmax[first + i] - offset;
            largest = std::max(largest, std::fabs(difference[i]));
        }
        p.nested_absmax[g] = largest;
        if (largest == 0) {
            std::memset(p.code + first, table.code[table.zero], count);
        } else {
            nearest(table.midpoint, table.code, largest, difference, count, p.code + first);
        }
    }
}

}  // namespace qlk::cpu
