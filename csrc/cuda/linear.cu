#include "linear.cuh"

#include "../philox.h"

namespace qlk::cuda {
namespace {

template <class Product>
void product_launch(const Product& p, const Stream& stream) {
    using Traits = ProductTraits;
    const int64_t blocks =
        ((p.rows + Traits::kTile - 1) / Traits::kTile) * ((p.columns + Traits::kTile - 1) / Traits::kTile);
    launch(product_kernel<Product>, blocks, Traits::kThreads, sizeof(Traits::Shared), stream, p);
}

Dropout dropout_of(double p, const int64_t* seed) {
    if (p <= 0) return {nullptr, 0};
    QLK_CHECK(seed != nullptr, "dropout needs a seed on the device");
    return {seed, dropout_threshold(p)};
}

template <class T>
void forward(const LinearForwardParams& p, const int64_t* seed, const Stream& stream) {
    const T *const x = static_cast<const T*>(p.x), *const a = static_cast<const T*>(p.lora_a);
    T* const u = static_cast<T*>(p.u);
    const int64_t r = p.lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const DeviceGuard guard(stream.device);
    if (r > 0) {
        const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
        product_launch(DownProduct<T>{{p.m, r, {0, k}}, x, a, dropout_of(p.dropout, seed), scale, u}, stream);
    }
    product_launch(ForwardProduct<T>{{p.m, n, {r, k}},
                                     DeviceWeight::of(p.weight),
                                     x,
                                     u,
                                     static_cast<const T*>(p.lora_b),
                                     p.bias,
                                     static_cast<T*>(p.y)},
                   stream);
}

template <class T>
void backward(const LinearBackwardParams& p, const int64_t* seed, void* scratch, const Stream& stream) {
    const T *const dy = static_cast<const T*>(p.dy), *const b = static_cast<const T*>(p.lora_b);
    T* const v = static_cast<T*>(scratch);
    const int64_t r = p.lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const Dropout dropout = r > 0 ? dropout_of(p.dropout, seed) : Dropout{nullptr, 0};
    const DeviceGuard guard(stream.device);
    if (r > 0 && (p.dx || p.da)) {
        QLK_CHECK(v != nullptr, "the gradients of x and lora_A need room for v, [M, r]");
        const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
        product_launch(UpGradientProduct<T>{{p.m, r, {0, n}}, dy, b, scale, v}, stream);
    }
    if (p.dx) {
        product_launch(InputGradientProduct<T>{{p.m, k, {r, n}},
                                               DeviceWeight::of(p.weight),
                                               dy,
                                               v,
                                               static_cast<const T*>(p.lora_a),
                                               dropout,
                                               static_cast<T*>(p.dx)},
                       stream);
    }
    if (r > 0 && p.da) {
        product_launch(AdapterGradientProduct<T>{{r, k, {0, p.m}}, v, static_cast<const T*>(p.x), dropout, p.da},
                       stream);
    }
    if (r > 0 && p.db) {
        product_launch(
            AdapterGradientProduct<T>{{n, r, {0, p.m}}, dy, static_cast<const T*>(p.u), Dropout{nullptr, 0}, p.db},
            stream);
    }
}

}  // namespace

void linear_forward(const LinearForwardParams& p, const int64_t* seed, const Stream& stream) {
    switch (p.dtype) {
        case DType::kFloat32: return forward<float>(p, seed, stream);
        case DType::kBFloat16: return forward<bf16>(p, seed, stream);
        case DType::kFloat16: return forward<fp16>(p, seed, stream);
    }
    QLK_CHECK(false, "linear_forward of dtype code " + std::to_string(static_cast<int>(p.dtype)));
}

void linear_backward(const LinearBackwardParams& p, const int64_t* seed, void* v, const Stream& stream) {
    switch (p.dtype) {
        case DType::kFloat32: return backward<float>(p, seed, v, stream);
        case DType::kBFloat16: return backward<bf16>(p, seed, v, stream);
        case DType::kFloat16: return backward<fp16>(p, seed, v, stream);
    }
    QLK_CHECK(false, "linear_backward of dtype code " + std::to_string(static_cast<int>(p.dtype)));
}

}  // namespace qlk::cuda
