// Shared by the emulator's module and the card's: the kernels of conformance.cu and conformance_sm90.cu.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "conformance_sm90.h"

namespace qlk::conformance {

inline const uint32_t* given(uintptr_t address) { return reinterpret_cast<const uint32_t*>(address); }
inline cuda::Stream stream_of(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

// Binds `names`, which returns the kernels' names with their words in and out, and `run`, which runs one of them.
template <class Kernels>
void bind_kernels(pybind11::module_& m, const char* names, const char* run, Kernels kernels) {
    m.def(names, [kernels] {
        pybind11::dict all;
        for (const auto& k : kernels()) all[k.name] = pybind11::make_tuple(k.words_in, k.words_out);
        return all;
    });
    m.def(run, [kernels](const std::string& name, uintptr_t in, uintptr_t out, int device, uintptr_t stream) {
        for (const auto& k : kernels()) {
            if (name == k.name) return k.run({given(in), reinterpret_cast<uint32_t*>(out)}, stream_of(device, stream));
        }
        throw std::invalid_argument("no conformance kernel '" + name + "'");
    });
}

template <class Launch>
void bind_rate(pybind11::module_& m, const char* launch_name, Launch launch) {
    m.def(launch_name, [launch](uintptr_t in, uintptr_t out, int turns, int blocks, int device, uintptr_t stream) {
        launch({given(in), reinterpret_cast<float*>(out), turns}, blocks, stream_of(device, stream));
    });
}

inline void bind_conformance(pybind11::module_& m) {
    bind_kernels(m, "conformance_kernels", "run_conformance", &kernels);
    m.attr("RATE_FLOP") = kRateFlop * kRateWarps;
    bind_rate(m, "launch_rate", &launch_rate);
}

// On a card only if it is compiled for sm_90a.
inline void bind_sm90(pybind11::module_& m) {
    bind_kernels(m, "wide_kernels", "run_wide", &wide_kernels);
    m.attr("WIDE_RATE_FLOP") = kWideRateFlop;
    bind_rate(m, "launch_wide_rate", &launch_wide_rate);
}

}  // namespace qlk::conformance
