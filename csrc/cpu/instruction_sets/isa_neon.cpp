#include "cpu/instruction_sets/kernels_impl.h"
