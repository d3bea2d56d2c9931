"""Calls of the CUDA operations as the extension binds them: params field by field, zeros by default."""

from __future__ import annotations

from typing import Any

_FIELDS = {
    "quantize": "weight packed absmax count dtype sums device stream",
    "quantize_absmax": "absmax table code nested_absmax offset count sums summed device stream",
    "dequantize": "weight out row_begin row_end dtype device stream",
    "linear_forward": (
        "weight x lora_a lora_b bias y u m r scaling dropout dtype narrow_bias wide_a wide_b seed scratch device stream"
    ),
    "linear_backward": (
        "weight dy x u lora_a lora_b dx da db m r scaling dropout dtype wide_a wide_b narrow_da narrow_db seed v "
        "scratch device stream"
    ),
    "linear_grouped_forward": (
        "weight x lora_a lora_b bias y u m r scaling dropout dtype narrow_bias wide_a wide_b offsets experts device "
        "stream"
    ),
    "linear_grouped_backward": (
        "weight dy x u lora_a lora_b dx da db m r scaling dropout dtype wide_a wide_b narrow_da narrow_db offsets "
        "experts v device stream"
    ),
}
_WEIGHT = "packed absmax absmax_code nested_absmax nested_table nested_offset n k levels"


def call_kernels(kernels: Any, operation: str, **fields: Any) -> Any:
    """Calls an operation; fields that are not given are 0."""
    names = _FIELDS[operation].split()
    assert fields.keys() <= set(names), fields.keys() - set(names)
    return getattr(kernels, operation)({name: fields.get(name, 0) for name in names})


def weight_of(kernels: Any, **fields: int) -> Any:
    """A Weight of the extension; fields that are not given are 0."""
    return kernels.Weight({name: fields.get(name, 0) for name in _WEIGHT.split()})
