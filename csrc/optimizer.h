// What the optimizer's kernels read: the tables that Python fills, and the dynamic maps of 8-bit states. Plain data,
// the same on every device.
//
// An optimizer is cut into chunks of at most kChunk elements of one tensor, in the order in which the arena holds their
// states. A launch takes a range of chunks, whatever tensors they are of.
#pragma once

#include <cstdint>

namespace qlk {

enum class Algorithm : int { kAdamW = 0, kLion = 1 };

constexpr int kStateBlock = 256;  // elements that share a constant of 8-bit states
constexpr int kChunk = 8192;

// The planes of a chunk's states. Those that an optimizer lacks are kNoPlane.
enum Plane : int {
    kFirst,         // float32, or 8-bit codes
    kSecond,        // likewise; AdamW alone
    kFirstAbsmax,   // float32 for each kStateBlock elements; of 8-bit states
    kSecondAbsmax,  // likewise
    kMaster,        // float32: the parameter itself, where it has 16 bits
    kPlanes
};
constexpr int64_t kNoPlane = -1;

struct OptimizerChunk {
    int32_t tensor;
    int32_t count;  // of elements
    int32_t group;
    int32_t dtype;  // of the parameter and its gradient
    int64_t first;  // element of the tensor
    // Bytes, a multiple of 16: of kFirstAbsmax and kSecondAbsmax from `header`, of the others from `states`.
    int64_t plane[kPlanes];
};
static_assert(sizeof(OptimizerChunk) == 64);

struct OptimizerTensor {
    uint64_t param;
    uint64_t grad;  // 0: has none, and stays as it is
};

struct OptimizerGroup {
    double lr, beta1, beta2, eps, weight_decay, unused;
};

// What a step has found, and how many were left out. In the arena, zero at first.
struct OptimizerControl {
    double sum_of_squares;  // of the gradients as they are, before grad_scale
    float norm;             // of the gradients; NaN or infinite when one of them is
    float coefficient;      // that they are multiplied by: 1 / grad_scale, and what clipping asks for
    uint32_t skip;          // the step changes nothing
    uint32_t come;          // blocks of a launch that have come to its end
    int64_t skipped;        // steps so far
};

// The dynamic maps (Dettmers et al. 2021, arXiv 2110.02861, section 2): in each of seven decades twice as many levels
// as in the one below, halfway between the ends of as many equal parts of [0.1, 1]; with 0 and 1. The signed map has
// half as many of them on either side; -1 it lacks.
//
// A value's code is the nearest entry's, that of the smaller magnitude at a midpoint. The search starts from the upper
// bits of the value: no more than kClimb midpoints lie among the floats that share them.
struct DynamicMap {
    static constexpr int kShift = 17;                                  // of sign, exponent and 6 bits of the fraction
    static constexpr uint32_t kLowest = (127u - 24) << (23 - kShift);  // 2^-24, below the first midpoint
    static constexpr int kKeys = (24 << (23 - kShift)) + 1;            // up to 1 and what is beyond
    static constexpr int kClimb = 2;

    float value[256];          // by code
    float midpoint[256 + 4];   // between the magnitudes, ascending; then infinity
    uint8_t start[kKeys + 3];  // of each key: midpoints below all its floats
    int32_t zero;              // the code of zero; codes of positive values follow
};
static_assert(DynamicMap::kKeys == 1537);

const DynamicMap& dynamic_map(bool is_signed);

struct OptimizerParams {
    Algorithm algorithm;
    int state_bits;                // 32 or 8
    const OptimizerChunk* chunks;  // [all_chunks]
    int64_t all_chunks;
    const OptimizerTensor* tensors;  // [tensor_count]
    int64_t tensor_count;
    const OptimizerGroup* groups;
    OptimizerControl* control;
    float* steps;     // [tensor_count], done so far
    double* partial;  // [all_chunks], for the norm
    unsigned char* header;
    unsigned char* states;
    const float* grad_scale;  // [1]: the gradients are divided by it; or null
    const float* found_inf;   // [1]: not zero when the step is to be left out; or null
    double max_grad_norm;     // 0: no clipping
    bool skip_nonfinite;
    int threads;  // CPU alone
};

}  // namespace qlk
