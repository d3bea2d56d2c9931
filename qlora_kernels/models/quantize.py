"""Whole models: swap their linear layers for 4-bit ones, and handle the adapters of all layers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..console.progress import bar
from ..errors import sentence
from ..layers.adapters.config import AdapterConfig
from ..layers.qlinear import QLinear
from ..ops import backends
from .targets import candidates, check_patterns, qlora_layers, targets

# What nn.Module keeps of hooks on forward and backward; they go with the place in the model, not with the weight.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


# Double quantization moves a constant by half a step of its table at most, relative to the largest constant: the two
# largest entries of FP8 E4M3 are 1/14 of the largest apart.
_NESTED_ERROR = 1 + 1 / 28


@dataclass
class QuantizeReport:
    """What :func:`quantize_model` did.

    Attributes:
        quantized: names of the layers that are 4-bit now.
        adapted: those of them that have an adapter.
        left_alone: linear-like layers that were not touched, with the reason.
        bytes_before: bytes of all parameters and buffers of the dense model.
        bytes_after: those of the quantized one.
        trainable_parameters: elements that get gradients, which are the adapters'.
        total_parameters: elements of all parameters, a 4-bit weight counting as N * K.
    """

    quantized: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines = [
            f"{len(self.quantized)} linear layers quantized to NF4, {len(self.adapted)} of them with an adapter",
            f"{self.bytes_before / 2**20:.1f} MiB before, {self.bytes_after / 2**20:.1f} MiB after",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters trainable ({share:.2f}%)",
        ]
        if self.left_alone:
            lines.append("left alone:")
            lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    skip: str | Sequence[str] = ("lm_head",),
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
) -> QuantizeReport:
    """Swaps a model's nn.Linear layers for QLinear, in place, and freezes everything but the adapters.

    Layers are swapped one at a time, so the peak of memory is the model plus one layer, as long as nobody else holds
    the dense weights. All conditions are checked before the first layer is touched. Should memory run out later, or
    Ctrl-C come, then each layer is wholly quantized or as it was (the dense weights of the former are gone, so there
    is no way back), and a second call with the same arguments goes on with the rest.

    Args:
        model: any module with nn.Linear layers inside.
        rank, alpha, dropout, rslora, double_quant: as for :class:`QLinear`; rank 0 makes no adapters.
        target_modules: which layers get an adapter, as in PEFT: "all-linear", names (a full name, or its last
            components) or a regular expression for the full name. The other layers are quantized all the same.
        skip: layers to leave dense, by names or by a regular expression, likewise.
        adapter_dtype: dtype of the adapters, by default that of each layer; float32 keeps master copies.
        compute_dtype: dtype of bias and adapters, by default that of each dense weight.
        progress: show a bar, when tqdm is installed.
        device: where to quantize, and where the whole model is at the end; by default each layer stays where it is.

    Returns:
        What was quantized, what was left alone and why, and sizes before and after.

    Raises:
        ValueError: when the model is itself a linear layer, has nothing to quantize, holds NaN or infinity in a weight,
            or a value so near the largest of its type that double quantization could round it to infinity, when a
            pattern matches nothing (the candidates are listed), a module is lazy, or a rank, alpha or dropout does not
            fit. The model is as it was.
        TypeError: for a dtype that bias or adapters cannot have. The model is as it was.
        RuntimeError: when there are no kernels for a device (the model is as it was), or when something else failed
            after the first layer; the message says which layers are 4-bit already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, found {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear layer, which has no place to swap it in; use QLinear.from_linear"
        )
    config = AdapterConfig(rank, alpha, dropout, rslora)
    config.check(sys.maxsize, sys.maxsize)
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet (a lazy module); run a batch through the model first")
    for argument, patterns in (("skip", skip), ("target_modules", target_modules)):
        check_patterns(argument, patterns)
    if device is not None:
        backends.backend_for(torch.empty(0, device=device))
    # A layer without memory, for what it says of the dtypes.
    QLinear(1, 1, rank=0, adapter_dtype=adapter_dtype, device="meta", dtype=compute_dtype)
    names, left_alone = candidates(model, skip)
    earlier = [name for name, layer in qlora_layers(model) if layer.adapters]
    adapted = targets(names, earlier, left_alone, target_modules) if names else []
    if not names:
        found = "; ".join(f"{name}: {reason}" for name, reason in left_alone.items()) or "none"
        raise ValueError(f"the model has no nn.Linear to quantize; linear-like layers left alone: {found}")
    if not rank:
        adapted = []
    wanted = set(adapted)
    for name in names:
        _check_layer(model, name, config if name in wanted else None, double_quant, device is None)

    report = QuantizeReport(names, adapted, left_alone, bytes_before=_bytes(model))
    places = _places(model)
    for done, name in enumerate(bar(names, show=progress, desc="quantizing", unit="layer")):
        try:
            _swap(
                places[name],
                rank=rank if name in wanted else 0,
                alpha=alpha,
                dropout=dropout,
                rslora=rslora,
                double_quant=double_quant,
                dtype=compute_dtype,
                adapter_dtype=adapter_dtype,
                name=f"{name}.weight",
                device=device,
            )
        except Exception as error:
            if not done:
                raise
            raise RuntimeError(
                f"quantize_model stopped at {name} ({type(error).__name__}: {sentence(error)}); {done} of {len(names)} "
                f"layers are 4-bit now, and the others as they were: pass the model to quantize_model again, with the "
                f"same arguments, to go on with them. 4-bit: {', '.join(names[:done])}"
            ) from error
    model.requires_grad_(False)
    for _, layer in qlora_layers(model):
        if layer.active_adapter is not None:
            layer.lora_A[layer.active_adapter].requires_grad_(True)
            layer.lora_B[layer.active_adapter].requires_grad_(True)
    if device is not None:
        try:
            model.to(device)
        except Exception as error:
            raise RuntimeError(
                f"all {len(names)} layers are 4-bit now, but the rest of the model could not be moved to {device} "
                f"({type(error).__name__}: {sentence(error)}); call model.to({str(device)!r}) to go on"
            ) from error
    report.bytes_after = _bytes(model)
    report.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.total_parameters = _count(model)
    return report


def _check_layer(model: nn.Module, name: str, config: AdapterConfig | None, double_quant: bool, stays: bool) -> None:
    weight = model.get_submodule(name).weight.detach()
    if stays:
        backends.backend_for(weight)
    if config is not None:
        config.check(*weight.shape, name)
    if weight.is_meta:
        return
    # The extremes show NaN and infinity in one pass, with no copy of the weight.
    extremes = torch.stack(torch.aminmax(weight)).abs().double()
    if torch.isfinite(extremes).all():
        largest, limit = extremes.max().item(), torch.finfo(weight.dtype).max
        if double_quant and largest * _NESTED_ERROR > limit:
            raise ValueError(
                f"{name}.weight holds {largest:.5g}, so near the largest {weight.dtype}, {limit:.5g}, that double "
                "quantization could round it to infinity; use double_quant=False. The model is as it was."
            )
        return
    index = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
    raise ValueError(
        f"{name}.weight holds {weight[index].item()} at index {index}; only finite weights can be quantized. "
        "The model is as it was."
    )


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each linear layer's first name, all (parent, key) that hold it: a module may be in several places."""
    first = {id(module): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if id(child) in first:
                places.setdefault(first[id(child)], []).append((parent, key))
    return places


def _swap(places: list[tuple[nn.Module, str]], device: str | torch.device | None, **options) -> None:
    """Replaces one layer everywhere it stands; the dense weight is free when this returns."""
    parent, key = places[0]
    linear = parent._modules[key]
    if device is not None:
        linear.to(device)
    layer = QLinear.from_linear(linear, **options)
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(linear, hooks))
    for parent, key in places:
        parent._modules[key] = layer


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _count(model: nn.Module) -> int:
    packed = {id(p) for _, layer in qlora_layers(model) for p in layer._frozen()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return dense + sum(layer.in_features * layer.out_features for _, layer in qlora_layers(model))
