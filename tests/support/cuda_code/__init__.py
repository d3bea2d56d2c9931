"""The CUDA code beyond a call of an operation: the extension's functions, its wheel, its machine code."""
