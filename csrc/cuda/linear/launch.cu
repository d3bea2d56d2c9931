#include <optional>
#include <string>

#include "cuda/common/aligned.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/splits.h"
#include "cuda/linear/adapters.h"
#include "cuda/linear/mma/rows64.cuh"
#include "cuda/linear/mma/rows8.cuh"
#include "cuda/linear/mma/tiles.cuh"
#include "cuda/linear/narrow.cuh"
#include "cuda/linear/overlap.h"
#include "cuda/linear/simt/layer_products.cuh"
#include "cuda/linear/wgmma/warpgroups.cuh"
#include "philox.h"

namespace qlk::cuda {
namespace {

template <class Product>
void product_launch(const Product& p, const Stream& stream) {
    using Traits = ProductTraits;
    const int64_t blocks =
        ((p.rows + Traits::kTile - 1) / Traits::kTile) * ((p.columns + Traits::kTile - 1) / Traits::kTile);
    launch(product_kernel<Product>, blocks, Traits::kThreads, sizeof(Traits::Shared), stream, p);
}

// Bytes for a converted adapter or gradient, [r, k] or [n, r]: forward, where the adapter is float32 and x is not;
// backward also for the float32 gradient of a 16-bit adapter.
int64_t converted_bytes(int64_t count, DType dtype, bool wide, bool backward) {
    return dtype == DType::kFloat32 ? 0 : over(count * (wide ? 2 : backward ? 4 : 0), 128) * 128;
}

// Room for both adapters or their gradients, in front of the kernels' scratch.
struct AdapterRoom {
    void *a, *b, *scratch;

    template <class Params>
    static AdapterRoom carve(void* scratch, const Params& p, int64_t r, bool backward) {
        char* const room = static_cast<char*>(scratch);
        const int64_t a = converted_bytes(r * p.weight.k, p.dtype, p.wide_a, backward);
        const int64_t b = converted_bytes(r * p.weight.n, p.dtype, p.wide_b, backward);
        QLK_CHECK(a + b == 0 || room != nullptr, "adapters of another type than x need scratch");
        return {room, room + a, room ? room + a + b : nullptr};
    }
};

// Up to two conversions in one launch. A null `from` means none.
template <class T>
void narrow(const float* from, void* to, int64_t count, const float* from_2, void* to_2, int64_t count_2,
            const Stream& stream) {
    const auto span = [](const float* from, void* to, int64_t count) {
        using Span = typename NarrowArguments<T>::Span;
        return Span{from, static_cast<T*>(to), from ? count : 0, lies_on(from, 16) && lies_on(to, 8)};
    };
    const NarrowArguments<T> both{span(from, to, count), span(from_2, to_2, count_2)};
    const int64_t fours = over(both.first.count, 4) + over(both.second.count, 4);
    if (fours > 0) launch(narrow_kernel<T>, over(fours, kNarrowThreads), kNarrowThreads, 0, stream, both);
}

Dropout dropout_of(double p, const int64_t* seed) {
    if (p <= 0) return {nullptr, 0};
    QLK_CHECK(seed != nullptr, "dropout needs a seed on the device");
    return {seed, dropout_threshold(p)};
}

Card card_of(int device) {
    Card card = Card::capped(compiled_for(gemm_kernel<bf16, GemmTraits<bf16, false, 16, 128, 1, 4>>, device),
                             multiprocessors(device), shared_limit(device));
    using Traits = WarpgroupTraits<bf16, 16, true>;
    card.wgmma = card.wgmma && takes_threads(warpgroup_kernel<bf16, Traits>, Traits::kThreads, device);
    return card;
}

// Tickets come first; their size is a multiple of 16, so the sums behind them are aligned.
Splits splits_of(const Plan& plan, void* scratch) {
    if (plan.splits == 1) return {nullptr, nullptr, 0, 1};
    if (plan.cluster) return {nullptr, nullptr, 0, plan.splits, 1, 0, true};
    QLK_CHECK(scratch != nullptr, "blocks that share a tile need scratch");
    char* const room = static_cast<char*>(scratch);
    return {reinterpret_cast<float4*>(room + ticket_bytes(plan.tiles - plan.whole)),
            reinterpret_cast<unsigned long long*>(room),
            next_launch(),
            plan.splits,
            static_cast<int>(plan.shared),
            static_cast<int>(plan.whole)};
}

template <class T, bool kBackward, int kRows, int kColumns, int kWarpsDown, int kStages>
void gemm_launch(const GemmArguments<T>& a, const Plan& plan, const Stream& stream, Start start) {
    using Traits = GemmTraits<T, kBackward, kRows, kColumns, kWarpsDown, kStages>;
    launch_overlapping(gemm_kernel<T, Traits>, plan.blocks(), Traits::kThreads, sizeof(typename Traits::Shared), stream,
                       a, start, plan.blocks_of_cluster());
}

template <class T>
void few_launch(const GemmArguments<T>& a, const Plan& plan, int multiprocessors, const Stream& stream, Start start) {
    const FewArguments<T> few{a.weight,
                              a.n,
                              a.k,
                              a.left,
                              a.low_left,
                              a.low_right,
                              a.bias,
                              a.out,
                              a.r,
                              static_cast<int>(a.m),
                              plan.row_tiles,
                              static_cast<int>(few_x_bytes(a.m, a.k)),
                              a.left_aligned,
                              a.r % 4 == 0 && lies_on(a.low_left, 8) && lies_on(a.low_right, 8)};
    const auto kernel = a.weight.absmax ? few_kernel<T, false> : few_kernel<T, true>;
    launch_overlapping(kernel, std::min<int64_t>(plan.tiles, multiprocessors), FewTraits::kThreads,
                       few_shared(a.m, a.k), stream, few, start);
}

template <class T, int kRows>
void middle_launch(const GemmArguments<T>& a, const Plan& plan, const Stream& stream, Start start) {
    using Nested = MiddleTraits<T, kRows, true>;
    const auto kernel = a.weight.absmax ? middle_kernel<T, MiddleTraits<T, kRows, false>> : middle_kernel<T, Nested>;
    launch_overlapping(kernel, plan.blocks(), Nested::kThreads, sizeof(typename Nested::Shared), stream, a, start,
                       plan.blocks_of_cluster());
}

template <class T, int kRows>
void warpgroup_launch(const GemmArguments<T>& a, const Plan& plan, const Stream& stream, Start start) {
    using Nested = WarpgroupTraits<T, kRows, true>;
    const auto kernel =
        a.weight.absmax ? warpgroup_kernel<T, WarpgroupTraits<T, kRows, false>> : warpgroup_kernel<T, Nested>;
    launch_overlapping(kernel, plan.blocks(), Nested::kThreads, warpgroup_shared(kRows), stream, a, start,
                       plan.blocks_of_cluster());
}

// How the product is computed. Also sets the operands' alignment in `a`.
template <bool kBackward, class T>
Plan plan_of(GemmArguments<T>& a, const Card& card) {
    constexpr DType dtype = std::is_same_v<T, bf16>   ? DType::kBFloat16
                            : std::is_same_v<T, fp16> ? DType::kFloat16
                                                      : DType::kFloat32;
    a.left_aligned = lies_on(a.left, 16) && (kBackward ? a.n : a.k) % 8 == 0;
    a.low_aligned = a.r % 8 == 0 && lies_on(a.low_left, 16) && lies_on(a.low_right, 16);
    return plan({a.m, a.n, a.k, dtype, kBackward, lies_on(a.weight.packed, 16), a.left_aligned}, card);
}

// Whether the product may start while its low-rank part is still being computed: its kernel has to wait for that
// itself. QLORA_KERNELS_CUDA_EARLY=0 forbids it.
bool may_be_early(const Plan& p, const Card& card) {
    const char* const allowed = std::getenv("QLORA_KERNELS_CUDA_EARLY");
    return p.row.family != Family::kFloats && card.architecture >= 90 && (!allowed || std::string(allowed) != "0") &&
           early_launches();
}

// Launches a tensor-core kernel if one takes the product; returns whether it did.
template <bool kBackward, class T>
bool gemm(GemmArguments<T> a, const Plan& p, const Card& card, void* scratch, const Stream& stream, Start start) {
    if (p.row.family == Family::kFloats) return false;
    if constexpr (sizeof(T) == 2) {
        a.out_aligned = lies_on(a.out, 16) && (kBackward ? a.k : a.n) % 8 == 0;
        if (p.row.family == Family::kFew) {
            if constexpr (!kBackward) few_launch(a, p, card.multiprocessors, stream, start);
            return true;
        }
        a.splits = splits_of(p, scratch);
        if (p.row.family == Family::kMiddle) {
            if constexpr (!kBackward) {
                switch (p.row.rows) {
                    case 8: middle_launch<T, 8>(a, p, stream, start); return true;
                    case 16: middle_launch<T, 16>(a, p, stream, start); return true;
                    case 32: middle_launch<T, 32>(a, p, stream, start); return true;
                }
            }
            QLK_CHECK(false, std::string("no instantiation of ") + p.row.name);
        }
        if (p.row.family == Family::kWarpgroup) {
            if constexpr (!kBackward) {
                switch (p.row.rows) {
                    case 16: warpgroup_launch<T, 16>(a, p, stream, start); return true;
                    case 32: warpgroup_launch<T, 32>(a, p, stream, start); return true;
                    case 64: warpgroup_launch<T, 64>(a, p, stream, start); return true;
                    case 128: warpgroup_launch<T, 128>(a, p, stream, start); return true;
                }
            }
            QLK_CHECK(false, std::string("no instantiation of ") + p.row.name);
        }
        const auto is = [&](int rows, int columns, int stages) {
            return p.row.rows == rows && p.row.columns == columns && p.row.stages == stages;
        };
        if (is(16, 128, 4)) {
            gemm_launch<T, kBackward, 16, 128, 1, 4>(a, p, stream, start);
        } else if (is(32, 128, 4)) {
            gemm_launch<T, kBackward, 32, 128, 1, 4>(a, p, stream, start);
        } else if (is(64, 128, 4)) {
            gemm_launch<T, kBackward, 64, 128, 2, 4>(a, p, stream, start);
        } else if (is(128, 128, 4)) {
            gemm_launch<T, kBackward, 128, 128, 2, 4>(a, p, stream, start);
        } else if (is(128, 128, 3)) {
            gemm_launch<T, kBackward, 128, 128, 2, 3>(a, p, stream, start);
        } else if (is(128, 256, 4)) {
            gemm_launch<T, kBackward, 128, 256, 2, 4>(a, p, stream, start);
        } else {
            QLK_CHECK(false, std::string("no instantiation of ") + p.row.name);
        }
        return true;
    }
    QLK_CHECK(false, std::string("no instantiation of ") + p.row.name);
}

// The adapters in T: as given, or float32 ones converted into `room`. need_a, need_b: whether a kernel reads them.
template <class T>
struct Adapters {
    const T *a, *b;

    template <class Params>
    static Adapters convert(const AdapterRoom& room, const Params& p, int64_t r, bool need_a, bool need_b,
                            const Stream& stream) {
        Adapters adapters{static_cast<const T*>(p.lora_a), static_cast<const T*>(p.lora_b)};
        if constexpr (sizeof(T) == 2) {
            const float* const wide_a = p.wide_a && need_a ? static_cast<const float*>(p.lora_a) : nullptr;
            const float* const wide_b = p.wide_b && need_b ? static_cast<const float*>(p.lora_b) : nullptr;
            if (r > 0) narrow<T>(wide_a, room.a, r * p.weight.k, wide_b, room.b, r * p.weight.n, stream);
            if (wide_a) adapters.a = static_cast<const T*>(room.a);
            if (wide_b) adapters.b = static_cast<const T*>(room.b);
        }
        return adapters;
    }
};

// --------------------------------------------------------------------------------------------------------- forward

template <class T>
void check_addresses(const LinearForwardParams& p, const int64_t* seed, const void* scratch) {
    require_aligned(p.weight);
    require_aligned(16, "scratch", scratch);
    require_aligned(sizeof(T), "x, u, y, lora_A and lora_B", p.x, p.u, p.y, p.lora_a, p.lora_b);
    require_aligned(4, "adapters in float32", p.wide_a ? p.lora_a : nullptr, p.wide_b ? p.lora_b : nullptr);
    require_aligned(8, "the seed", seed);
    require_aligned(4, "the bias", p.bias);
    require_aligned(sizeof(T), "a bias of x's type", p.narrow_bias);
}

// Computes u. early: the product may start before u is complete. Returns how to launch the product.
template <class T>
Start down(const LinearForwardParams& p, const T* lora_a, const int64_t* seed, bool early, void* scratch,
           const Stream& stream) {
    const T* const x = static_cast<const T*>(p.x);
    T* const u = static_cast<T*>(p.u);
    const int64_t k = p.weight.k;
    const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
    const Dropout dropout = dropout_of(p.dropout, seed);
    if (adapter_down(x, lora_a, u, p.m, k, p.r, scale, dropout, scratch, stream,
                     early ? Start::kFollowed : Start::kInOrder)) {
        return early ? Start::kEarly : Start::kInOrder;
    }
    product_launch(DownProduct<T>{{p.m, p.r, {0, k}}, x, lora_a, dropout, scale, u}, stream);
    return Start::kInOrder;
}

template <class T>
void forward(const LinearForwardParams& p, const int64_t* seed, void* scratch, const Stream& stream) {
    check_addresses<T>(p, seed, scratch);
    const Bias<T> bias{p.bias, static_cast<const T*>(p.narrow_bias)};
    const T *const x = static_cast<const T*>(p.x), *const u = static_cast<const T*>(p.u);
    T* const y = static_cast<T*>(p.y);
    const int64_t r = p.lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const DeviceWeight weight = DeviceWeight::from(p.weight);
    const DeviceGuard guard(stream.device);
    const AdapterRoom room = AdapterRoom::carve(scratch, p, r, false);
    const auto [lora_a, lora_b] = Adapters<T>::convert(room, p, r, true, true, stream);
    const Card card = card_of(stream.device);
    GemmArguments<T> product{weight, n, k, x, u, lora_b, bias, Dropout{nullptr, 0}, y, p.m, r};
    const Plan plan = plan_of<false>(product, card);
    const Start start = r > 0 ? down(p, lora_a, seed, may_be_early(plan, card), room.scratch, stream) : Start::kInOrder;
    if (gemm<false>(product, plan, card, room.scratch, stream, start)) return;
    product_launch(ForwardProduct<T>{{p.m, n, {r, k}}, weight, x, u, lora_b, bias, y}, stream);
}

// -------------------------------------------------------------------------------------------------------- backward

template <class T>
void check_addresses(const LinearBackwardParams& p, const int64_t* seed, const void* v, const void* scratch) {
    require_aligned(p.weight);
    require_aligned(16, "scratch", scratch);
    require_aligned(sizeof(T), "dy, x, u, dx, lora_A and lora_B", p.dy, p.x, p.u, p.dx, p.lora_a, p.lora_b, v);
    require_aligned(8, "the seed", seed);
    require_aligned(sizeof(T), "the gradients of the adapters", p.narrow_da, p.narrow_db);
    require_aligned(4, "adapters and gradients in float32", p.da, p.db, p.wide_a ? p.lora_a : nullptr,
                    p.wide_b ? p.lora_b : nullptr);
}

// Computes v and db, except where null. early, and the result: as in down().
template <class T>
Start up_gradient(const LinearBackwardParams& p, const T* lora_b, T* v, float* db, bool early, void* scratch,
                  const Stream& stream) {
    const T *const dy = static_cast<const T*>(p.dy), *const u = static_cast<const T*>(p.u);
    const int64_t n = p.weight.n;
    const float scale = static_cast<float>(p.scaling / (1.0 - p.dropout));
    if (adapter_up_gradient(dy, lora_b, u, v, db, p.m, n, p.r, scale, scratch, stream,
                            early ? Start::kFollowed : Start::kInOrder)) {
        return early ? Start::kEarly : Start::kInOrder;
    }
    if (v) product_launch(UpGradientProduct<T>{{p.m, p.r, {0, n}}, dy, lora_b, scale, v}, stream);
    if (db) product_launch(AdapterGradientProduct<T>{{n, p.r, {0, p.m}}, dy, u, Dropout{nullptr, 0}, db}, stream);
    return Start::kInOrder;
}

template <class T>
void backward(const LinearBackwardParams& p, const int64_t* seed, void* v_room, void* scratch, const Stream& stream) {
    check_addresses<T>(p, seed, v_room, scratch);
    const T *const dy = static_cast<const T*>(p.dy), *const x = static_cast<const T*>(p.x);
    T *const v = static_cast<T*>(v_room), *const dx = static_cast<T*>(p.dx);
    const int64_t r = p.lora_a ? p.r : 0, n = p.weight.n, k = p.weight.k;
    const DeviceWeight weight = DeviceWeight::from(p.weight);
    const Dropout dropout = r > 0 ? dropout_of(p.dropout, seed) : Dropout{nullptr, 0};
    const bool need_da = r > 0 && (p.da || p.narrow_da), need_db = r > 0 && (p.db || p.narrow_db);
    const bool need_v = r > 0 && (p.dx || need_da);
    QLK_CHECK(!need_v || v != nullptr, "the gradients of x and lora_A need room for v, [M, r]");
    const DeviceGuard guard(stream.device);
    const AdapterRoom room = AdapterRoom::carve(scratch, p, r, true);
    const auto [lora_a, lora_b] = Adapters<T>::convert(room, p, r, p.dx != nullptr, need_v, stream);
    // `room` holds a float32 adapter's copy or a 16-bit adapter's float32 gradient: never both.
    constexpr bool kNarrow = sizeof(T) == 2;
    float* const da = kNarrow && p.narrow_da ? static_cast<float*>(room.a) : p.da;
    float* const db = kNarrow && p.narrow_db ? static_cast<float*>(room.b) : p.db;

    const Card card = card_of(stream.device);
    GemmArguments<T> product{weight, n, k, dy, v, lora_a, Bias<T>{}, dropout, dx, p.m, r, false, false};
    std::optional<Plan> plan;
    if (dx) plan = plan_of<true>(product, card);
    Start start = Start::kInOrder;
    if (need_v || need_db) {
        start = up_gradient(p, lora_b, need_v ? v : nullptr, need_db ? db : nullptr, dx && may_be_early(*plan, card),
                            room.scratch, stream);
    }
    if (dx && !gemm<true>(product, *plan, card, room.scratch, stream, start)) {
        product_launch(InputGradientProduct<T>{{p.m, k, {r, n}}, weight, dy, v, lora_a, dropout, dx}, stream);
    }
    if (need_da && !adapter_down_gradient(x, v, da, p.m, k, r, dropout, room.scratch, stream)) {
        product_launch(AdapterGradientProduct<T>{{r, k, {0, p.m}}, v, x, dropout, da}, stream);
    }
    if constexpr (kNarrow) {
        narrow<T>(need_da && p.narrow_da ? da : nullptr, p.narrow_da, r * k, need_db && p.narrow_db ? db : nullptr,
                  p.narrow_db, r * n, stream);
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

// The kernels of a pass run one after another and share their scratch.
int64_t linear_scratch(int64_t m, int64_t n, int64_t k, int64_t r, DType dtype, bool wide_a, bool wide_b, bool backward,
                       int device) {
    const Card card = card_of(device);
    const int64_t converted =
        converted_bytes(r * k, dtype, wide_a, backward) + converted_bytes(r * n, dtype, wide_b, backward);
    // Whether x is 16-byte aligned is not known yet.
    return converted + std::max({plan({m, n, k, dtype, backward, true, true}, card).scratch,
                                 chosen({m, n, k, dtype, backward, true, false}, card).scratch,
                                 adapter_scratch(m, n, k, r, dtype, backward, device)});
}

}  // namespace qlk::cuda
