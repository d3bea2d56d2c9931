"""Which layers of a model to quantize and which to adapt: PEFT's patterns, tied parameters, kinds of layers."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import listed
from ..layers.adapters.config import AdapterConfig
from ..layers.experts import QExperts
from ..layers.qlinear import QLinear
from .dense_layers import is_conv1d, is_linear_like, matrix_shape
from .experts import stacked_weights, weight_stack
from .expressions import Steps, ends, expression
from .heads import DEFAULT_SKIP, heads, new_heads

_QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """What quantizing a model will do to each of its layers.

    Attributes:
        quantized: names of the layers that become 4-bit.
        adapted: those of them that get an adapter.
        left_alone: linear-like layers that stay unchanged, with the reason.
        experts: names of modules of experts whose three-dimensional weights become 4-bit.
        adapted_experts: names of those weights that get adapters.
        trained: modules that stay dense and are trained with the adapters: new heads.
        adapter: the adapters' configuration; rank 0 for none.
        double_quant: 4.127 bits per weight rather than 4.5.
        adapter_dtype: dtype of the adapters; None for that of their layer.
        compute_dtype: dtype of bias and adapters; None for that of the dense weight.
    """

    quantized: tuple[str, ...]
    adapted: tuple[str, ...]
    left_alone: Mapping[str, str]
    adapter: AdapterConfig
    double_quant: bool = True
    adapter_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    trained: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    adapted_experts: tuple[str, ...] = ()


def plan(
    model: nn.Module,
    adapter: AdapterConfig,
    target_modules: str | Sequence[str] = "all-linear",
    skip: str | Sequence[str] = DEFAULT_SKIP,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    target_parameters: Sequence[str] = (),
    experts: bool | Sequence[str] = False,
) -> Plan:
    """Decides what :func:`qlora_kernels.quantize_model` would do, from names and shapes alone.

    No weight is read, so the model may be on the meta device. The arguments are those of quantize_model, and whether to
    quantize experts too, as it does, or which modules of them.

    Raises:
        ValueError, TypeError: as quantize_model, but for what weights hold.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, found {type(model).__name__}")
    if is_linear_like(model):
        raise ValueError(
            "the model is itself a linear layer, which has no place to swap it in; use QLinear.from_linear"
        )
    adapter.check(sys.maxsize, sys.maxsize)
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet (a lazy module); run a batch through the model first")
    skip, target_modules = checked_patterns("skip", skip), checked_patterns("target_modules", target_modules)
    target_parameters = checked_names("target_parameters", target_parameters)
    # The constructor checks the dtypes; on meta it allocates nothing.
    QLinear(1, 1, rank=0, adapter_dtype=adapter_dtype, device="meta", dtype=compute_dtype)
    _check_skip(model, skip)
    dense = heads(model) if skip == DEFAULT_SKIP else {}
    trained = tuple(new_heads(model)) if adapter.rank and skip == DEFAULT_SKIP else ()
    dense |= {name: f"{dense[name]}, trained with the adapters" for name in trained if name in dense}
    quantized, left_alone = _candidates(model, skip, dense)
    stacks = _expert_stacks(model, skip, left_alone, None if experts is True else experts) if experts else {}
    if not quantized and not stacks:
        others = listed((f"{name}: {reason}" for name, reason in left_alone.items()), separator="; ") or "none"
        raise ValueError(f"the model has no nn.Linear to quantize; linear-like layers left alone: {others}")
    with_adapters = [name for name, layer in qlora_layers(model) if layer.adapters]
    adapted = _adapted(quantized, with_adapters, left_alone, target_modules)
    if not adapter.rank:
        adapted = []
    for name in adapted:
        n, k = matrix_shape(model.get_submodule(name))
        adapter.check(n, k, name)
    return Plan(
        tuple(quantized),
        tuple(adapted),
        left_alone,
        adapter,
        double_quant,
        adapter_dtype,
        compute_dtype,
        trained,
        tuple(stacks),
        _adapted_experts(model, stacks, adapter, target_parameters),
    )


def qlora_layers(model: nn.Module) -> Iterator[tuple[str, QLinear]]:
    """(name, layer) of every QLinear in a model, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            yield name, module


def not_quantized(model: nn.Module) -> list[str]:
    """Names of the linear-like layers, and of the stacks of them, that are not 4-bit."""
    names, left_alone = _candidates(model, (), {})
    four_bit = dict(qlora_layers(model))
    return [name for name in (*names, *left_alone) if name not in four_bit]


def matches(name: str, patterns: str | Iterable[str], steps: Steps | None = None) -> bool:
    """PEFT's rule: a string is a regular expression for the full name, a list holds full names or their ends.

    Raises:
        ValueError: for an expression that is not one, or takes too long to match.
    """
    if isinstance(patterns, str):
        return expression(patterns).matches(name, steps=steps)
    return not {name[end:] for end in ends(name)}.isdisjoint(patterns)


def adapted_among(names: Sequence[str], target_modules: str | Sequence[str]) -> list[str]:
    """Which of ``names`` get an adapter; ``target_modules`` as for :func:`qlora_kernels.quantize_model`.

    Raises:
        ValueError: when a pattern matches none, or is not one.
        TypeError: for patterns that are neither a string nor a list of strings.
    """
    return _adapted(list(names), [], {}, checked_patterns("target_modules", target_modules))


def checked_patterns(argument: str, patterns: str | Sequence[str]) -> str | Sequence[str]:
    """Patterns as they are; what can be gone through only once as a list.

    Raises:
        ValueError: for an expression that is not one.
        TypeError: for something else than a string and strings.
    """
    if not isinstance(patterns, str):
        return checked_names(argument, patterns, "a regular expression or a list of names")
    try:
        expression(patterns)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    return patterns


def checked_names(argument: str, names: Sequence[str], expected: str = "a list of names") -> Sequence[str]:
    """The same for names alone.

    Raises:
        TypeError: for something else than strings.
    """
    several = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else None
    if several is None or not all(isinstance(name, str) for name in several):
        raise TypeError(f"{argument} should be {expected}, found {names!r:.200}")
    return names if isinstance(names, Sequence) else several


def _check_skip(model: nn.Module, skip: str | Sequence[str]) -> None:
    """
    Raises:
        ValueError: for a pattern that matches nothing in the model: a typo would quantize what should stay dense.
            "lm_head", which is there by default, may be missing.
    """
    names = dict.fromkeys(name for name, _ in (*model.named_modules(), *model.named_parameters()))
    patterns = [skip] if isinstance(skip, str) else [[pattern] for pattern in skip]
    for pattern in patterns:
        if pattern in ("lm_head", ["lm_head"]):
            continue
        if not any(matches(name, pattern) for name in names):
            text = pattern if isinstance(pattern, str) else pattern[0]
            linear = _ends([name for name, module in model.named_modules() if is_linear_like(module)])
            close = difflib.get_close_matches(text, linear, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"skip: {text!r} matches nothing in the model; {hint}linear layers: {listed(linear)}")


def _skipped(name: str, skip: str | Sequence[str]) -> bool:
    """Whether a layer is named in ``skip``, or in a list there one of the modules around it."""
    if matches(name, skip):
        return True
    if isinstance(skip, str):
        return False
    around = [name[: end - 1] for end in ends(name)[1:]]
    # A number alone means a layer: every list of blocks has a "0".
    words = [pattern for pattern in skip if not pattern.isdigit()]
    return any(matches(module, words) for module in around)


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of several layers in one parameter: a mixture's experts, as recent models of transformers have them."""
    adapters: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, QExperts):
            adapters = (*adapters, f"{name}.")
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear)) or (adapters and name.startswith(adapters)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.is_floating_point() and parameter.shape[0] > 1:
                yield (f"{name}.{key}" if name else key), parameter


def _candidates(
    model: nn.Module, skip: str | Sequence[str], dense: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantize, and of linear-like layers to leave alone with the reason.

    Args:
        dense: layers to leave alone, with the reason.
    """
    ties = _ties(model)
    names, left_alone, inside_peft = [], {}, ()
    for name, module in model.named_modules():
        if is_of_peft(module):
            inside_peft = (*inside_peft, f"{name}.")
            left_alone[name] = "a PEFT layer; quantize the model before adding adapters, or use qlora_kernels' own"
        if not is_linear_like(module) or (inside_peft and name.startswith(inside_peft)):
            continue
        reason = dense.get(name) or _reason(name, module, ties, skip)
        if reason is None:
            names.append(name)
        else:
            left_alone[name] = reason
    for name, stack in _stacks(model):
        size = stack.numel() * stack.element_size() / 2**20
        left_alone[name] = f"{stack.shape[0]} matrices in one parameter, such as experts; {size:.1f} MiB stay dense"
    return names, left_alone


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module is a layer that PEFT has wrapped, by a class of PEFT's or by one derived from it."""
    return hasattr(module, "base_layer") and any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _expert_stacks(
    model: nn.Module, skip: str | Sequence[str], left_alone: dict[str, str], only: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """For each module of experts to quantize the names of its weights, which leave ``left_alone``; the others get the
    reason there.

    Args:
        only: the modules that count; None for all.
    """
    ties, found = _ties(model), {}
    for name, module in model.named_modules():
        weights = [f"{name}.{weight}" if name else weight for weight in stacked_weights(module)]
        if not weights or (only is not None and name not in only):
            continue
        reason = next(filter(None, (_stack_reason(weight, model, ties, skip) for weight in weights)), None)
        if reason is None and not name:
            reason = "the model is itself a module of experts, which has no place to swap it in"
        if reason is None:
            found[name] = tuple(weights)
        for weight in weights:
            if reason is None:
                left_alone.pop(weight, None)
            elif weight in left_alone:
                left_alone[weight] = f"{reason}; {left_alone[weight]}"
    return found


def _stack_reason(name: str, model: nn.Module, ties: dict[str, list[str]], skip: str | Sequence[str]) -> str | None:
    """Why the experts of one parameter are left alone, or None."""
    stack = model.get_parameter(name)
    if _skipped(name, skip):
        return "named in skip"
    if stack.dtype not in _QUANTIZABLE:
        return f"weights in {stack.dtype}; float32, bfloat16 and float16 can be quantized"
    return f"tied to {listed(ties[name])}" if name in ties else None


def _adapted_experts(
    model: nn.Module, stacks: Mapping[str, tuple[str, ...]], adapter: AdapterConfig, patterns: Sequence[str]
) -> tuple[str, ...]:
    """Which weights of experts get adapters.

    Raises:
        ValueError: when a pattern matches none of them, or the adapter does not fit.
    """
    names = [weight for weights in stacks.values() for weight in weights]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            others = f"; candidates: {listed(_ends(names))}"
            if not names:
                done = any(isinstance(module, QExperts) for module in model.modules())
                others = "; they are 4-bit already" if done else ", and the model has none that can be 4-bit"
            raise ValueError(f"target_parameters: {pattern!r} matches no weights of experts{others}")
    adapted = tuple(name for name in names if matches(name, patterns)) if adapter.rank else ()
    if adapted and adapter.dropout:
        raise ValueError(f"adapters of experts ({adapted[0]}) have no dropout, found {adapter.dropout}; use dropout=0")
    for name in adapted:
        module, _, weight = name.rpartition(".")
        _, n, k = weight_stack(model.get_submodule(module), weight).shape
        adapter.check(n, k, name)
    return adapted


def _reason(name: str, module: nn.Module, ties: dict[str, list[str]], skip: str | Sequence[str]) -> str | None:
    """Why a linear-like layer is left alone, or None."""
    if _skipped(name, skip):
        return "named in skip"
    if isinstance(module, QLinear):
        return "4-bit already"
    if type(module).__name__ == "Linear4bit":
        return "4-bit already, by bitsandbytes; convert it with from_bitsandbytes"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"unsupported type {type(module).__module__}.{type(module).__qualname__}, not a plain nn.Linear"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm, pruning), not a parameter"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    if weight.dtype not in _QUANTIZABLE:
        return f"a weight in {weight.dtype}; float32, bfloat16 and float16 can be quantized"
    if weight.numel() == 0:
        return f"an empty weight, {list(weight.shape)}"
    for key in ("weight", "bias"):
        if f"{name}.{key}" in ties:
            return f"its {key} is tied to {listed(ties[f'{name}.{key}'])}"
    return None


def _span(parameter: nn.Parameter) -> tuple[str, int, int]:
    """The memory of a parameter: device, first and last address. One without memory overlaps only itself."""
    if parameter.is_meta or not parameter.numel():
        return f"no memory, {id(parameter)}", 0, 1
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    begin = parameter.data_ptr()
    return str(parameter.device), begin, begin + (last + 1) * parameter.element_size()


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter, the others that share memory with it: the same tensor twice, or overlapping views."""
    names, spans = [], []
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.append(f"{name}.{key}" if name else key)
                spans.append(_span(parameter))
    order = sorted(range(len(names)), key=spans.__getitem__)
    ties: dict[str, list[int]] = {}
    for position, first in enumerate(order):
        device, _, end = spans[first]
        for second in order[position + 1 :]:
            if spans[second][0] != device or spans[second][1] >= end:
                break
            ties.setdefault(names[first], []).append(second)
            ties.setdefault(names[second], []).append(first)
    return {name: [names[other] for other in sorted(others)] for name, others in ties.items()}


def _adapted(
    names: list[str], with_adapters: list[str], left_alone: dict[str, str], patterns: str | Sequence[str]
) -> list[str]:
    """Which of ``names`` get an adapter. A pattern may also match a layer that has one already (``with_adapters``).

    Raises:
        ValueError: when a pattern matches neither.
    """
    if isinstance(patterns, str) and patterns == "all-linear":
        return list(names)
    each = [patterns] if isinstance(patterns, str) else [[pattern] for pattern in patterns]
    for pattern in each or [[]]:
        if any(matches(name, pattern) for name in (*names, *with_adapters)):
            continue
        text = repr(pattern if isinstance(pattern, str) else pattern[0]) if pattern else "an empty list"
        reasons = [f"{name} is left alone: {reason}" for name, reason in left_alone.items() if matches(name, pattern)]
        why = f" ({listed(reasons, 3, '; ')})" if reasons else ""
        raise ValueError(f"target_modules: {text} matches no layer to adapt{why}; candidates: {listed(_ends(names))}")
    return [name for name in names if any(matches(name, pattern) for pattern in each)]


def _ends(names: list[str]) -> list[str]:
    """The last components of names, as target_modules takes them; full names where those are numbers."""
    return list(dict.fromkeys(name if name[-1:].isdigit() else name.rpartition(".")[2] for name in names))
