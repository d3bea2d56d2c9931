// The calls that Python makes, with their operands.
#pragma once

#include <pybind11/pybind11.h>

// Makes the operations that bind_cuda has bound state their operands (operands.h): their sizes are those that
// csrc/kernels.h and csrc/optimizer.h promise. `made`, a list, takes tensors that the next call has to keep within.
// `plain` is a module of the operations as they were bound, for measurements of what a call costs.
void state_operands(pybind11::module_& m);
