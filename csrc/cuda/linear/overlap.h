// Launches that may overlap with the one before or after.
#pragma once

#include <device.cuh>

namespace qlk::cuda {

// launch(), with one carve-out for all that overlap: u's kernel and the product don't fit a multiprocessor together,
// but without it the first block of the product would also wait for the multiprocessor to be divided in another way.
template <class Params>
void launch_overlapping(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
                        const Params& params, Start start, unsigned cluster = 1) {
    if (start != Start::kInOrder) prefer_all_shared(reinterpret_cast<const void*>(kernel), stream.device);
    launch(kernel, blocks, threads, shared_bytes, stream, params, start, cluster);
}

}  // namespace qlk::cuda
