// Dequantizes a range of the flat weight, in one launch.
//
// Formula: out[i] = round_to_T(level[code[i]] * absmax[i / 64])
//
// Layout:
//     warp   1024 weights
//     lane   one load of 16 bytes, 32 codes; stores of 16 bytes, of which a warp's cover 512 neighbouring bytes
//     level  lane i holds level i % 16; a shuffle looks it up
//
// Shared memory: 512 bytes a warp, 4 KiB a block. Codes pass through it from the lane that loads them to the lane that
//     stores them.
//
// Why: stored by the lane that loaded them, results would be 64 bytes apart, twice the requests to L2. Shuffles are as
//     fast as shared memory and need no table. docs/design/notes-cuda.md, "Dequantizing", has the rates.
#pragma once

#include "cuda/common/decode.cuh"

namespace qlk::cuda {

struct DequantizeArguments {
    DeviceWeight weight;
    void* out;           // [end - begin] of T
    int64_t begin, end;  // elements of the flat weight
};

// T: type of the result.
template <class T>
struct DequantizeTraits {
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kTile = 32 * 32;                               // weights of a warp
    static constexpr int kPerStore = 16 / static_cast<int>(sizeof(T));  // weights in 16 bytes of output
    static constexpr int kStep = 32 * kPerStore;                        // weights that a warp stores at a time
    static constexpr int kSteps = kTile / kStep;
    static_assert(kBlock % kPerStore == 0, "what a lane stores at a time has one constant");
    static_assert(kTile / kBlock <= 32, "a lane for each constant of a tile");

    struct Shared {
        uint4 codes[kWarps][32];
    };
};

// 16 bytes of output from the 8 codes (16-bit types) or 4 codes (float32) in the low bits of `codes`, first byte
// lowest. lane_level: level[lane % 16]. absmax: their block's constant.
template <class T>
QLK_DEVICE uint4 decode_16_bytes(uint32_t codes, float lane_level, float absmax) {
    constexpr int kCount = DequantizeTraits<T>::kPerStore;
    float value[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        // The high nibble of a byte comes first. A width of 16 lets the shuffle itself mask the code.
        const int shift = i / 2 * 8 + (i % 2 ? 0 : 4);
        value[i] = __fmul_rn(__shfl_sync(kAllLanes, lane_level, static_cast<int>(codes >> shift), 16), absmax);
    }
    if constexpr (sizeof(T) == 4) {
        return make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                          __float_as_uint(value[3]));
    } else {
        return make_uint4(pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3]),
                          pack_pair<T>(value[4], value[5]), pack_pair<T>(value[6], value[7]));
    }
}

// Weights [first, end), at most a tile of them, one at a time. The slow way, for edges and unaligned ranges.
template <class T>
QLK_DEVICE void dequantize_singly(const DequantizeArguments& a, int64_t first, float lane_level) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    T* const out = static_cast<T*>(a.out);
    for (int step = 0; step < DequantizeTraits<T>::kTile; step += 32) {
        if (first + step >= a.end) return;
        const int64_t i = first + step + lane < a.end ? first + step + lane : a.end - 1;
        const int byte = load_global(a.weight.packed + i / 2);
        const float level = __shfl_sync(kAllLanes, lane_level, i % 2 ? byte : byte >> 4, 16);
        const T value = from_float<T>(__fmul_rn(level, decode_absmax(a.weight, i / kBlock)));
        if (first + step + lane < a.end) store_global(out + (i - a.begin), value);
    }
}

// Grid: a warp for each kTile weights. kAligned: begin is a multiple of 64, and packed and out are 16-byte aligned.
template <class T, bool kAligned>
__global__ void __launch_bounds__(DequantizeTraits<T>::kThreads)
    dequantize_kernel(const __grid_constant__ DequantizeArguments a) {
    using Traits = DequantizeTraits<T>;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const float lane_level = a.weight.levels[lane % 16];
    const int64_t first = a.begin + (static_cast<int64_t>(blockIdx.x) * Traits::kWarps + warp) * Traits::kTile;
    if (first >= a.end) return;
    if (!kAligned || a.end - first < Traits::kTile) return dequantize_singly<T>(a, first, lane_level);

    // Lane b decodes the constant of the tile's block b while the codes are under way.
    auto& codes = shared_memory<typename Traits::Shared>().codes[warp];
    const uint4 loaded = ld_global_once_16(a.weight.packed + first / 2 + lane * 16);
    const float lane_absmax = decode_absmax(a.weight, first / kBlock + lane % (Traits::kTile / kBlock));
    store_shared(&codes[lane], loaded);
    __syncwarp();
    // The codes for one 16-byte store: 4 bytes for 16-bit types, 2 bytes for float32.
    using Codes = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;
    const Codes* const mine = reinterpret_cast<const Codes*>(codes) + lane;
    T* const out = static_cast<T*>(a.out) + (first - a.begin) + lane * Traits::kPerStore;
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
        const int block = (step * Traits::kStep + lane * Traits::kPerStore) / kBlock;
        const float absmax = __shfl_sync(kAllLanes, lane_absmax, block);
        st_global_16(out + step * Traits::kStep, decode_16_bytes<T>(load_shared(mine + step * 32), lane_level, absmax));
    }
}

}  // namespace qlk::cuda
