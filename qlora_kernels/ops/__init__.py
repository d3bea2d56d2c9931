"""The operations. Each has one name throughout: a schema here, a function in csrc/kernels.h, a kernel in each backend.

``quantize``, ``quantize_absmax``, ``dequantize``, ``linear_forward`` and ``linear_backward``, and the latter two for a
mixture's experts, ``linear_grouped_forward`` and ``linear_grouped_backward``: all in ``torch.ops.qlora_kernels``.
``quantize_nested`` is the first two in one (on a GPU, in two launches), ``dequantize_out`` is ``dequantize`` into the
caller's tensor. An operation's schema, checks and fake implementation are in one file, and tensors are checked here
once: below there are only pointers and sizes. A quantized weight is passed as its five pieces (see
:class:`qlora_kernels.NF4Weight`), a stack of weights as theirs, one behind the other.
"""

from .dequantize import dequantize, dequantize_out
from .grouped import linear_grouped_backward, linear_grouped_forward
from .linear import linear_backward, linear_forward
from .lora import LoraTerm
from .quantize import check_finite, quantize, quantize_absmax, quantize_nested
from .weight import Operand, Pieces, check_weight

__all__ = [
    "LoraTerm",
    "Operand",
    "Pieces",
    "check_finite",
    "check_weight",
    "dequantize",
    "dequantize_out",
    "linear_backward",
    "linear_forward",
    "linear_grouped_backward",
    "linear_grouped_forward",
    "quantize",
    "quantize_absmax",
    "quantize_nested",
]
