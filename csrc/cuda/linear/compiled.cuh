// Which kernels have code for an architecture.
#pragma once

#include <device.cuh>
#include <type_traits>

#include "cuda/linear/dispatch.h"

namespace qlk::cuda {

// Whether a kernel on tensor cores, of type T and with so much shared memory at least, can run on the architecture that
// is compiled for. Launchers ask for no others (dispatch.h, adapters.cu): what is compiled of these is a trap.
template <class T, size_t kShared>
constexpr bool kRuns = kArchitecture == 0 ||
                       (kArchitecture >= (std::is_same_v<T, bf16> ? 80 : 75) && kShared <= most_shared(kArchitecture));

}  // namespace qlk::cuda
