"""Kernels for QLoRA: NF4 weights, a linear layer that fuses dequantization, GEMM and the low-rank term, and tools.

See README.md, and docs/ for everything else.
"""

from .formats.nf4 import NF4Weight, default_nested_table, dequantize, quantize
from .formats.nf4_stack import NF4Stack, quantize_stack
from .interop.bitsandbytes.models import from_bitsandbytes, to_bitsandbytes
from .interop.peft import register as _register_peft
from .interop.transformers.load import load_quantized
from .interop.transformers.nf4_config import NF4Config
from .interop.transformers.registration import register as _register_transformers
from .layers.adapters.config import AdapterConfig
from .layers.experts import QExperts
from .layers.functional import linear
from .layers.grouped import linear_grouped
from .layers.merging import MergeReport
from .layers.qlinear import QLinear
from .models.adapter_files import load_adapter, save_adapter
from .models.adapters import disable_adapters, merge_adapters, set_adapter, unmerge_adapters
from .models.quantize import QuantizeReport, quantize_model
from .models.targets import qlora_layers
from .native.build_info import build_info
from .native.build_info import version as _version
from .ops.backends import reference
from .optim.algorithms import PagedAdamW, PagedLion
from .optim.lora_plus import lora_plus_groups

__version__: str

__all__ = [
    "AdapterConfig",
    "MergeReport",
    "NF4Config",
    "NF4Stack",
    "NF4Weight",
    "PagedAdamW",
    "PagedLion",
    "QExperts",
    "QLinear",
    "QuantizeReport",
    "__version__",
    "build_info",
    "default_nested_table",
    "dequantize",
    "disable_adapters",
    "from_bitsandbytes",
    "linear",
    "linear_grouped",
    "load_adapter",
    "load_quantized",
    "lora_plus_groups",
    "merge_adapters",
    "qlora_layers",
    "quantize",
    "quantize_model",
    "quantize_stack",
    "reference",
    "save_adapter",
    "set_adapter",
    "to_bitsandbytes",
    "unmerge_adapters",
]

_register_peft()
_register_transformers()


def __getattr__(name: str) -> str:
    # It names the CUDA architectures inside, which the extension knows: loaded when asked for, not at import.
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names alone, for completion; subpackages can be imported all the same."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
