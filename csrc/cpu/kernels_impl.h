// The table of kernels of one instruction set; included once by each isa_<name>.cpp.
#pragma once

#include "dequantize.h"
#include "engine_f32.h"
#include "isa.h"
#include "linear.h"
#include "nearest.h"
#include "quantize.h"
#if defined(__AVX512BF16__)
#include "engine_bf16.h"
#include "few_rows.h"
#endif
#if defined(__AMX_BF16__)
#include "stream_amx.h"
#endif

namespace qlk::cpu::QLK_ISA {

#if defined(__AVX512BF16__)
using EngineForBf16 = EngineBf16;
#else
using EngineForBf16 = EngineF32<bf16>;
#endif

static void linear_forward(const LinearForwardParams& p) {
#if defined(__AVX512BF16__)
    if (p.dtype == DType::kBFloat16 && few_rows_forward(p)) return;
#endif
#if defined(__AMX_BF16__)
    if (p.dtype == DType::kBFloat16 && stream_forward(p)) return;
#endif
    switch (p.dtype) {
        case DType::kBFloat16: return Forward<EngineForBf16>(p).run();
        case DType::kFloat16: return Forward<EngineF32<fp16>>(p).run();
        default: return Forward<EngineF32<float>>(p).run();
    }
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
const Kernels kernels = {QLK_STRING(QLK_ISA), quantize, nearest_codes, dequantize, linear_forward, linear_backward};

}  // namespace qlk::cpu::QLK_ISA
