// A step of AdamW or Lion for all tensors, in one launch.
//
// Formula: update() in elements.cuh; the numbers are those of csrc/cpu/optimizer/optimizer.h, bit for bit.
//
// Layout:
//     block    256 threads, one chunk of one tensor, of any type
//     32 bits  a thread takes 4 neighbours at a time, in 16-byte accesses
//     8 bits   a warp takes a block of 256 elements, a lane 8 of them
//
// Shared memory: 64 bytes; with 8-bit states both dynamic maps, 7.1 KiB.
//
// Why: with 32-bit states a step only moves memory, 28 bytes a float32 parameter. docs/design/notes-cuda.md, "The
//     optimizer's step", has the arithmetic. Step counts are in the arena: the last block to finish raises them, when
//     all others have read theirs. So a captured graph counts too, and a skipped step does not.
#pragma once

#include "cuda/optimizer/elements.cuh"

namespace qlk::cuda {

// kBits: of the states, 32 or 8.
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

// ------------------------------------------------------------------------------------------------ 32-bit states

// A chunk's step with 32-bit states.
template <class Rule, class T>
QLK_DEVICE void step_chunk_32(const OptimizerArguments& a, const OptimizerChunk& chunk, const OptimizerTensor& tensor,
                              const Scalars& s) {
    constexpr int kCount = 4;
    constexpr bool kSecondMoment = Rule::kSecondMoment;
    const auto pointers = pointers_of<T, kCount>(a, chunk, tensor);
    float* const m = reinterpret_cast<float*>(a.p.states + chunk.plane[kFirst]);
    float* const v = reinterpret_cast<float*>(a.p.states + (kSecondMoment ? chunk.plane[kSecond] : 0));
    for (int at = static_cast<int>(threadIdx.x) * kCount; at < chunk.count; at += kOptimizerThreads * kCount) {
        const int count = chunk.count - at;
        float g[kCount], p[kCount];
        alignas(16) float first[kCount], second[kCount] = {};
        pointers.load(at, count, g, p);
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
        pointers.store(at, count, p);
        store_row(m + at, count >= kCount, count, first);
        if constexpr (kSecondMoment) store_row(v + at, count >= kCount, count, second);
    }
}

// ------------------------------------------------------------------------------------------------- 8-bit states

// How many of the map's midpoints lie below a magnitude.
QLK_DEVICE int rank_of(const DynamicMap& map, float magnitude) {
    const int key =
        static_cast<int>(__float_as_uint(magnitude) >> DynamicMap::kShift) - static_cast<int>(DynamicMap::kLowest);
    const int inside = key < 0 ? 0 : key < DynamicMap::kKeys ? key : DynamicMap::kKeys - 1;
    int rank = load_shared(&map.start[inside]);
#pragma unroll
    for (int i = 0; i < DynamicMap::kClimb; ++i) rank += magnitude > load_shared(&map.midpoint[rank]) ? 1 : 0;
    return rank;
}

// Encodes eight states a lane, and returns the constant of the warp's 256, as encode_states in
// csrc/cpu/optimizer/optimizer.h does. kSigned: first moments.
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

// A chunk's step with 8-bit states. maps: signed, unsigned.
template <class Rule, class T>
QLK_DEVICE void step_chunk_8(const OptimizerArguments& a, const OptimizerChunk& chunk, const OptimizerTensor& tensor,
                             const Scalars& s, const DynamicMap (&maps)[2]) {
    constexpr int kCount = 8;
    constexpr bool kSecondMoment = Rule::kSecondMoment;
    static_assert(kCount * 32 == kStateBlock);
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const auto pointers = pointers_of<T, kCount>(a, chunk, tensor);
    uint8_t* const m = a.p.states + chunk.plane[kFirst];
    uint8_t* const v = a.p.states + (kSecondMoment ? chunk.plane[kSecond] : 0);
    float* const m_absmax = reinterpret_cast<float*>(a.p.header + chunk.plane[kFirstAbsmax]);
    float* const v_absmax = reinterpret_cast<float*>(a.p.header + (kSecondMoment ? chunk.plane[kSecondAbsmax] : 0));
    // Whole warps take part in the last block too: past the end there are zeros.
    for (int block = warp; block * kStateBlock < chunk.count; block += kOptimizerThreads / 32) {
        const int at = block * kStateBlock + lane * kCount, count = chunk.count - at;
        float g[kCount], p[kCount], first[kCount], second[kCount] = {};
        alignas(8) uint8_t code_m[kCount], code_v[kCount] = {};
        pointers.load(at, count, g, p);
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
        pointers.store(at, count, p);
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

// Counts the step for the tensors that took part.
QLK_DEVICE void count_step(const OptimizerArguments& a) {
    const uint32_t skip = a.measured ? load_changing(&a.p.control->skip) : 0;
    for (int64_t t = threadIdx.x; t < a.p.tensor_count && !skip; t += kOptimizerThreads) {
        if (load_global(&a.p.tensors[t].grad) == 0) continue;
        store_exchanged(a.p.steps + t, __fadd_rn(load_exchanged(a.p.steps + t), 1.0f));
    }
    if (threadIdx.x != 0) return;
    if (skip) store_global(&a.p.control->skipped, load_changing(&a.p.control->skipped) + 1);
    store_global(&a.p.control->arrived, 0u);
}

// Grid: a block for each chunk of the launch, at least one. Rule: AdamW or Lion. kBits: of the states.
//
// With 8-bit states three blocks fit on a multiprocessor, with 80 registers a thread. On sm_120 AdamW would spill then,
// so there are two; 80 bytes a thread under way are still 40 KiB.
template <class Rule, int kBits>
__global__ void __launch_bounds__(kOptimizerThreads, kBits == 32            ? 4
                                                     : kArchitecture >= 120 ? 2
                                                                            : 3)
    optimizer_step_kernel(const __grid_constant__ OptimizerArguments a) {
    auto& shared = shared_memory<OptimizerShared<kBits>>();
    // A launch without chunks, because all tensors are empty, still counts its step.
    const bool any = a.begin + blockIdx.x < a.p.all_chunks;
    const OptimizerChunk chunk = any ? a.p.chunks[a.begin + blockIdx.x] : OptimizerChunk{};
    const OptimizerTensor tensor = any ? a.p.tensors[chunk.tensor] : OptimizerTensor{};
    ScalarInputs inputs{};
    if (any && (threadIdx.x == kRateThread || threadIdx.x == kRootThread)) inputs = ScalarInputs::load<Rule>(a, chunk);
    if (tensor.grad != 0) {
        store_scalars<Rule>(inputs, shared.scalars);
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
            const ChunkType<kBits == 32> type(chunk);
            if (type.is_float) {
                step_chunk<Rule, kBits, float>(a, chunk, tensor, s, shared);
            } else if (type.is_bf16) {
                step_chunk<Rule, kBits, bf16>(a, chunk, tensor, s, shared);
            } else {
                step_chunk<Rule, kBits, fp16>(a, chunk, tensor, s, shared);
            }
        }
    }
    if (!a.last) return;
    if (threadIdx.x == 0) {
        fence_acq_rel();  // after this block has read its tensor's count
        const uint32_t before = atom_add_acquire(&a.p.control->arrived, 1u);
        store_shared(&shared.last, before == gridDim.x - 1 ? 1 : 0);
    }
    __syncthreads();
    if (load_shared(&shared.last)) count_step(a);
}

}  // namespace qlk::cuda
