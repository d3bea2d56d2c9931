#include "cuda/linear/grouped.cuh"

#include <string>

#include "cuda/common/aligned.h"
#include "cuda/common/dispatch.h"

namespace qlk::cuda {
namespace {

// The tiles, of which the host chooses by the rows that experts have on average: it does not know more.
constexpr Row kFewRows = {"grouped16", Family::kTiles, 16, 128, 4, kAnyRows, 80, 75};
constexpr Row kManyRows = {"grouped128", Family::kTiles, 128, 128, 3, kAnyRows, 80, 75};

template <class T, bool kBackward>
using FewTiles = GemmTraits<T, kBackward, kFewRows.rows, kFewRows.columns, 1, kFewRows.stages>;
template <class T, bool kBackward>
using ManyTiles = GemmTraits<T, kBackward, kManyRows.rows, kManyRows.columns, 2, kManyRows.stages>;

// Tiles of so many rows that all experts may have.
int64_t tiles_down(const Experts& experts, int rows) { return experts.m / rows + experts.count; }

template <class Product>
void product_launch(const Product& first, const Experts& experts, const Stream& stream) {
    constexpr int kTile = ProductTraits::kTile;
    const int64_t down = kOverRows<Product> ? tiles_down(experts, kTile) : experts.count * over(first.rows, kTile);
    launch(grouped_product_kernel<Product>, down * over(first.columns, kTile), ProductTraits::kThreads,
           sizeof(ProductTraits::Shared), stream, GroupedProduct<Product>{first, experts});
}

template <class T, class Traits>
void gemm_launch(const GemmArguments<T>& first, const Experts& experts, const Stream& stream) {
    const int64_t across = over(Traits::kBackward ? first.k : first.n, Traits::kColumns);
    const int64_t down = tiles_down(experts, Traits::kRows);
    launch(grouped_gemm_kernel<T, Traits>, down * across, Traits::kThreads, sizeof(typename Traits::Shared), stream,
           GroupedGemm<T>{first, experts, static_cast<unsigned>(down)});
}

// Launches a kernel on tensor cores, if one takes the product; returns whether it did.
template <bool kBackward, class T>
bool gemm(GemmArguments<T> first, const Experts& experts, const Stream& stream) {
    if constexpr (sizeof(T) == 2) {
        first.left_aligned = lies_on(first.left, 16) && (kBackward ? first.n : first.k) % 8 == 0;
        first.low_aligned = first.r % 8 == 0 && lies_on(first.low_left, 16) && lies_on(first.low_right, 16);
        first.out_aligned = lies_on(first.out, 16) && (kBackward ? first.k : first.n) % 8 == 0;
        const Card card = Card::capped(compiled_for(grouped_gemm_kernel<bf16, FewTiles<bf16, false>>, stream.device),
                                       multiprocessors(stream.device), shared_limit(stream.device));
        const DType dtype = std::is_same_v<T, bf16> ? DType::kBFloat16 : DType::kFloat16;
        const Problem problem{first.m,           first.n, first.k, dtype, kBackward, lies_on(first.weight.packed, 16),
                              first.left_aligned};
        const bool few = experts.m <= kFewRows.rows * experts.count || refusal(kManyRows, problem, card);
        if (refusal(few ? kFewRows : kManyRows, problem, card)) return false;
        few ? gemm_launch<T, FewTiles<T, kBackward>>(first, experts, stream)
            : gemm_launch<T, ManyTiles<T, kBackward>>(first, experts, stream);
        return true;
    }
    return false;
}

template <class T, class Params>
void check(const GroupedParams<Params>& all) {
    const Params& p = all.first;
    QLK_CHECK(all.experts > 0 && all.offsets != nullptr, "a stack has experts, and offsets");
    QLK_CHECK(sizeof(T) == 4 || (!p.wide_a && !p.wide_b), "grouped adapters have x's type");
    QLK_CHECK(p.dropout == 0, "grouped products have no dropout");
    require_aligned(p.weight);
    require_aligned(8, "offsets", all.offsets);
    require_aligned(sizeof(T), "x, u, lora_A and lora_B", p.x, p.u, p.lora_a, p.lora_b);
}

constexpr Dropout kNoDropout{nullptr, 0};

template <class T>
void forward(const GroupedForwardParams& all, const Stream& stream) {
    const LinearForwardParams& p = all.first;
    check<T>(all);
    require_aligned(sizeof(T), "y and a bias of x's type", p.y, p.narrow_bias);
    require_aligned(4, "the bias", p.bias);
    const Experts experts{all.offsets, all.experts, p.m};
    const auto *const x = static_cast<const T*>(p.x), *const lora_a = static_cast<const T*>(p.lora_a);
    const auto* const lora_b = static_cast<const T*>(p.lora_b);
    T *const u = static_cast<T*>(p.u), *const y = static_cast<T*>(p.y);
    const int64_t r = lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const Bias<T> bias{p.bias, static_cast<const T*>(p.narrow_bias)};
    const DeviceWeight weight = DeviceWeight::from(p.weight);
    const DeviceGuard guard(stream.device);
    if (r > 0) {
        product_launch(DownProduct<T>{{p.m, r, {0, k}}, x, lora_a, kNoDropout, static_cast<float>(p.scaling), u},
                       experts, stream);
    }
    if (gemm<false>(GemmArguments<T>{weight, n, k, x, u, lora_b, bias, kNoDropout, y, p.m, r}, experts, stream)) return;
    product_launch(ForwardProduct<T>{{p.m, n, {r, k}}, weight, x, u, lora_b, bias, y}, experts, stream);
}

template <class T>
void backward(const GroupedBackwardParams& all, void* v_room, const Stream& stream) {
    const LinearBackwardParams& p = all.first;
    check<T>(all);
    require_aligned(sizeof(T), "dy, dx and v", p.dy, p.dx, v_room);
    require_aligned(4, "the gradients of the adapters", p.da, p.db);
    const Experts experts{all.offsets, all.experts, p.m};
    const auto *const dy = static_cast<const T*>(p.dy), *const x = static_cast<const T*>(p.x);
    const auto *const u = static_cast<const T*>(p.u), *const lora_a = static_cast<const T*>(p.lora_a);
    const auto* const lora_b = static_cast<const T*>(p.lora_b);
    T *const v = static_cast<T*>(v_room), *const dx = static_cast<T*>(p.dx);
    const int64_t r = lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const DeviceWeight weight = DeviceWeight::from(p.weight);
    const DeviceGuard guard(stream.device);
    if (r > 0 && (dx || p.da)) {
        QLK_CHECK(v != nullptr, "the gradients of x and lora_A need room for v, [M, r]");
        product_launch(UpGradientProduct<T>{{p.m, r, {0, n}}, dy, lora_b, static_cast<float>(p.scaling), v}, experts,
                       stream);
    }
    if (dx && !gemm<true>(GemmArguments<T>{weight, n, k, dy, v, lora_a, Bias<T>{}, kNoDropout, dx, p.m, r}, experts,
                          stream)) {
        product_launch(InputGradientProduct<T>{{p.m, k, {r, n}}, weight, dy, v, lora_a, kNoDropout, dx}, experts,
                       stream);
    }
    if (r > 0 && p.da) {
        product_launch(AdapterGradientProduct<T>{{r, k, {0, p.m}}, v, x, kNoDropout, p.da}, experts, stream);
    }
    if (r > 0 && p.db) {
        product_launch(AdapterGradientProduct<T>{{n, r, {0, p.m}}, dy, u, kNoDropout, p.db}, experts, stream);
    }
}

}  // namespace

void linear_grouped_forward(const GroupedForwardParams& params, const Stream& stream) {
    switch (params.first.dtype) {
        case DType::kFloat32: return forward<float>(params, stream);
        case DType::kBFloat16: return forward<bf16>(params, stream);
        case DType::kFloat16: return forward<fp16>(params, stream);
    }
    QLK_CHECK(false, "linear_grouped_forward of dtype code " + std::to_string(static_cast<int>(params.first.dtype)));
}

void linear_grouped_backward(const GroupedBackwardParams& params, void* v, const Stream& stream) {
    switch (params.first.dtype) {
        case DType::kFloat32: return backward<float>(params, v, stream);
        case DType::kBFloat16: return backward<bf16>(params, v, stream);
        case DType::kFloat16: return backward<fp16>(params, v, stream);
    }
    QLK_CHECK(false, "linear_grouped_backward of dtype code " + std::to_string(static_cast<int>(params.first.dtype)));
}

}  // namespace qlk::cuda
