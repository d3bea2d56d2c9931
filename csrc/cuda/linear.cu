#include "linear.cuh"

#include "../philox.h"
#include "aligned.h"
#include "gemm.cuh"

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

template <class T, bool kBackward, int kRows, int kWarpsDown>
void gemm_launch(const GemmArguments<T>& a, const Stream& stream) {
    const int64_t columns = kBackward ? a.k : a.n;
    const auto start = [&](auto traits) {
        using Traits = decltype(traits);
        const int64_t blocks = ((a.m + kRows - 1) / kRows) * ((columns + Traits::kColumns - 1) / Traits::kColumns);
        launch(gemm_kernel<T, Traits>, blocks, Traits::kThreads, sizeof(typename Traits::Shared), stream, a);
    };
    // Four stages: 112 KiB at 128 rows. Three where that is too much: sm_86 and sm_89 give a block 99 KiB.
    using Four = GemmTraits<T, kBackward, kRows, kWarpsDown, 4>;
    if constexpr (kRows == 128) {
        if (sizeof(typename Four::Shared) > shared_limit(stream.device)) {
            return start(GemmTraits<T, kBackward, kRows, kWarpsDown, 3>{});
        }
    }
    start(Four{});
}

// Whether the tensor cores' kernel can take it; then it is launched.
template <bool kBackward, class T>
bool gemm(GemmArguments<T> a, const Stream& stream) {
    if constexpr (sizeof(T) == 2) {
        const int least = std::is_same_v<T, bf16> ? 80 : 75;
        if (a.k % kBlock != 0 || !lies_on(a.weight.packed, 16) ||
            compiled_for(gemm_kernel<T, GemmTraits<T, kBackward, 32, 1, 4>>, stream.device) < least)
            return false;
        a.left_aligned = lies_on(a.left, 16) && (kBackward ? a.n : a.k) % 8 == 0;
        a.out_aligned = lies_on(a.out, 16) && (kBackward ? a.k : a.n) % 8 == 0;
        const bool small = shared_limit(stream.device) < 96 * 1024;  // sm_75
        if (a.m <= 16) {
            gemm_launch<T, kBackward, 16, 1>(a, stream);
        } else if (a.m <= 32 || small) {
            gemm_launch<T, kBackward, 32, 1>(a, stream);
        } else if (a.m <= 64) {
            gemm_launch<T, kBackward, 64, 2>(a, stream);
        } else {
            gemm_launch<T, kBackward, 128, 2>(a, stream);
        }
        return true;
    } else {
        return false;
    }
}

template <class T>
void forward(const LinearForwardParams& p, const int64_t* seed, void* scratch, const Stream& stream) {
    require_aligned(p.weight);
    require_aligned(16, "scratch", scratch);
    require_aligned(sizeof(T), "x, u, y, lora_A and lora_B", p.x, p.u, p.y, p.lora_a, p.lora_b);
    require_aligned(8, "the seed", seed);
    require_aligned(4, "the bias", p.bias);
    const T *const x = static_cast<const T*>(p.x), *const a = static_cast<const T*>(p.lora_a);
    T* const u = static_cast<T*>(p.u);
    const int64_t r = p.lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const DeviceGuard guard(stream.device);
    if (r > 0) {
        const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
        product_launch(DownProduct<T>{{p.m, r, {0, k}}, x, a, dropout_of(p.dropout, seed), scale, u}, stream);
    }
    const GemmArguments<T> tiled{
        DeviceWeight::of(p.weight), n,   k, x, u, static_cast<const T*>(p.lora_b), p.bias, Dropout{nullptr, 0},
        static_cast<T*>(p.y),       p.m, r};
    if (gemm<false>(tiled, stream)) return;
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
void backward(const LinearBackwardParams& p, const int64_t* seed, void* v_room, void* scratch, const Stream& stream) {
    require_aligned(p.weight);
    require_aligned(16, "scratch", scratch);
    require_aligned(sizeof(T), "dy, x, u, dx, lora_A and lora_B", p.dy, p.x, p.u, p.dx, p.lora_a, p.lora_b, v_room);
    require_aligned(8, "the seed", seed);
    require_aligned(4, "the gradients of the adapters", p.da, p.db);
    const T *const dy = static_cast<const T*>(p.dy), *const b = static_cast<const T*>(p.lora_b);
    T* const v = static_cast<T*>(v_room);
    const int64_t r = p.lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const Dropout dropout = r > 0 ? dropout_of(p.dropout, seed) : Dropout{nullptr, 0};
    const DeviceGuard guard(stream.device);
    if (r > 0 && (p.dx || p.da)) {
        QLK_CHECK(v != nullptr, "the gradients of x and lora_A need room for v, [M, r]");
        const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
        product_launch(UpGradientProduct<T>{{p.m, r, {0, n}}, dy, b, scale, v}, stream);
    }
    if (p.dx) {
        const T* const lora_a = static_cast<const T*>(p.lora_a);
        T* const dx = static_cast<T*>(p.dx);
        const DeviceWeight weight = DeviceWeight::of(p.weight);
        const GemmArguments<T> tiled{weight, n, k, dy, v, lora_a, nullptr, dropout, dx, p.m, r, false, false};
        if (!gemm<true>(tiled, stream)) {
            product_launch(InputGradientProduct<T>{{p.m, k, {r, n}}, weight, dy, v, lora_a, dropout, dx}, stream);
        }
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

void linear_forward(const LinearForwardParams& p, const int64_t* seed, void* scratch, const Stream& stream) {
    switch (p.dtype) {
        case DType::kFloat32: return forward<float>(p, seed, scratch, stream);
        case DType::kBFloat16: return forward<bf16>(p, seed, scratch, stream);
        case DType::kFloat16: return forward<fp16>(p, seed, scratch, stream);
    }
    QLK_CHECK(false, "linear_forward of dtype code " + std::to_string(static_cast<int>(p.dtype)));
}

void linear_backward(const LinearBackwardParams& p, const int64_t* seed, void* v, void* scratch, const Stream& stream) {
    switch (p.dtype) {
        case DType::kFloat32: return backward<float>(p, seed, v, scratch, stream);
        case DType::kBFloat16: return backward<bf16>(p, seed, v, scratch, stream);
        case DType::kFloat16: return backward<fp16>(p, seed, v, scratch, stream);
    }
    QLK_CHECK(false, "linear_backward of dtype code " + std::to_string(static_cast<int>(p.dtype)));
}

int64_t linear_scratch(int64_t, int64_t, int64_t, int64_t, DType, bool, int) { return 0; }

}  // namespace qlk::cuda
