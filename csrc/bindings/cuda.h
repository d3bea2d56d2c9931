// The CUDA operations as Python functions: part of _C where it is built with CUDA, and of the emulator's module.
#pragma once

#include <pybind11/pybind11.h>

// Adds the operations. Their dicts end with a device's ordinal and a stream's address.
void bind_cuda(pybind11::module_ m);
