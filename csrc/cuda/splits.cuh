// Blocks that share a tile, each with a part of the depth: the one that comes last adds the sums of all, in the order
// of the parts whoever it is, so that the same inputs give the same bits.
//
// Nobody waits, so it does not matter which blocks run together. Tickets need no zeros to begin with: each has the
// launch's own number in its upper bits, and what else it holds counts as nobody having come. The last one takes the
// number away again: a captured graph replays its launches with the same one.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

struct Splits {
    float4* partial;             // [tiles][count][sums / 4][threads]
    unsigned long long* ticket;  // [tiles]
    unsigned long long launch;   // its lowest byte is 0
    int count;                   // of the blocks that share a tile, at most 255; 1: none of this is touched
};

// Whether this block comes last of those that share a tile; then it sees what the others gave to store_exchanged before
// they came here. All threads of the block come. `word`: of shared memory, for this alone.
QLK_DEVICE bool comes_last(const Splits& splits, int64_t tile, int* word) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // for all threads of the block, whose stores the barrier put before this
        unsigned long long seen = load_exchanged(splits.ticket + tile), before;
        do {
            before = seen;
            const unsigned long long others = (before & ~0xffull) == splits.launch ? before & 0xff : 0;
            const bool last = static_cast<int>(others) == splits.count - 1;
            seen = atomicCAS(splits.ticket + tile, before, last ? 0ull : splits.launch | (others + 1));
            store_shared(word, last ? 1 : 0);
        } while (seen != before);
        __threadfence();
    }
    __syncthreads();
    return load_shared(word) != 0;
}

// Every thread of the block brings its sums. In the block that comes last they become those of all blocks, and the
// result is true; the others are done. `word`: of shared memory, for this alone.
template <int kThreads, int kSums>
QLK_DEVICE bool add_splits(const Splits& splits, int64_t tile, int split, float (&sum)[kSums], int* word) {
    static_assert(kSums % 4 == 0);
    if (splits.count == 1) return true;
    const int self = static_cast<int>(threadIdx.x);
    const auto place = [&](int which, int i) {
        return splits.partial + ((tile * splits.count + which) * (kSums / 4) + i) * kThreads + self;
    };
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
        store_exchanged(place(split, i), make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    }
    if (!comes_last(splits, tile, word)) return false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0.0f;
#pragma unroll 1
    for (int which = 0; which < splits.count; ++which) {
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
            const float4 part = load_exchanged(place(which, i));
            sum[4 * i] += part.x;
            sum[4 * i + 1] += part.y;
            sum[4 * i + 2] += part.z;
            sum[4 * i + 3] += part.w;
        }
    }
    return true;
}

}  // namespace qlk::cuda
