// A step of AdamW or Lion for all tensors in one launch: a thread block takes one chunk of one tensor, whatever its
// type. The numbers are those of csrc/cpu/optimizer/optimizer.h, bit for bit: every operation is rounded once.
//
// With 32-bit states it only moves memory: 28 bytes a float32 parameter, in 16-byte accesses, of which a thread has
// four under way; 60 instructions a parameter leave two thirds of the issue slots free at 4.3 TB/s. With 8 bits a warp
// takes blocks of 256 elements; their codes are searched for in shared memory, from where the upper bits of the value
// point to, in two steps (csrc/optimizer.h).
//
// The step counts lie in the arena, and the block that comes last raises them, when all others have read theirs.
// So a captured graph counts, too, and a step that is left out does not.
//
// Shared memory: 64 bytes; with 8-bit states both maps, 7.1 KiB.
#pragma once

#include <cstring>
#include <device.cuh>
#include <type_traits>

#include "cuda/common/weight.cuh"

namespace qlk::cuda {

struct OptimizerArguments {
    OptimizerParams p;
    const DynamicMap* maps;  // signed, unsigned; of 8-bit states
    int64_t begin;           // the first chunk of this launch
    bool measured;           // the control has coefficient and skip
    bool last;               // of the launches of a step
};

struct AdamW {
    static constexpr bool kSecondMoment = true;
};
struct Lion {
    static constexpr bool kSecondMoment = false;
};

constexpr int kOptimizerThreads = 256;

// What csrc/cpu/isa.h calls StepScalars.
struct Scalars {
    float decay, beta1, beta2, rest1, rest2, rate, root, eps, coefficient;
    uint32_t skip, unused[2];
};
constexpr int kScalarUnits = 3;
static_assert(sizeof(Scalars) == kScalarUnits * sizeof(uint4));

template <int kBits>
struct OptimizerShared {
    uint4 scalars[kScalarUnits];
    int last;
};
template <>
struct OptimizerShared<8> {
    uint4 scalars[kScalarUnits];
    int last;
    DynamicMap maps[2];
};

QLK_DEVICE double power(double base, uint32_t exponent) {
    double result = 1.0;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result = __dmul_rn(result, base);
        base = __dmul_rn(base, base);
    }
    return result;
}

QLK_DEVICE Scalars scalars_of(const OptimizerArguments& a, const OptimizerChunk& chunk) {
    const OptimizerGroup& group = a.p.groups[chunk.group];
    const double lr = load_global(&group.lr), beta1 = load_global(&group.beta1), beta2 = load_global(&group.beta2);
    Scalars s = {};
    s.decay = __double2float_rn(__dadd_rn(1.0, -__dmul_rn(lr, load_global(&group.weight_decay))));
    s.beta1 = __double2float_rn(beta1);
    s.beta2 = __double2float_rn(beta2);
    s.rest1 = __double2float_rn(__dadd_rn(1.0, -beta1));
    s.rest2 = __double2float_rn(__dadd_rn(1.0, -beta2));
    s.eps = __double2float_rn(load_global(&group.eps));
    s.rate = __double2float_rn(lr);
    s.root = 1.0f;
    if (a.p.algorithm == Algorithm::kAdamW) {
        const uint32_t step = static_cast<uint32_t>(load_exchanged(a.p.steps + chunk.tensor)) + 1;
        s.rate = __double2float_rn(__ddiv_rn(lr, __dadd_rn(1.0, -power(beta1, step))));
        s.root = __double2float_rn(__dsqrt_rn(__dadd_rn(1.0, -power(beta2, step))));
    }
    s.coefficient = a.measured ? load_changing(&a.p.control->coefficient) : 1.0f;
    s.skip = a.measured ? load_changing(&a.p.control->skip) : 0;
    return s;
}

// -------------------------------------------------------------------------------------------------- one element

struct Element {
    float g, p, m, v;
};

template <class Rule>
QLK_DEVICE void update(const Scalars& s, Element& e) {
    e.g = __fmul_rn(e.g, s.coefficient);
    if constexpr (std::is_same_v<Rule, AdamW>) {
        // torch's lerp starts from the nearer end.
        const float difference = __fadd_rn(e.g, -e.m);
        e.m = s.rest1 < 0.5f ? __fadd_rn(e.m, __fmul_rn(s.rest1, difference))
                             : __fadd_rn(e.g, -__fmul_rn(difference, __fadd_rn(1.0f, -s.rest1)));
        e.v = __fadd_rn(__fmul_rn(e.v, s.beta2), __fmul_rn(__fmul_rn(s.rest2, e.g), e.g));
        const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(e.v), s.root), s.eps);
        e.p = __fadd_rn(__fmul_rn(e.p, s.decay), __fdiv_rn(__fmul_rn(-s.rate, e.m), denominator));
    } else {
        const float u = __fadd_rn(__fmul_rn(e.m, s.beta1), __fmul_rn(s.rest1, e.g));
        const float sign = u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : u;
        e.p = __fadd_rn(__fmul_rn(e.p, s.decay), __fmul_rn(-s.rate, sign));
        e.m = __fadd_rn(__fmul_rn(e.m, s.beta2), __fmul_rn(s.rest2, e.g));
    }
}

// --------------------------------------------------------------------------------------- kCount elements in a row

// kBytes at once, on as many.
template <int kBytes>
struct Wide;
template <>
struct Wide<4> {
    using type = uint32_t;
};
template <>
struct Wide<8> {
    using type = uint2;
};
template <>
struct Wide<16> {
    using type = uint4;
};

template <class T, int kCount>
QLK_DEVICE void load_row(const T* from, bool wide, int count, T (&to)[kCount]) {
    constexpr int kBytes = sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16;
    using Unit = typename Wide<kBytes>::type;
    if (wide) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(T) * kCount) / kBytes; ++i) {
            const Unit unit = load_changing(reinterpret_cast<const Unit*>(from) + i);
            memcpy(reinterpret_cast<char*>(to) + i * kBytes, &unit, kBytes);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) to[i] = i < count ? load_changing(from + i) : T{};
    }
}

template <class T, int kCount>
QLK_DEVICE void store_row(T* to, bool wide, int count, const T (&from)[kCount]) {
    constexpr int kBytes = sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16;
    using Unit = typename Wide<kBytes>::type;
    if (wide) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(T) * kCount) / kBytes; ++i) {
            Unit unit;
            memcpy(&unit, reinterpret_cast<const char*>(from) + i * kBytes, kBytes);
            store_global(reinterpret_cast<Unit*>(to) + i, unit);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i < count) store_global(to + i, from[i]);
        }
    }
}

template <class T>
QLK_DEVICE bool same_value_bits(T a, T b) {
    return __float_as_uint(to_float(a)) == __float_as_uint(to_float(b));
}

// Parameter, gradient and states of a thread's elements: what stays the same over a chunk.
template <class T, int kCount>
struct Place {
    T* param;
    const T* grad;
    float* master;  // or null
    bool wide;      // param and grad lie on the bytes of a row

    // The values of the elements from `at` on, `count` of which are there.
    QLK_DEVICE void load(int at, int count, float (&g)[kCount], float (&p)[kCount]) const {
        const bool whole = wide && count >= kCount;
        alignas(16) T narrow_g[kCount], narrow_p[kCount];
        load_row(grad + at, whole, count, narrow_g);
        load_row(param + at, whole, count, narrow_p);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            g[i] = to_float(narrow_g[i]);
            p[i] = to_float(narrow_p[i]);
        }
        if constexpr (sizeof(T) == 2) {
            if (!master) return;
            // What somebody else has written to the parameter since counts.
            alignas(16) float exact[kCount];
            load_row(master + at, count >= kCount, count, exact);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (same_value_bits(from_float<T>(exact[i]), narrow_p[i])) p[i] = exact[i];
            }
        }
    }

    QLK_DEVICE void store(int at, int count, const float (&p)[kCount]) const {
        alignas(16) T narrow[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) narrow[i] = from_float<T>(p[i]);
        store_row(param + at, wide && count >= kCount, count, narrow);
        if constexpr (sizeof(T) == 2) {
            if (!master) return;
            alignas(16) float exact[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) exact[i] = p[i];
            store_row(master + at, count >= kCount, count, exact);
        }
    }
};

template <class T, int kCount>
QLK_DEVICE Place<T, kCount> place_of(const OptimizerArguments& a, const OptimizerChunk& chunk,
                                     const OptimizerTensor& tensor) {
    constexpr uintptr_t kMask = (sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) - 1;
    float* const master =
        chunk.plane[kMaster] == kNoPlane ? nullptr : reinterpret_cast<float*>(a.p.states + chunk.plane[kMaster]);
    return {reinterpret_cast<T*>(tensor.param) + chunk.first, reinterpret_cast<const T*>(tensor.grad) + chunk.first,
            master, ((tensor.param | tensor.grad) & kMask) == 0};
}

// ------------------------------------------------------------------------------------------------ 32-bit states

template <class Rule, class T>
QLK_DEVICE void step_chunk_32(const OptimizerArguments& a, const OptimizerChunk& chunk, const OptimizerTensor& tensor,
                              const Scalars& s) {
    constexpr int kCount = 4;
    constexpr bool kSecondMoment = Rule::kSecondMoment;
    const auto place = place_of<T, kCount>(a, chunk, tensor);
    float* const m = reinterpret_cast<float*>(a.p.states + chunk.plane[kFirst]);
    float* const v = reinterpret_cast<float*>(a.p.states + (kSecondMoment ? chunk.plane[kSecond] : 0));
    for (int at = static_cast<int>(threadIdx.x) * kCount; at < chunk.count; at += kOptimizerThreads * kCount) {
        const int count = chunk.count - at;
        float g[kCount], p[kCount];
        alignas(16) float first[kCount], second[kCount] = {};
        place.load(at, count, g, p);
        load_row(m + at, count >= kCount, count, first);
        if constexpr (kSecondMoment) load_row(v + at, count >= kCount, count, second);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            Element e{g[i], p[i], first[i], second[i]};
            update<Rule>(s, e);
            p[i] = e.p;
            first[i] = e.m;
            second[i] = e.v;
        }
        place.store(at, count, p);
        store_row(m + at, count >= kCount, count, first);
        if constexpr (kSecondMoment) store_row(v + at, count >= kCount, count, second);
    }
}

// ------------------------------------------------------------------------------------------------- 8-bit states

// How many of the map's midpoints a magnitude is above.
QLK_DEVICE int rank_of(const DynamicMap& map, float magnitude) {
    const int key =
        static_cast<int>(__float_as_uint(magnitude) >> DynamicMap::kShift) - static_cast<int>(DynamicMap::kLowest);
    const int inside = key < 0 ? 0 : key < DynamicMap::kKeys ? key : DynamicMap::kKeys - 1;
    int rank = load_shared(&map.start[inside]);
#pragma unroll
    for (int i = 0; i < DynamicMap::kClimb; ++i) rank += magnitude > load_shared(&map.midpoint[rank]) ? 1 : 0;
    return rank;
}

// Eight states a lane to codes, and the constant of the warp's 256: as encode_states in csrc/cpu/optimizer/optimizer.h.
template <bool kSigned>
QLK_DEVICE float encode_states(const DynamicMap& map, float (&value)[8], uint8_t (&code)[8]) {
    constexpr uint32_t kMost = 0x7f7fffffu;  // the largest float32
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = __float_as_uint(value[i]), magnitude = bits & 0x7fffffffu;
        const uint32_t finite = magnitude > 0x7f800000u ? 0 : magnitude > kMost ? kMost : magnitude;
        value[i] = __uint_as_float(kSigned && value[i] < 0.0f ? finite | 0x80000000u : finite);
        largest = max(largest, finite);
    }
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, stride));
    const float absmax = __uint_as_float(largest);
    const int zero = kSigned ? 127 : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int rank = largest == 0 ? 0 : rank_of(map, __fdiv_rn(fabsf(value[i]), absmax));
        int one = zero + rank;
        if (kSigned && value[i] < 0.0f) one = zero - min(rank, zero);  // -1 is not in the map
        if (!kSigned && rank == 0 && value[i] > 0.0f) one = 1;         // csrc/cpu/optimizer/optimizer.h says why
        code[i] = static_cast<uint8_t>(one);
    }
    return absmax;
}

template <class Rule, class T>
QLK_DEVICE void step_chunk_8(const OptimizerArguments& a, const OptimizerChunk& chunk, const OptimizerTensor& tensor,
                             const Scalars& s, const DynamicMap (&maps)[2]) {
    constexpr int kCount = 8;
    constexpr bool kSecondMoment = Rule::kSecondMoment;
    static_assert(kCount * 32 == kStateBlock);
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const auto place = place_of<T, kCount>(a, chunk, tensor);
    uint8_t* const m = a.p.states + chunk.plane[kFirst];
    uint8_t* const v = a.p.states + (kSecondMoment ? chunk.plane[kSecond] : 0);
    float* const m_absmax = reinterpret_cast<float*>(a.p.header + chunk.plane[kFirstAbsmax]);
    float* const v_absmax = reinterpret_cast<float*>(a.p.header + (kSecondMoment ? chunk.plane[kSecondAbsmax] : 0));
    // Whole warps take part, in the last block too: beyond the end are zeros.
    for (int block = warp; block * kStateBlock < chunk.count; block += kOptimizerThreads / 32) {
        const int at = block * kStateBlock + lane * kCount, count = chunk.count - at;
        float g[kCount], p[kCount], first[kCount], second[kCount] = {};
        alignas(8) uint8_t code_m[kCount], code_v[kCount] = {};
        place.load(at, count, g, p);
        load_row(m + at, count >= kCount, count, code_m);
        const float scale_m = load_changing(m_absmax + block);
        float scale_v = 0.0f;
        if constexpr (kSecondMoment) {
            load_row(v + at, count >= kCount, count, code_v);
            scale_v = load_changing(v_absmax + block);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            Element e{g[i], p[i], __fmul_rn(load_shared(&maps[0].value[code_m[i]]), scale_m), 0.0f};
            if constexpr (kSecondMoment) e.v = __fmul_rn(load_shared(&maps[1].value[code_v[i]]), scale_v);
            update<Rule>(s, e);
            p[i] = e.p;
            first[i] = i < count ? e.m : 0.0f;
            second[i] = i < count ? e.v : 0.0f;
        }
        place.store(at, count, p);
        const float new_m = encode_states<true>(maps[0], first, code_m);
        store_row(m + at, count >= kCount, count, code_m);
        if (lane == 0) store_global(m_absmax + block, new_m);
        if constexpr (kSecondMoment) {
            const float new_v = encode_states<false>(maps[1], second, code_v);
            store_row(v + at, count >= kCount, count, code_v);
            if (lane == 0) store_global(v_absmax + block, new_v);
        }
    }
}

// --------------------------------------------------------------------------------------------------------- the step

template <class Rule, int kBits, class T>
QLK_DEVICE void step_chunk(const OptimizerArguments& a, const OptimizerChunk& chunk, const OptimizerTensor& tensor,
                           const Scalars& s, OptimizerShared<kBits>& shared) {
    if constexpr (kBits == 8) {
        step_chunk_8<Rule, T>(a, chunk, tensor, s, shared.maps);
    } else {
        step_chunk_32<Rule, T>(a, chunk, tensor, s);
    }
}

// Counts the step, for the tensors that have taken part.
QLK_DEVICE void count_step(const OptimizerArguments& a) {
    const uint32_t skip = a.measured ? load_changing(&a.p.control->skip) : 0;
    for (int64_t t = threadIdx.x; t < a.p.tensor_count && !skip; t += kOptimizerThreads) {
        if (load_global(&a.p.tensors[t].grad) == 0) continue;
        store_exchanged(a.p.steps + t, __fadd_rn(load_exchanged(a.p.steps + t), 1.0f));
    }
    if (threadIdx.x != 0) return;
    if (skip) store_global(&a.p.control->skipped, load_changing(&a.p.control->skipped) + 1);
    store_global(&a.p.control->come, 0u);
}

// With 8-bit states three blocks fit a multiprocessor, by 80 registers a thread. For sm_120 AdamW's would be spilled,
// and there are two: 80 bytes a thread under way are 40 KiB.
template <class Rule, int kBits>
__global__ void __launch_bounds__(kOptimizerThreads, kBits == 32            ? 4
                                                     : kArchitecture >= 120 ? 2
                                                                            : 3)
    optimizer_step_kernel(const __grid_constant__ OptimizerArguments a) {
    auto& shared = shared_memory<OptimizerShared<kBits>>();
    // A launch without chunks, of empty tensors alone, counts its step.
    const bool any = a.begin + blockIdx.x < a.p.all_chunks;
    const OptimizerChunk chunk = any ? a.p.chunks[a.begin + blockIdx.x] : OptimizerChunk{};
    const OptimizerTensor tensor = any ? a.p.tensors[chunk.tensor] : OptimizerTensor{};
    if (tensor.grad != 0) {
        if (threadIdx.x == 0) {
            const Scalars s = scalars_of(a, chunk);
            uint4 units[kScalarUnits];
            memcpy(units, &s, sizeof s);
            for (int i = 0; i < kScalarUnits; ++i) store_shared(&shared.scalars[i], units[i]);
        }
        if constexpr (kBits == 8) {
            constexpr int kWords = sizeof(DynamicMap) * 2 / 4;
            uint32_t* const words = reinterpret_cast<uint32_t*>(shared.maps);
            for (int i = static_cast<int>(threadIdx.x); i < kWords; i += kOptimizerThreads) {
                store_shared(words + i, load_global(reinterpret_cast<const uint32_t*>(a.maps) + i));
            }
        }
        __syncthreads();
        uint4 units[kScalarUnits];
        for (int i = 0; i < kScalarUnits; ++i) units[i] = load_shared(&shared.scalars[i]);
        Scalars s;
        memcpy(&s, units, sizeof s);
        if (s.skip == 0) {
            // Not a switch: its jump table would have to be read before the first load.
            const auto dtype = static_cast<DType>(chunk.dtype);
            if (dtype == DType::kFloat32) {
                step_chunk<Rule, kBits, float>(a, chunk, tensor, s, shared);
            } else if (dtype == DType::kBFloat16) {
                step_chunk<Rule, kBits, bf16>(a, chunk, tensor, s, shared);
            } else {
                step_chunk<Rule, kBits, fp16>(a, chunk, tensor, s, shared);
            }
        }
    }
    if (!a.last) return;
    if (threadIdx.x == 0) {
        __threadfence();  // this block has read its tensor's count
        const uint32_t before = atomicAdd(&a.p.control->come, 1u);
        __threadfence();
        store_shared(&shared.last, before == gridDim.x - 1 ? 1 : 0);
    }
    __syncthreads();
    if (load_shared(&shared.last)) count_step(a);
}

// ---------------------------------------------------------------------------------------------------------- the norm

struct OptimizerNormShared {
    double sum[kOptimizerThreads / 32];
    int last;
};

template <class T>
QLK_DEVICE double sum_of_squares(const T* values, int count) {
    constexpr int kCount = 16 / static_cast<int>(sizeof(T));
    const bool wide = reinterpret_cast<uintptr_t>(values) % 16 == 0;
    double sum = 0.0;
    for (int at = static_cast<int>(threadIdx.x) * kCount; at < count; at += kOptimizerThreads * kCount) {
        alignas(16) T row[kCount];
        load_row(values + at, wide && count - at >= kCount, count - at, row);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const double value = static_cast<double>(to_float(row[i]));
            sum = __dadd_rn(sum, __dmul_rn(value, value));
        }
    }
    return sum;
}

// The sum of all threads' values, in thread 0, always in the same order. Between two of them: a barrier.
QLK_DEVICE double block_sum(double value, OptimizerNormShared& shared) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) value = __dadd_rn(value, __shfl_down_sync(kAllLanes, value, stride));
    if (lane == 0) store_shared(&shared.sum[warp], value);
    __syncthreads();
    if (threadIdx.x != 0) return 0.0;
    double sum = 0.0;
    for (int i = 0; i < kOptimizerThreads / 32; ++i) sum = __dadd_rn(sum, load_shared(&shared.sum[i]));
    return sum;
}

// What the step needs to know of all gradients: their norm, a block for each chunk, and in the last block the sum of
// all; or, with one block, only what a gradient scaler says.
__global__ void __launch_bounds__(kOptimizerThreads, 1)
    optimizer_norm_kernel(const __grid_constant__ OptimizerArguments a) {
    auto& shared = shared_memory<OptimizerNormShared>();
    OptimizerControl& control = *a.p.control;
    const bool sums = a.p.max_grad_norm > 0.0 || a.p.skip_nonfinite;
    double sum = 0.0;
    if (sums) {
        const bool any = blockIdx.x < a.p.all_chunks;
        const OptimizerChunk chunk = any ? a.p.chunks[blockIdx.x] : OptimizerChunk{};
        const uint64_t grad = any ? load_global(&a.p.tensors[chunk.tensor].grad) : 0;
        if (grad != 0) {
            const auto dtype = static_cast<DType>(chunk.dtype);
            if (dtype == DType::kFloat32) {
                sum = sum_of_squares(reinterpret_cast<const float*>(grad) + chunk.first, chunk.count);
            } else if (dtype == DType::kBFloat16) {
                sum = sum_of_squares(reinterpret_cast<const bf16*>(grad) + chunk.first, chunk.count);
            } else {
                sum = sum_of_squares(reinterpret_cast<const fp16*>(grad) + chunk.first, chunk.count);
            }
        }
        sum = block_sum(sum, shared);
        if (threadIdx.x == 0) {
            store_exchanged(a.p.partial + blockIdx.x, sum);
            __threadfence();
            const uint32_t before = atomicAdd(&control.come, 1u);
            __threadfence();
            store_shared(&shared.last, before == gridDim.x - 1 ? 1 : 0);
        }
        __syncthreads();
        if (load_shared(&shared.last) == 0) return;
        sum = 0.0;
        for (int64_t i = threadIdx.x; i < gridDim.x; i += kOptimizerThreads) {
            sum = __dadd_rn(sum, load_exchanged(a.p.partial + i));
        }
        sum = block_sum(sum, shared);
    }
    if (threadIdx.x != 0) return;
    float coefficient = 1.0f;
    if (a.p.grad_scale) {
        coefficient = __double2float_rn(__ddiv_rn(1.0, static_cast<double>(load_global(a.p.grad_scale))));
    }
    bool skip = a.p.found_inf && load_global(a.p.found_inf) != 0.0f;
    if (sums) {
        const float norm = __fmul_rn(__double2float_rn(__dsqrt_rn(sum)), coefficient);
        store_global(&control.sum_of_squares, sum);
        store_global(&control.norm, norm);
        if (a.p.skip_nonfinite && !(sum <= 1.7976931348623157e308)) skip = true;
        if (a.p.max_grad_norm > 0.0) {
            // torch.nn.utils.clip_grad_norm_
            const float clip = __fdiv_rn(__double2float_rn(a.p.max_grad_norm), __fadd_rn(norm, 1e-6f));
            coefficient = __fmul_rn(coefficient, clip > 1.0f ? 1.0f : clip);
        }
        store_global(&control.come, 0u);
    }
    store_global(&control.coefficient, coefficient);
    store_global(&control.skip, skip ? 1u : 0u);
}

}  // namespace qlk::cuda
