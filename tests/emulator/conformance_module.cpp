// The kernels of conformance.cu, compiled by nvcc for a card.
#include "bind_conformance.h"

PYBIND11_MODULE(_conformance, m) {
    qlk::conformance::bind_conformance(m);
#ifdef QLK_SM90A
    qlk::conformance::bind_sm90(m);
#endif
    m.def("launch_idle", [](int threads, size_t shared_bytes, int device, uintptr_t stream) {
        qlk::conformance::launch_idle(threads, shared_bytes, {device, reinterpret_cast<void*>(stream)});
    });
}
