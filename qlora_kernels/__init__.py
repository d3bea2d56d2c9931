"""Kernels for QLoRA: NF4 weights, a linear layer that fuses dequantization, GEMM and the low-rank term, and tools.

See README.md, and docs/ for everything else.
"""

from .adapters import load_adapter, save_adapter
from .autograd import linear
from .build_info import build_info
from .lora import AdapterConfig
from .merge import MergeReport
from .models import (
    QuantizeReport,
    disable_adapters,
    merge_adapters,
    qlora_layers,
    quantize_model,
    set_adapter,
    unmerge_adapters,
)
from .nf4 import NF4Weight, default_nested_table, dequantize, quantize
from .optim import PagedAdamW, PagedLion
from .qlinear import QLinear
from .version import version as _version

__version__: str

__all__ = [
    "AdapterConfig",
    "MergeReport",
    "NF4Weight",
    "PagedAdamW",
    "PagedLion",
    "QLinear",
    "QuantizeReport",
    "__version__",
    "build_info",
    "default_nested_table",
    "dequantize",
    "disable_adapters",
    "linear",
    "load_adapter",
    "merge_adapters",
    "qlora_layers",
    "quantize",
    "quantize_model",
    "save_adapter",
    "set_adapter",
    "unmerge_adapters",
]


def __getattr__(name: str):
    # It names the CUDA architectures inside, which the extension knows: loaded when asked for, not at import.
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
