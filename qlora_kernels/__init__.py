"""Kernels for QLoRA: NF4 weights, a linear layer that fuses dequantization, GEMM and the low-rank term, and tools.

See README.md for a tour.
"""

from .autograd import linear
from .nf4 import NF4Weight, default_nested_table, dequantize, quantize
from .version import __version__

__all__ = ["NF4Weight", "__version__", "default_nested_table", "dequantize", "linear", "quantize"]
