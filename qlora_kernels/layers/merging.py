"""Folding an adapter into a 4-bit base and taking it out again, a panel of rows at a time."""

# Uses private attributes of layers.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.nf4 import BLOCK_SIZE, NF4Weight
from ..ops import dispatcher
from .adapters.named import Adapters
from .functional import linear
from .offloading import is_offloaded, offloaded

_PANEL = 1 << 20  # elements of a panel: 4 MiB of float32, large enough that the cost of a call does not show


@dataclass(frozen=True)
class MergeReport:
    """How far requantization moved a layer, relative to the base plus adapter in float32.

    Attributes:
        weight_error: ||W' - W|| / ||W||, Frobenius, W' the requantized weight, W the exact merged one.
        output_error: the same for the outputs on the probe batch (without bias), or None without one.
    """

    weight_error: float
    output_error: float | None = None


def panels(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cover [0, n), each starting on a block of 64: they can be quantized one by one."""
    aligned = BLOCK_SIZE // math.gcd(k, BLOCK_SIZE)
    step = max(_PANEL // (k * aligned), 1) * aligned
    for begin in range(0, n, step):
        yield begin, min(begin + step, n)


def _rows(layer: Adapters, weight: NF4Weight, adapter: str | None, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows of weight + scaling * B A."""
    rows = weight.dequantize(dtype, row_begin=begin, row_end=end)
    if adapter is not None:
        A, B = layer.lora_A[adapter].to(dtype), layer.lora_B[adapter][begin:end].to(dtype)
        rows.addmm_(B, A, alpha=layer.adapters[adapter].scaling)
    return rows


@torch.no_grad()
def merge(layer: Adapters, probe: Tensor | None) -> MergeReport:
    """See :meth:`QLinear.merge`."""
    if layer.merged_adapter_name is not None:
        raise RuntimeError(f"adapter '{layer.merged_adapter_name}' is merged already; call unmerge() first")
    name = layer.active_adapter
    if name is None:
        raise RuntimeError("there is no active adapter to merge")
    if layer._disabled:
        raise RuntimeError("adapters are disabled; merge outside disable_adapters()")
    if is_offloaded(layer):
        raise RuntimeError(
            "accelerate keeps the layer's weight elsewhere between calls, and a merge would be lost; merge before "
            "dispatching or offloading the model"
        )
    if layer.weight_packed.is_meta or layer.lora_A[name].is_meta or layer.lora_B[name].is_meta:
        raise RuntimeError("the layer is on the meta device and has no data to merge; load its state dict first")
    for kind, matrix in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
        dispatcher.require_memory(kind, matrix)
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{kind} of adapter '{name}' holds NaN or infinity and cannot be merged")

    before = layer.weight
    after = requantize(
        before, lambda begin, end: _rows(layer, before, name, begin, end, torch.float32), "the merged weight"
    )
    report = MergeReport(
        _weight_error(layer, before, after, name),
        None if probe is None else _output_error(layer, before, after, name, probe),
    )
    layer._set_pieces("unmerged", before)
    layer._set_pieces("weight", after)
    layer._set_merged(name)
    return report


def unmerge(layer: Adapters) -> None:
    """See :meth:`QLinear.unmerge`."""
    if layer.merged_adapter_name is None:
        raise RuntimeError("no adapter is merged")
    layer._set_pieces("weight", layer._unmerged_weight())
    layer._set_pieces("unmerged", None)
    layer._set_merged(None)


@torch.no_grad()
def to_linear(layer: Adapters) -> nn.Linear:
    """See :meth:`QLinear.to_linear`."""
    with offloaded(layer, layer.lora_A, layer.lora_B):
        return _to_linear(layer)


def _to_linear(layer: Adapters) -> nn.Linear:
    dispatcher.require_memory("bias", layer.bias)
    n, k = layer.out_features, layer.in_features
    adapter = None if layer.merged_adapter_name is not None or layer._disabled else layer.active_adapter
    weight = layer.weight
    dense = nn.Linear(k, n, bias=layer.bias is not None, device="meta", dtype=layer.dtype)
    dense.to_empty(device=weight.device)
    compute = torch.float64 if layer.dtype == torch.float64 else torch.float32
    for begin, end in panels(n, k):
        dense.weight[begin:end] = _rows(layer, weight, adapter, begin, end, compute)
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
    return dense.train(layer.training)


def dense_layer(weight: NF4Weight, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear in float32 on copies of a weight and a bias, to compute with."""
    n, k = weight.shape
    dense = nn.Linear(k, n, bias=bias is not None, device="meta").requires_grad_(False)
    dense.weight = nn.Parameter(weight.dequantize(torch.float32), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), requires_grad=False)
    return dense


def requantize(before: NF4Weight, rows: Callable[[int, int], Tensor], name: str) -> NF4Weight:
    """A weight in NF4 from its rows [begin, end) in float32, with the shape, dtype and second level of another.

    The second level needs all constants at once, the first only a panel of the weight.

    Raises:
        ValueError: for NaN or infinity; ``name`` is what the message calls the weight.
    """
    n, k = before.shape
    packed = torch.empty_like(before.packed)
    absmax = torch.empty(before.absmax.numel(), dtype=torch.float32, device=before.device)
    for begin, end in panels(n, k):
        codes, constants = ops.quantize(rows(begin, end), name)
        packed[begin * k // 2 :][: codes.numel()] = codes
        absmax[begin * k // BLOCK_SIZE :][: constants.numel()] = constants
    ops.check_finite(absmax, absmax, name)
    if before.nested_absmax is None or before.nested_table is None:
        return NF4Weight(packed, absmax, None, None, None, before.shape, before.dtype)
    table = before.nested_table[:256]  # without the levels that the base may have: what is new is NF4
    codes, nested_absmax, nested_offset = ops.quantize_absmax(absmax, table)
    return NF4Weight(packed, codes, nested_absmax, nested_offset, table, before.shape, before.dtype)


def _weight_error(layer: Adapters, before: NF4Weight, after: NF4Weight, name: str) -> float:
    moved = total = 0.0
    for begin, end in panels(*before.shape):
        exact = _rows(layer, before, name, begin, end, torch.float32)
        total += exact.double().square().sum().item()
        exact -= after.dequantize(torch.float32, row_begin=begin, row_end=end)
        moved += exact.double().square().sum().item()
    return _ratio(moved, total)


def _output_error(layer: Adapters, before: NF4Weight, after: NF4Weight, name: str, probe: Tensor) -> float:
    # In float32, so that the rounding of a 16-bit output does not count as requantization.
    x = probe.detach().to(device=before.device, dtype=torch.float32)
    A, B = layer.lora_A[name].float(), layer.lora_B[name].float()
    with torch.autocast(x.device.type, enabled=False):
        exact = linear(x, before, None, A, B, scaling=layer.adapters[name].scaling)
        moved = linear(x, after) - exact
    return _ratio(moved.double().square().sum().item(), exact.double().square().sum().item())


def _ratio(moved: float, total: float) -> float:
    """sqrt(moved / total), 0 where nothing moved (a weight of zeros, an empty probe)."""
    return math.sqrt(moved / total) if total else math.inf if moved else 0.0
