// The layer's products for product.cuh, element by element.
//
// Formula:
//     u = scale * mask(x) A^T        y = u B^T + x W^T + bias
//     v = scale * dy B               dx = mask(v A) + dy W        da = v^T mask(x)        db = dy^T u
//     scale = scaling / (1 - p). u and v are rounded to T, as on the CPU.
//
// Why the low-rank part of y and dx comes first: the mask of dx can be applied to it before the rest is added.
#pragma once

#include "cuda/common/bias.cuh"
#include "cuda/common/dropout.cuh"
#include "cuda/common/weight.cuh"
#include "cuda/linear/simt/product.cuh"

namespace qlk::cuda {

// Weight i of the flat tensor, rounded to T. All lanes of a warp call it together, and bring lane_level, the level of
// code lane % 16: lanes with different indices into constant memory would take turns.
template <class T>
QLK_DEVICE float decode_element(const DeviceWeight& w, int64_t i, float lane_level) {
    const int byte = load_global(w.packed + i / 2);
    const float level = __shfl_sync(kAllLanes, lane_level, i % 2 ? byte & 15 : byte >> 4, 16);
    return to_float(from_float<T>(__fmul_rn(level, decode_absmax(w, i / kBlock))));
}

template <class T>
QLK_DEVICE float element(const T* matrix, int64_t i) {
    return to_float(load_global(matrix + i));
}

// Defaults of all products: one part, the second, with neighbours along the depth.
struct OnePart {
    static constexpr bool kLeftDepthFirst = true;
    static constexpr bool kRightDepthFirst = true;
    int64_t rows, columns;  // of the result
    int64_t depth[2];       // of the low-rank part (0: none), and of the main part

    QLK_DEVICE float lane_level(int) const { return 0.0f; }
    QLK_DEVICE float between(int64_t, int64_t, float sum) const { return sum; }
};

// y [m, n]. depth: r, k.
template <class T>
struct ForwardProduct : OnePart {
    DeviceWeight weight;      // [n, k]
    const T *x, *u, *lora_b;  // [m, k], [m, r], [n, r]
    Bias<T> bias;             // [n]
    T* y;

    QLK_DEVICE float lane_level(int lane) const { return weight.levels[lane % 16]; }
    QLK_DEVICE float left(int part, int64_t i, int64_t d) const {
        return part == 0 ? element(u, i * depth[0] + d) : element(x, i * depth[1] + d);
    }
    QLK_DEVICE float right(int part, int64_t d, int64_t j, float level) const {
        return part == 0 ? element(lora_b, j * depth[0] + d) : decode_element<T>(weight, j * depth[1] + d, level);
    }
    QLK_DEVICE void store(int64_t i, int64_t j, float sum) const {
        store_global(y + i * columns + j, from_float<T>(bias.any() ? sum + bias.at(j) : sum));
    }
};

// dx [m, k]. depth: r, n.
template <class T>
struct InputGradientProduct : OnePart {
    static constexpr bool kRightDepthFirst = false;
    DeviceWeight weight;       // [n, k]
    const T *dy, *v, *lora_a;  // [m, n], [m, r], [r, k]
    Dropout dropout;           // of v A
    T* dx;

    QLK_DEVICE float lane_level(int lane) const { return weight.levels[lane % 16]; }
    QLK_DEVICE float left(int part, int64_t i, int64_t d) const {
        return part == 0 ? element(v, i * depth[0] + d) : element(dy, i * depth[1] + d);
    }
    QLK_DEVICE float right(int part, int64_t d, int64_t j, float level) const {
        return part == 0 ? element(lora_a, d * columns + j) : decode_element<T>(weight, d * columns + j, level);
    }
    QLK_DEVICE float between(int64_t i, int64_t j, float sum) const {
        return dropout.keeps(i * columns + j) ? sum : 0.0f;
    }
    QLK_DEVICE void store(int64_t i, int64_t j, float sum) const {
        store_global(dx + i * columns + j, from_float<T>(sum));
    }
};

// u [m, r]. depth: 0, k.
template <class T>
struct DownProduct : OnePart {
    const T *x, *lora_a;  // [m, k], [r, k]
    Dropout dropout;      // of x
    float scale;          // scaling / (1 - p)
    T* u;

    QLK_DEVICE float left(int, int64_t i, int64_t d) const {
        const int64_t at = i * depth[1] + d;
        return dropout.keeps(at) ? element(x, at) : 0.0f;
    }
    QLK_DEVICE float right(int, int64_t d, int64_t j, float) const { return element(lora_a, j * depth[1] + d); }
    QLK_DEVICE void store(int64_t i, int64_t j, float sum) const {
        store_global(u + i * columns + j, from_float<T>(scale * sum));
    }
};

// v [m, r]. depth: 0, n.
template <class T>
struct UpGradientProduct : OnePart {
    static constexpr bool kRightDepthFirst = false;
    const T *dy, *lora_b;  // [m, n], [n, r]
    float scale;           // scaling / (1 - p)
    T* v;

    QLK_DEVICE float left(int, int64_t i, int64_t d) const { return element(dy, i * depth[1] + d); }
    QLK_DEVICE float right(int, int64_t d, int64_t j, float) const { return element(lora_b, d * columns + j); }
    QLK_DEVICE void store(int64_t i, int64_t j, float sum) const {
        store_global(v + i * columns + j, from_float<T>(scale * sum));
    }
};

// da [r, k] or db [n, r]: left^T right over the rows of x. depth: 0, m.
template <class T>
struct AdapterGradientProduct : OnePart {
    static constexpr bool kLeftDepthFirst = false;
    static constexpr bool kRightDepthFirst = false;
    const T *left_matrix, *right_matrix;  // [m, rows] and [m, columns]
    Dropout dropout;                      // of right_matrix
    float* gradient;

    QLK_DEVICE float left(int, int64_t i, int64_t d) const { return element(left_matrix, d * rows + i); }
    QLK_DEVICE float right(int, int64_t d, int64_t j, float) const {
        const int64_t at = d * columns + j;
        return dropout.keeps(at) ? element(right_matrix, at) : 0.0f;
    }
    QLK_DEVICE void store(int64_t i, int64_t j, float sum) const { store_global(gradient + i * columns + j, sum); }
};

}  // namespace qlk::cuda
