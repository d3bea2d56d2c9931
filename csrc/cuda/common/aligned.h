// Checks of addresses before a launch: a kernel that meets a misaligned one destroys the whole context.
#pragma once

#include "error.h"
#include "kernels.h"

namespace qlk::cuda {

inline bool lies_on(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Throws unless each address is null or a multiple of `bytes`.
template <class... Addresses>
void require_aligned(size_t bytes, const char* what, const Addresses*... addresses) {
    QLK_CHECK((lies_on(addresses, bytes) && ...),
              std::string(what) + " should lie on a multiple of " + std::to_string(bytes) + " bytes");
}

inline void require_aligned(const WeightView& w) {
    require_aligned(4, "the constants of a weight", w.absmax, w.nested_absmax, w.nested_table, w.nested_offset);
}

}  // namespace qlk::cuda
