// What the optimizer's kernels share: arguments, the rules for one element, and rows of elements in 16-byte accesses.
//
// Formula: AdamW and Lion as in torch.optim, every operation rounded once; csrc/cpu/optimizer/optimizer.h gives the
//     same bits.
#pragma once

#include <cstring>
#include <ptx.cuh>
#include <type_traits>

#include "cuda/common/weight.cuh"

namespace qlk::cuda {

struct OptimizerArguments {
    OptimizerParams p;
    const DynamicMap* maps;  // [2]: signed, unsigned; for 8-bit states
    int64_t begin;           // first chunk of this launch
    bool measured;           // optimizer_norm has filled coefficient and skip in the control
    bool last;               // this is the step's last launch
};

struct AdamW {
    static constexpr bool kSecondMoment = true;
};
struct Lion {
    static constexpr bool kSecondMoment = false;
};

constexpr int kOptimizerThreads = 256;

// A group's scalars, rounded once to float32; StepScalars in csrc/cpu/isa.h has their meaning.
struct Scalars {
    float decay, beta1, beta2, rest1, rest2, rate, eps, coefficient;
    float root;
    uint32_t skip, unused[2];
};
constexpr int kScalarUnits = 3;
static_assert(sizeof(Scalars) == kScalarUnits * sizeof(uint4));

// base^exponent by squaring, the same bits as on the CPU.
QLK_DEVICE double power(double base, uint32_t exponent) {
    double result = 1.0;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result = __dmul_rn(result, base);
        base = __dmul_rn(base, base);
    }
    return result;
}

// Two threads make a chunk's scalars, each in a warp of its own: one the step's rate and most others, one the root. So
// neither waits for the other's float64 arithmetic, some hundred instructions that depend on each other.
constexpr int kRateThread = 0, kRootThread = 32;

// What they are made of. Loaded beside the tensor's addresses, not after them.
struct ScalarInputs {
    double lr, beta1, beta2, eps, weight_decay;
    float step, coefficient;
    uint32_t skip;

    template <class Rule>
    QLK_DEVICE static ScalarInputs load(const OptimizerArguments& a, const OptimizerChunk& chunk) {
        const OptimizerGroup& group = a.p.groups[chunk.group];
        return {load_global(&group.lr),
                load_global(&group.beta1),
                load_global(&group.beta2),
                load_global(&group.eps),
                load_global(&group.weight_decay),
                Rule::kSecondMoment ? load_exchanged(a.p.steps + chunk.tensor) : 0.0f,
                a.measured ? load_changing(&a.p.control->coefficient) : 1.0f,
                a.measured ? load_changing(&a.p.control->skip) : 0};
    }
};

// Stores this thread's part of the scalars.
template <class Rule>
QLK_DEVICE void store_scalars(const ScalarInputs& in, uint4 (&to)[kScalarUnits]) {
    const auto bits = [](float value) { return __float_as_uint(value); };
    const uint32_t step = static_cast<uint32_t>(in.step) + 1;
    if (threadIdx.x == kRateThread) {
        const float decay = __double2float_rn(__dadd_rn(1.0, -__dmul_rn(in.lr, in.weight_decay)));
        const float beta1 = __double2float_rn(in.beta1), beta2 = __double2float_rn(in.beta2);
        const float rest1 = __double2float_rn(__dadd_rn(1.0, -in.beta1));
        const float rest2 = __double2float_rn(__dadd_rn(1.0, -in.beta2));
        const double bias = Rule::kSecondMoment ? __dadd_rn(1.0, -power(in.beta1, step)) : 1.0;
        const float rate = __double2float_rn(Rule::kSecondMoment ? __ddiv_rn(in.lr, bias) : in.lr);
        store_shared(&to[0], make_uint4(bits(decay), bits(beta1), bits(beta2), bits(rest1)));
        store_shared(&to[1],
                     make_uint4(bits(rest2), bits(rate), bits(__double2float_rn(in.eps)), bits(in.coefficient)));
    }
    if (threadIdx.x == kRootThread) {
        const double bias = Rule::kSecondMoment ? __dadd_rn(1.0, -power(in.beta2, step)) : 1.0;
        const float root = Rule::kSecondMoment ? __double2float_rn(__dsqrt_rn(bias)) : 1.0f;
        store_shared(&to[2], make_uint4(bits(root), in.skip, 0, 0));
    }
}

// The type of a chunk's parameters. kByBits: told by bits of its code. The compiler makes a jump table of comparisons
// with numbers: a load from constant memory, and a jump that waits for it, before the first load of elements. With
// 8-bit states it doesn't, and bits take a register too many on sm_75.
template <bool kByBits>
struct ChunkType {
    bool is_float, is_bf16;

    QLK_DEVICE explicit ChunkType(const OptimizerChunk& chunk)
        : is_float(chunk.dtype == static_cast<int>(DType::kFloat32)),
          is_bf16(kByBits ? (chunk.dtype & 1) != 0 : chunk.dtype == static_cast<int>(DType::kBFloat16)) {
        static_assert(static_cast<int>(DType::kBFloat16) == 1 && static_cast<int>(DType::kFloat16) == 2);
    }
};

// -------------------------------------------------------------------------------------------------- one element

struct Element {
    float g, p, m, v;  // gradient, parameter, first and second moment
};

// One element's step. Rule: AdamW or Lion.
template <class Rule>
QLK_DEVICE void update(const Scalars& s, Element& e) {
    e.g = __fmul_rn(e.g, s.coefficient);
    if constexpr (std::is_same_v<Rule, AdamW>) {
        // As torch's lerp, which starts from the nearer end.
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

// The type that holds kBytes, for an aligned access.
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

// Loads kCount elements, the first `count` of which exist; the others become zero. wide: all exist and are aligned.
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

// Stores kCount elements, or the first `count` of them.
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

// Whether a and b have the same bits as float32.
template <class T>
QLK_DEVICE bool same_value_bits(T a, T b) {
    return __float_as_uint(to_float(a)) == __float_as_uint(to_float(b));
}

// Where a chunk's parameters, gradients and master copy are. T: type of parameter and gradient. kCount: elements a
// thread takes at a time.
template <class T, int kCount>
struct ChunkPointers {
    T* param;
    const T* grad;
    float* master;  // float32 copy of a 16-bit parameter, or null
    bool wide;      // param and grad are aligned for rows

    // Gradient and parameter of elements at, at + 1, ..., of which `count` exist.
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
            // If the parameter is no longer the rounded master copy, something else has written it, and that value
            // counts.
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
QLK_DEVICE ChunkPointers<T, kCount> pointers_of(const OptimizerArguments& a, const OptimizerChunk& chunk,
                                                const OptimizerTensor& tensor) {
    constexpr uintptr_t kMask = (sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) - 1;
    float* const master =
        chunk.plane[kMaster] == kNoPlane ? nullptr : reinterpret_cast<float*>(a.p.states + chunk.plane[kMaster]);
    return {reinterpret_cast<T*>(tensor.param) + chunk.first, reinterpret_cast<const T*>(tensor.grad) + chunk.first,
            master, ((tensor.param | tensor.grad) & kMask) == 0};
}

}  // namespace qlk::cuda
