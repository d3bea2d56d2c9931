"""One layer: bitsandbytes' Linear4bit to QLinear, and back. The weight's bits are shared, not copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...formats.bitsandbytes import from_bitsandbytes_state, quant_type, to_bitsandbytes_state
from ...formats.nf4 import NF4Weight
from ...layers.adapters.config import AdapterConfig
from ...layers.qlinear import QLinear

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

_ROWS = 32  # rows that bitsandbytes' layout for CPUs interleaves


def linear4bit() -> type[Linear4bit]:
    """The class, imported when it is needed.

    Raises:
        ImportError: when bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError:
        raise ImportError("this needs the package 'bitsandbytes': pip install bitsandbytes") from None
    return Linear4bit


def read_weight(layer: Linear4bit, name: str) -> NF4Weight:
    """The weight of a layer of bitsandbytes, which is not changed.

    Raises:
        ValueError: when it cannot be represented, or is not quantized yet; the sentence names the layer.
    """
    kind = type(layer)
    if kind.forward is not linear4bit().forward or "forward" in layer.__dict__:
        raise ValueError(
            f"{name} computes something else than bitsandbytes' Linear4bit: {kind.__module__}.{kind.__qualname__} has "
            "a forward of its own, or a library (accelerate's offload and device_map, say) has replaced it; load the "
            "model on one device, without offload"
        )
    if "parametrizations" in layer._modules:
        raise ValueError(f"{name} has parametrizations; call torch.nn.utils.parametrize.remove_parametrizations first")
    weight: Any = layer.weight
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device or offloaded, and has no data; load the model without offload")
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        raise ValueError(
            f"{name} is not quantized yet: bitsandbytes does that when the layer moves to a device; call .to(device) "
            "first"
        )
    codes = _plain(weight)
    if getattr(state, "packing_format_for_cpu", False):
        read = _from_cpu_layout(codes, state, name)
    else:
        tensors = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        try:
            read = from_bitsandbytes_state(tensors)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
    if read.shape != (layer.out_features, layer.in_features):
        found, expected = list(read.shape), [layer.out_features, layer.in_features]
        raise ValueError(f"{name} has a weight of the shape {found}, but its features say {expected}")
    return read


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


def _from_cpu_layout(codes: Tensor, state: Any, name: str) -> NF4Weight:
    """What a layer holds after a forward pass in eval mode on a CPU with AVX512-BF16.

    bitsandbytes then lays out the codes in another order, and rounds the constants to bfloat16, for good: the layer
    computes with these from then on.

    Codes: of 32 rows and two columns each 64 codes, row by row; the first 32 lie in the low nibbles of 32 bytes, the
    others in the high ones. Constants: [K/blocksize, N].
    """
    n, k = state.shape
    if codes.dtype != torch.uint8 or codes.numel() * 2 != n * k or n % _ROWS or k % 2:
        raise ValueError(f"{name} has codes {codes.dtype} {list(codes.shape)} for a weight {[n, k]}, which do not fit")
    groups = codes.reshape(n // _ROWS, k // 2, _ROWS)
    each = torch.cat([groups & 15, groups >> 4], dim=-1).view(n // _ROWS, k // 2, _ROWS, 2)
    pairs = each.transpose(1, 2).reshape(-1, 2)
    plain = type(state)(
        absmax=state.absmax.t().float().reshape(-1),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=getattr(state, "original_dtype", state.dtype),
    )
    tensors = {"weight": pairs[:, 0] << 4 | pairs[:, 1]}
    tensors |= {f"weight.{key}": value for key, value in plain.as_dict(packed=True).items()}
    try:
        return from_bitsandbytes_state(tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None


def to_qlinear(
    layer: Linear4bit,
    name: str,
    adapter: AdapterConfig,
    compute_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> QLinear:
    """A QLinear with the weight of a Linear4bit, and the same bias: the same Parameter, unless its dtype changes.

    Raises:
        ValueError: when the weight cannot be represented here; the sentence names the layer.
    """
    weight = read_weight(layer, name)
    made = QLinear.from_nf4(
        weight,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
    )
    made.register_parameter("bias", _cast(layer.bias, compute_dtype))
    source: Any = getattr(layer, "source_cls", None)  # of which class the layer was in the dense model
    made.fan_in_fan_out = getattr(source, "__name__", "") == "Conv1D" or getattr(layer, "fan_in_fan_out", False)
    return made.train(layer.training)


def _cast(bias: nn.Parameter | None, dtype: torch.dtype | None) -> nn.Parameter | None:
    if bias is None or dtype is None or bias.dtype == dtype:
        return bias
    return nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)


def to_linear4bit(layer: QLinear, name: str, compute_dtype: torch.dtype | None = None) -> Linear4bit:
    """A Linear4bit with the weight of a QLinear and the same bias; adapters are left out.

    Raises:
        ValueError: for a layer without data, whose tensors are distributed, or that stands for float64.
    """
    if "_hf_hook" in layer.__dict__:
        raise ValueError(
            f"{name} has a hook of accelerate (offload or device_map), which would be lost; call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    weight = layer.weight
    for piece in weight.pieces:
        if piece is not None and (piece.is_meta or type(piece) not in (Tensor, nn.Parameter)):
            found = "on the meta device" if piece.is_meta else f"a {type(piece).__name__}"
            raise ValueError(f"{name}: its weight is {found}; bitsandbytes' layers hold plain tensors with data")
    try:
        state = {key.removeprefix("weight."): value for key, value in to_bitsandbytes_state(weight).items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}; call .to() with one of these first") from None
    from bitsandbytes.nn.modules import Params4bit

    n, k = weight.shape
    made: Any = linear4bit()(
        k,
        n,
        layer.bias is not None,
        layer.dtype if compute_dtype is None else compute_dtype,
        compress_statistics=weight.double_quant,
        quant_type=quant_type(weight),
        device="meta",
    )
    codes = _plain(state.pop("weight"))
    stats = {key: _plain(value) for key, value in state.items()}
    device = cast(Any, weight.device)
    made.weight = Params4bit.from_prequantized(codes, stats, requires_grad=False, device=device, module=made)
    made.register_parameter("bias", layer.bias)
    # transformers looks at it where it quantizes or writes a layer that took another's place.
    made.source_cls = nn.Linear
    made.fan_in_fan_out = layer.fan_in_fan_out
    return made.train(layer.training)
