// What the optimizer's kernels read: tables that Python fills, and the dynamic maps of 8-bit states. Plain data, the
// same on every device.
//
// Tensors are cut into chunks of at most kChunk elements, in the order in which the arena holds their states. A launch
// takes a range of chunks, whatever tensors they belong to.
#pragma once

#include <cstdint>

namespace qlk {

enum class Algorithm : int { kAdamW = 0, kLion = 1 };

constexpr int kStateBlock = 256;  // elements of 8-bit states that share a constant
constexpr int kChunk = 8192;      // elements

// The planes of a chunk's states. A plane that an optimizer doesn't have is kNoPlane.
enum Plane : int {
    kFirst,         // float32, or 8-bit codes
    kSecond,        // the same; AdamW only
    kFirstAbsmax,   // a float32 for each kStateBlock elements; 8-bit states only
    kSecondAbsmax,  // the same
    kMaster,        // float32 copy of a 16-bit parameter
    kPlanes
};
constexpr int64_t kNoPlane = -1;

struct OptimizerChunk {
    int32_t tensor;  // index into the table of tensors
    int32_t count;   // elements
    int32_t group;   // index into the table of groups
    int32_t dtype;   // DType of the parameter and its gradient
    int64_t first;   // first element in the tensor
    // Offsets in bytes, multiples of 16: kFirstAbsmax and kSecondAbsmax from `header`, the others from `states`.
    int64_t plane[kPlanes];
};
static_assert(sizeof(OptimizerChunk) == 64);

struct OptimizerTensor {
    uint64_t param;  // address
    uint64_t grad;   // address; 0: no gradient, the tensor stays unchanged
};

struct OptimizerGroup {
    double lr, beta1, beta2, eps, weight_decay, unused;
};

// A step's results, and how many steps have been skipped. Lies in the arena and starts as zeros.
struct OptimizerControl {
    double sum_of_squares;  // of the gradients, before grad_scale
    float norm;             // of the gradients; NaN or infinite if one of them is
    float coefficient;      // multiplies the gradients: 1 / grad_scale, times clipping's factor
    uint32_t skip;          // 1: the step changes nothing
    uint32_t arrived;       // blocks of a launch that have reached its end
    int64_t skipped;        // steps skipped so far
};

// The dynamic maps (Dettmers et al. 2021, arXiv 2110.02861, section 2). Each of seven decades has twice as many levels
// as the one below; the levels are the centres of as many equal parts of [0.1, 1]. 0 and 1 are added. The signed map
// has half as many levels on either side, and no -1.
//
// A value gets the code of the nearest entry, at a midpoint the one with the smaller magnitude. The search starts from
// the value's upper bits: among the floats that share them lie at most kClimb midpoints.
struct DynamicMap {
    static constexpr int kShift = 17;  // keeps sign, exponent and 6 bits of the fraction
    static constexpr uint32_t kLowest = (127u - 24) << (23 - kShift);  // 2^-24, below the first midpoint
    static constexpr int kKeys = (24 << (23 - kShift)) + 1;            // up to 1 and beyond
    static constexpr int kClimb = 2;

    float value[256];          // by code
    float midpoint[256 + 4];   // between magnitudes, ascending; then infinity
    uint8_t start[kKeys + 3];  // by key: how many midpoints lie below all its floats
    int32_t zero;              // code of zero; codes of positive values follow
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
    float* steps;             // [tensor_count], steps taken so far
    double* partial;          // [all_chunks], for the norm
    unsigned char* header;    // start of the arena's header
    unsigned char* states;    // base of the offsets of states
    const float* grad_scale;  // [1], divides the gradients; or null
    const float* found_inf;   // [1], not zero: skip the step; or null
    double max_grad_norm;     // 0: no clipping
    bool skip_nonfinite;      // skip a step whose norm is not finite
    int threads;              // CPU only
};

}  // namespace qlk
