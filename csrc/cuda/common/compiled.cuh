// Which kernels have code for an architecture.
#pragma once

#include <device.cuh>
#include <type_traits>

#include "cuda/common/dispatch.h"

namespace qlk::cuda {

// Whether a tensor-core kernel of type T with at least kShared bytes of shared memory can run on the architecture being
// compiled for. Launchers ask for no others (dispatch.h, adapters.cu), so the others are compiled as a trap.
template <class T, size_t kShared>
constexpr bool kRuns = kArchitecture == 0 ||
                       (kArchitecture >= (std::is_same_v<T, bf16> ? 80 : 75) && kShared <= most_shared(kArchitecture));

// Whether the code being compiled may use clusters. Launchers ask for them nowhere else.
constexpr bool kClusters = kArchitecture == 0 || has_clusters(kArchitecture);

}  // namespace qlk::cuda
