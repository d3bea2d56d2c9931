// The kernels of emulator/conformance.cu as nvcc compiles them, for a card.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "emulator/conformance.h"
#include "emulator/conformance_sm90.h"

namespace py = pybind11;

PYBIND11_MODULE(_conformance, m) {
    m.def("conformance_kernels", [] {
        py::dict all;
        for (const auto& k : qlk::conformance::kernels()) all[k.name] = py::make_tuple(k.words_in, k.words_out);
        return all;
    });
    m.def("run_conformance", [](const std::string& name, uintptr_t in, uintptr_t out, int device, uintptr_t stream) {
        for (const auto& k : qlk::conformance::kernels()) {
            if (name != k.name) continue;
            return k.run({reinterpret_cast<const uint32_t*>(in), reinterpret_cast<uint32_t*>(out)},
                         {device, reinterpret_cast<void*>(stream)});
        }
        throw std::invalid_argument("no conformance kernel '" + name + "'");
    });
    m.attr("RATE_FLOP") = qlk::conformance::kRateFlop * qlk::conformance::kRateWarps;
    m.def("launch_rate", [](uintptr_t in, uintptr_t out, int turns, int blocks, int device, uintptr_t stream) {
        qlk::conformance::launch_rate({reinterpret_cast<const uint32_t*>(in), reinterpret_cast<float*>(out), turns},
                                      blocks, {device, reinterpret_cast<void*>(stream)});
    });
#ifdef QLK_SM90A
    m.attr("WIDE_RATE_FLOP") = qlk::conformance::kWideRateFlop;
    m.def("launch_wide_rate", [](uintptr_t in, uintptr_t out, int turns, int blocks, int device, uintptr_t stream) {
        qlk::conformance::launch_wide_rate(
            {reinterpret_cast<const uint32_t*>(in), reinterpret_cast<float*>(out), turns}, blocks,
            {device, reinterpret_cast<void*>(stream)});
    });
    m.def("run_wide", [](const std::string& name, uintptr_t in, uintptr_t out, int device, uintptr_t stream) {
        for (const auto& k : qlk::conformance::wide_kernels()) {
            if (name != k.name) continue;
            return k.run({reinterpret_cast<const uint32_t*>(in), reinterpret_cast<uint32_t*>(out)},
                         {device, reinterpret_cast<void*>(stream)});
        }
        throw std::invalid_argument("no conformance kernel '" + name + "'");
    });
#endif
    m.def("launch_idle", [](int threads, size_t shared_bytes, int device, uintptr_t stream) {
        qlk::conformance::launch_idle(threads, shared_bytes, {device, reinterpret_cast<void*>(stream)});
    });
}
