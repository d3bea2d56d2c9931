// The whole native interface: one POD params struct and one function for each operation.
//
// Sizes: N = out_features, K = in_features, M = rows of x (tokens), r = rank. Matrices are row-major and
// contiguous. Pointers are to memory of the device that runs the function; nothing is kept after the call.
#pragma once

#include <cstdint>

#include "nf4.h"
#include "optimizer.h"

namespace qlk {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A quantized weight [n, k]; the blocks of 64 run over the flat tensor.
struct WeightView {
    const uint8_t* packed;       // [(n * k + 1) / 2], two codes a byte, the first in the high nibble
    const float* absmax;         // [blocks] or null when the constants are double-quantized
    const uint8_t* absmax_code;  // [blocks] or null
    const float* nested_absmax;  // [(blocks + 255) / 256]
    const float* nested_table;   // [256]
    const float* nested_offset;  // [1]
    int64_t n;
    int64_t k;
    Levels levels = kNf4;  // what the codes mean
};

struct QuantizeParams {
    const void* weight;  // [count] of dtype
    uint8_t* packed;     // [(count + 1) / 2]
    float* absmax;       // [(count + 63) / 64]
    int64_t count;
    DType dtype;
    int threads;
};

struct QuantizeAbsmaxParams {
    const float* absmax;   // [count]
    const float* table;    // [256]
    uint8_t* code;         // [count]
    float* nested_absmax;  // [(count + 255) / 256]
    float* offset;         // [1]
    int64_t count;
    int threads;
};

struct DequantizeParams {
    WeightView weight;
    void* out;  // [row_end - row_begin, k] of dtype
    int64_t row_begin;
    int64_t row_end;
    DType dtype;
    int threads;
};

// y = x W^T + u B^T + bias with u = scaling / (1 - p) * mask(x) A^T, mask by Philox(seed) with probability p.
struct LinearForwardParams {
    WeightView weight;
    const void* x;       // [m, k] of dtype
    const void* lora_a;  // [r, k] of dtype, or null
    const void* lora_b;  // [n, r] of dtype, or null
    const float* bias;   // [n] or null
    void* y;             // [m, n] of dtype
    void* u;             // [m, r] of dtype, or null
    int64_t m;
    int64_t r;
    float scaling;
    double dropout;
    uint64_t seed;
    DType dtype;
    int threads;
    // CUDA only:
    const void* narrow_bias = nullptr;    // [n] of dtype, instead of bias
    bool wide_a = false, wide_b = false;  // whether lora_a and lora_b are float32, whatever dtype is
    // CPU only: columns of y to compute, the first a multiple of 32; end 0: all. u is made in full.
    int64_t n_begin = 0, n_end = 0;

    int64_t end() const { return n_end > 0 ? n_end : weight.n; }
};

// dx = dy W + mask(v A), v = scaling / (1 - p) * dy B; da = v^T mask(x); db = dy^T u.
struct LinearBackwardParams {
    WeightView weight;
    const void* dy;      // [m, n] of dtype
    const void* x;       // [m, k] of dtype, or null when da is
    const void* u;       // [m, r] of dtype, or null when db is
    const void* lora_a;  // [r, k] of dtype, or null
    const void* lora_b;  // [n, r] of dtype, or null
    void* dx;            // [m, k] of dtype, or null
    float* da;           // [r, k], or null
    float* db;           // [n, r], or null
    int64_t m;
    int64_t r;
    float scaling;
    double dropout;
    uint64_t seed;
    DType dtype;
    int threads;
    // CUDA only:
    bool wide_a = false, wide_b = false;              // whether lora_a and lora_b are float32, whatever dtype is
    void *narrow_da = nullptr, *narrow_db = nullptr;  // of dtype, instead of da and db
    // CPU only: columns of dx to compute, the first a multiple of 128; end 0: all.
    int64_t k_begin = 0, k_end = 0;

    int64_t end() const { return k_end > 0 ? k_end : weight.k; }
};

// The same products for the experts of a mixture: rows offsets[e] to offsets[e + 1] of x are multiplied by weight e.
//
// Params: LinearForwardParams or LinearBackwardParams of expert 0, with m for the rows of all. Every piece of a weight
// but nested_table, and every adapter, bias and adapter's gradient, is a stack: the next expert's begins where one's
// ends, so that each expert has blocks of its own. No dropout.
template <class Params>
struct GroupedParams {
    Params first;
    const int64_t* offsets;  // [experts + 1], ascending, from 0 to m; on the device for CUDA
    int64_t experts;
};
using GroupedForwardParams = GroupedParams<LinearForwardParams>;
using GroupedBackwardParams = GroupedParams<LinearBackwardParams>;

namespace cpu {

// Returns the flat index of the first non-finite element, or -1 when all are finite; then packed and absmax are filled.
int64_t quantize(const QuantizeParams& params);
void quantize_absmax(const QuantizeAbsmaxParams& params);
void dequantize(const DequantizeParams& params);
void linear_forward(const LinearForwardParams& params);
void linear_backward(const LinearBackwardParams& params);
void linear_grouped_forward(const GroupedForwardParams& params);
void linear_grouped_backward(const GroupedBackwardParams& params);
// One step of an optimizer; nothing else may use what the params point to meanwhile. If other processes hold gradients
// of the same model, sum_of_squares[0] is the sum over all processes, added up from the results of optimizer_sums.
void optimizer_step(const OptimizerParams& params, const double* sum_of_squares = nullptr);
// The sum of squares of each chunk's gradients, 0 where there are none: fills params.partial, and nothing else.
void optimizer_sums(const OptimizerParams& params);
// States to 8 bits: codes [count] and constants [(count + 255) / 256].
void quantize_states(const float* values, uint8_t* code, float* absmax, int64_t count, bool is_signed);

// Instruction sets, best first: those built in, and the one in use (QLORA_KERNELS_CPU_ISA forces one; it is read at
// every call, an unknown or unavailable name throws).
const char* isa_in_use();
// Comma-separated names.
const char* isas_built();
const char* isas_available();
// Most bytes of scratch any thread has used since the last reset.
int64_t scratch_peak_bytes(bool reset);

}  // namespace cpu

// The same on CUDA devices, and in the emulator: launches on the caller's stream, no synchronisation with the host.
namespace cuda {

// Where a launch goes. The params structs' `threads` is ignored here.
struct Stream {
    int device;    // its ordinal
    void* handle;  // a cudaStream_t of that device
};

// A block that holds NaN or infinity gets the constant NaN. sums: null, or float64 [groups]: the sum of the constants
// of each group of 256 blocks, for quantize_absmax.
void quantize(const QuantizeParams& params, double* sums, const Stream& stream);
// sums: float64 [groups]; filled here unless `summed` says that quantize() did.
void quantize_absmax(const QuantizeAbsmaxParams& params, double* sums, bool summed, const Stream& stream);
void dequantize(const DequantizeParams& params, const Stream& stream);
// The params' seed is ignored: the device reads it from `seed`, int64 [1], or null without dropout.
// scratch: linear_scratch bytes on a multiple of 16, or null for none; its contents do not matter.
void linear_forward(const LinearForwardParams& params, const int64_t* seed, void* scratch, const Stream& stream);
// v: [m, r] of dtype, or null without adapters.
void linear_backward(const LinearBackwardParams& params, const int64_t* seed, void* v, void* scratch,
                     const Stream& stream);
// Bytes of scratch that either of them needs for these sizes: at most 16 MiB, plus room for each adapter whose type is
// not x's, [r, k] or [n, r]: a copy of a float32 adapter or, in backward, float32 sums for a 16-bit adapter's gradient.
int64_t linear_scratch(int64_t m, int64_t n, int64_t k, int64_t r, DType dtype, bool wide_a, bool wide_b, bool backward,
                       int device);

}  // namespace cuda
}  // namespace qlk
