// The table of one instruction set's kernels. Each isa_<name>.cpp includes it once.
#pragma once

#include "cpu/isa.h"
#include "cpu/linear/backward.h"
#include "cpu/linear/engine_f32.h"
#include "cpu/linear/forward.h"
#include "cpu/optimizer/optimizer.h"
#include "cpu/quantize/dequantize.h"
#include "cpu/quantize/nearest.h"
#include "cpu/quantize/quantize.h"
#if defined(__AVX2__)
#include "cpu/linear/few_rows.h"
#else
#include "cpu/linear/few_rows_portable.h"
#endif
#if defined(__AVX512BF16__)
#include "cpu/linear/engine_bf16.h"
#endif
#if defined(__AMX_BF16__)
#include "cpu/linear/stream_amx.h"
#endif

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX512BF16__)
using EngineForBf16 = EngineBf16;
#else
using EngineForBf16 = EngineF32<bf16>;
#endif

#if defined(__AVX2__)
static bool few_rows(const LinearForwardParams& p) {
    switch (p.dtype) {
        case DType::kFloat32: return few_rows_forward<DotF32<float>>(p);
        case DType::kFloat16: return few_rows_forward<DotI16<fp16>>(p);
        case DType::kBFloat16: break;
    }
#if defined(__AVX512BF16__)
    return few_rows_forward<DotBf16>(p);
#else
    return few_rows_forward<DotI16<bf16>>(p);
#endif
}
#else
static bool few_rows(const LinearForwardParams& p) {
    switch (p.dtype) {
        case DType::kFloat32: return few_rows_portable<float>(p);
        case DType::kFloat16: return few_rows_portable<fp16>(p);
        default: return few_rows_portable<bf16>(p);
    }
}
#endif

static void linear_forward(const LinearForwardParams& p) {
    if (p.m == 0 || few_rows(p)) return;
    switch (p.dtype) {
        case DType::kFloat16: return Forward<EngineF32<fp16>>(p).run();
        case DType::kFloat32: return Forward<EngineF32<float>>(p).run();
        case DType::kBFloat16: break;
    }
#if defined(__AMX_BF16__)
    if (stream_forward(p)) return;
#endif
    Forward<EngineForBf16>(p).run();
}

static void linear_backward(const LinearBackwardParams& p) {
    switch (p.dtype) {
        case DType::kBFloat16: return Backward<EngineForBf16>(p).run();
        case DType::kFloat16: return Backward<EngineF32<fp16>>(p).run();
        default: return Backward<EngineF32<float>>(p).run();
    }
}

#define QLK_STRING_(x) #x
#define QLK_STRING(x) QLK_STRING_(x)

extern const Kernels kernels;
const Kernels kernels = {QLK_STRING(QLK_ISA), quantize,   nearest_codes,   dequantize,    linear_forward,
                         linear_backward,     step_chunk, quantize_states, sum_of_squares};

}  // namespace qlk::cpu::QLK_ISA
