"""quantize_model: swaps a model's linear layers for 4-bit ones with adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..console.progress import bar
from ..errors import listed, peft_names, sentence
from ..layers.adapters.config import AdapterConfig
from ..layers.packed import frozen_tensors
from ..layers.qlinear import QLinear
from ..native.heap import freed
from ..ops import backends
from .dense_layers import as_linear, is_conv1d, is_linear_like
from .experts import adapted_layers, experts_layers, stacked_weights, swap_experts
from .heads import DEFAULT_SKIP
from .places import Places, places_of, put
from .targets import Plan, plan

# Double quantization moves a constant by half a step of its table at most, relative to the largest constant: the two
# largest entries of FP8 E4M3 are 1/14 of the largest apart.
_NESTED_ERROR = 1 + 1 / 28


#: Called with each model whose layers have become 4-bit, such as to note it where other libraries look.
after_quantizing: list[Callable[[nn.Module], None]] = []


@dataclass
class QuantizeReport:
    """What :func:`quantize_model` did.

    Attributes:
        quantized: names of the layers that are 4-bit now.
        adapted: those of them that have an adapter.
        experts: names of a mixture's weights, all experts in one parameter, that are 4-bit now.
        adapted_experts: those of them that have an adapter for each expert.
        left_alone: linear-like layers that were not touched, with the reason; the printed report names ten.
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
    experts: list[str] = field(default_factory=list)
    adapted_experts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines = [
            f"{len(self.quantized)} linear layers quantized to NF4, {len(self.adapted)} of them with an adapter",
            f"{self.bytes_before / 2**20:.1f} MiB before, {self.bytes_after / 2**20:.1f} MiB after",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters trainable ({share:.2f}%)",
        ]
        if self.experts:
            lines.insert(
                1,
                f"{len(self.experts)} stacks of experts quantized to NF4, {len(self.adapted_experts)} of them with "
                "adapters",
            )
        if self.left_alone:
            lines.append("left alone:")
            lines.append(listed((f"  {name}: {reason}" for name, reason in self.left_alone.items()), separator="\n"))
        return "\n".join(lines)


@peft_names
def quantize_model(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    skip: str | Sequence[str] = DEFAULT_SKIP,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
    target_parameters: Sequence[str] = (),
) -> QuantizeReport:
    """Swaps a model's linear layers for QLinear, in place, and freezes everything but the adapters and new heads.

    Linear layers are nn.Linear, and transformers' Conv1D (GPT-2). A head that a task adds to a pretrained trunk, such
    as a classifier, stays dense and is trained. A mixture's experts that lie in three-dimensional parameters, as in the
    modules of transformers 5, become :class:`QExperts`; other parameters of this kind are reported.

    Layers are swapped one at a time, so memory peaks at the model plus one layer, unless something else holds on to the
    dense weights. Everything is checked before the first layer is touched. If memory runs out later, or on Ctrl-C,
    each layer is either quantized or untouched (the dense weights of the quantized ones are gone, so there is no way
    back), and a second call with the same arguments quantizes the rest.

    Args:
        model: any module with nn.Linear layers inside.
        rank, alpha, dropout, rslora, double_quant: as for :class:`QLinear`; rank 0 makes no adapters.
        target_modules: which layers get an adapter, as in PEFT: "all-linear", names (a full name, or its last
            components) or a regular expression for the full name. The other layers are quantized all the same. Back
            references and other features that take unbounded time to match are refused.
        skip: layers to leave dense, also by names or by a regular expression. The name of a module in a list stands
            for all layers in it. By default the output embeddings of a model of transformers and the heads on top of
            its trunk stay dense as well.
        adapter_dtype: dtype of the adapters, by default that of each layer; float32 keeps master copies.
        compute_dtype: dtype of bias and adapters, by default that of each dense weight.
        progress: show a bar, when tqdm is installed.
        device: where to quantize and to leave the whole model; by default each layer stays where it is.
        target_parameters: weights of experts that get an adapter for each expert, names as in ``target_modules``, for
            instance ["gate_up_proj", "down_proj"]; none by default, as in PEFT. Such adapters have no dropout.

    Returns:
        What was quantized, what was left alone and why, and sizes before and after.

    Raises:
        ValueError: when the model is itself a linear layer, has nothing to quantize, holds NaN or infinity in a weight,
            or a value so near the largest of its type that double quantization could round it to infinity, when a
            pattern matches nothing (the candidates are listed), a module is lazy, or a rank, alpha or dropout does not
            fit. The model is unchanged.
        TypeError: for a dtype that bias or adapters cannot have, and for PEFT's argument names. The model is unchanged.
        RuntimeError: when there are no kernels for a device (the model is unchanged), or when something else failed
            after the first layer; the message says which layers are already 4-bit.
    """
    adapter = AdapterConfig(rank, alpha, dropout, rslora)
    dtypes = (adapter_dtype, compute_dtype)
    planned = plan(model, adapter, target_modules, skip, double_quant, *dtypes, target_parameters, experts=True)
    _check_weights(model, planned, device)
    bytes_before = bytes_of(model)
    swap_layers(model, planned, device, progress)
    choose_what_is_trained(model, planned)
    if device is not None:
        _move(model, device, len(planned.quantized))
    for note in after_quantizing:
        note(model)
    return report(model, planned, bytes_before)


def swap_layers(
    model: nn.Module,
    planned: Plan,
    device: str | torch.device | None = None,
    progress: bool = False,
    found: Mapping[str, Places] | None = None,
) -> None:
    """Replaces the planned layers by QLinear, one at a time.

    Args:
        found: where the layers are, for callers who replace them one by one.

    Raises:
        RuntimeError: when one fails after others were replaced; an error at the first layer is raised unchanged.
    """
    adapted, adapter = set(planned.adapted), planned.adapter
    places = places_of(model, is_linear_like) if found is None else found
    _swap_all_experts(model, planned, device)
    for done, name in enumerate(bar(planned.quantized, show=progress, desc="quantizing", unit="layer")):
        try:
            _swap(
                places[name],
                rank=adapter.rank if name in adapted else 0,
                alpha=adapter.alpha,
                dropout=adapter.dropout,
                rslora=adapter.rslora,
                double_quant=planned.double_quant,
                dtype=planned.compute_dtype,
                adapter_dtype=planned.adapter_dtype,
                name=f"{name}.weight",
                device=device,
            )
        except Exception as error:
            if not done:
                raise
            raise RuntimeError(
                f"quantize_model stopped at {name} ({type(error).__name__}: {sentence(error)}); {done} of "
                f"{len(planned.quantized)} layers are 4-bit now, and the others unchanged: pass the model to "
                f"quantize_model again, with the same arguments, to go on with them. 4-bit: "
                f"{listed(planned.quantized[:done])}"
            ) from error


def _swap_all_experts(model: nn.Module, planned: Plan, device: str | torch.device | None) -> None:
    places = places_of(model, lambda module: bool(stacked_weights(module)))
    options = (planned.double_quant, planned.adapter_dtype, planned.compute_dtype, device)
    for name in planned.experts:
        swap_experts(places[name], name, set(planned.adapted_experts), planned.adapter, *options)


def choose_what_is_trained(model: nn.Module, planned: Plan) -> None:
    """The adapters, and new heads."""
    model.requires_grad_(False)
    for name in planned.trained:
        model.get_submodule(name).requires_grad_(True)
    for _, layer in adapted_layers(model):
        if layer.active_adapter is not None:
            layer.lora_A[layer.active_adapter].requires_grad_(True)
            layer.lora_B[layer.active_adapter].requires_grad_(True)


def _move(model: nn.Module, device: str | torch.device, layers: int) -> None:
    try:
        model.to(device)
    except Exception as error:
        raise RuntimeError(
            f"all {layers} layers are 4-bit now, but the rest of the model could not be moved to {device} "
            f"({type(error).__name__}: {sentence(error)}); call model.to({str(device)!r}) to go on"
        ) from error


def _check_weights(model: nn.Module, planned: Plan, device: str | torch.device | None) -> None:
    """Checks that every planned weight can be quantized, on ``device`` or where it is; changes nothing."""
    if device is not None:
        backends.backend_for(torch.empty(0, device=device))
    names = [f"{name}.weight" for name in planned.quantized]
    for name in planned.experts:
        names += [f"{name}.{weight}" for weight in stacked_weights(model.get_submodule(name))]
    for name in names:
        _check_weight(model, name, planned.double_quant, check_device=device is None)


def _check_weight(model: nn.Module, name: str, double_quant: bool, check_device: bool) -> None:
    """Checks that a weight can be quantized: kernels for its device, and finite values."""
    weight = model.get_parameter(name).detach()
    if check_device:
        backends.backend_for(weight)
    if weight.is_meta:
        return
    # The extremes show NaN and infinity in one pass, with no copy of the weight.
    extremes = torch.stack(torch.aminmax(weight)).abs().double()
    if torch.isfinite(extremes).all():
        largest, limit = extremes.max().item(), torch.finfo(weight.dtype).max
        if double_quant and largest * _NESTED_ERROR > limit:
            raise ValueError(
                f"{name} holds {largest:.5g}, so near the largest {weight.dtype}, {limit:.5g}, that double "
                "quantization could round it to infinity; use double_quant=False. The model is unchanged."
            )
        return
    index = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
    raise ValueError(
        f"{name} holds {weight[index].item()} at index {index}; only finite weights can be quantized. "
        "The model is unchanged."
    )


def _swap(places: Places, device: str | torch.device | None, **options) -> None:
    """Replaces one layer in all its places; the dense weight is free when this returns."""
    parent, key = places[0]
    dense = parent._modules[key]
    assert dense is not None  # places_of lists modules
    if device is not None:
        dense.to(device)
    layer = QLinear.from_linear(as_linear(dense), **options)
    layer.fan_in_fan_out = is_conv1d(dense)
    put(layer, places)
    weight = dense.get_parameter("weight")
    size = weight.nbytes if weight.device.type == "cpu" else 0
    del dense, weight
    freed(size)


def report(model: nn.Module, planned: Plan, bytes_before: int) -> QuantizeReport:
    return QuantizeReport(
        quantized=list(planned.quantized),
        adapted=list(planned.adapted),
        left_alone=dict(planned.left_alone),
        bytes_before=bytes_before,
        bytes_after=bytes_of(model),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=count_parameters(model),
        experts=[name for name, _ in experts_layers(model)],
        adapted_experts=list(planned.adapted_experts),
    )


def bytes_of(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, a 4-bit weight counting as N * K."""
    packed = {id(p) for _, layer in adapted_layers(model) for p in frozen_tensors(layer)}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return dense + sum(layer.weight.numel() for _, layer in adapted_layers(model))
