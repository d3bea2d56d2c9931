"""Which layers of a model to quantize and to adapt: PEFT's patterns, ties between parameters, kinds of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ..layers.qlinear import QLinear

_QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the full name, a list holds full names or their ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def check_patterns(argument: str, patterns: str | Sequence[str]) -> None:
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{argument}: {patterns!r} is not a regular expression ({error})") from None
    elif not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} should be a regular expression or a list of names, found {patterns!r}")


def candidates(model: nn.Module, skip: str | Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantize, and of linear-like layers to leave alone with the reason."""
    ties = _ties(model)
    names, left_alone, foreign = [], {}, ()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and type(module).__module__.startswith("peft."):
            foreign = (*foreign, f"{name}.")
            left_alone[name] = "a PEFT layer; quantize the model before adding adapters, or use qlora_kernels' own"
        if not _linear_like(module) or name.startswith(foreign or "\0"):
            continue
        reason = _reason(name, module, ties, skip)
        if reason is None:
            names.append(name)
        else:
            left_alone[name] = reason
    return names, left_alone


def _linear_like(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(module, nn.Linear) or (
        kind.__module__.startswith(("transformers.", "bitsandbytes.")) and kind.__name__ in ("Conv1D", "Linear8bitLt")
    )


def _reason(name: str, module: nn.Module, ties: dict[str, list[str]], skip: str | Sequence[str]) -> str | None:
    """Why a linear-like layer stays as it is, or None."""
    if matches(name, skip):
        return "named in skip"
    if isinstance(module, QLinear):
        return "4-bit already"
    if type(module) is not nn.Linear:
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
            return f"its {key} is tied to {', '.join(ties[f'{name}.{key}'])}"
    return None


def _span(parameter: nn.Parameter) -> tuple[str, int, int]:
    """Where a parameter's memory is: device, begin, end; without memory, a place of its own."""
    if parameter.is_meta or not parameter.numel():
        return f"no memory, {id(parameter)}", 0, 1
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    begin = parameter.data_ptr()
    return str(parameter.device), begin, begin + (last + 1) * parameter.element_size()


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter those that share memory with it: the same one, or a view of the same memory or a part."""
    names, spans = [], []
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.append(f"{name}.{key}" if name else key)
                spans.append(_span(parameter))
    order = sorted(range(len(names)), key=spans.__getitem__)
    ties: dict[str, list[int]] = {}
    for place, first in enumerate(order):
        device, _, end = spans[first]
        for second in order[place + 1 :]:
            if spans[second][0] != device or spans[second][1] >= end:
                break
            ties.setdefault(names[first], []).append(second)
            ties.setdefault(names[second], []).append(first)
    return {name: [names[other] for other in sorted(others)] for name, others in ties.items()}


def targets(
    names: list[str], earlier: list[str], left_alone: dict[str, str], patterns: str | Sequence[str]
) -> list[str]:
    """Those of the layers ``names`` that get an adapter; ``earlier`` are layers that have one already.

    Raises:
        ValueError: when a pattern matches none of either.
    """
    if isinstance(patterns, str) and patterns == "all-linear":
        return list(names)
    each = [patterns] if isinstance(patterns, str) else [[pattern] for pattern in patterns]
    for pattern in each or [[]]:
        if any(matches(name, pattern) for name in (*names, *earlier)):
            continue
        text = repr(pattern if isinstance(pattern, str) else pattern[0]) if pattern else "an empty list"
        reasons = [f"{name} is left alone: {why}" for name, why in left_alone.items() if matches(name, pattern)]
        more = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise ValueError(f"target_modules: {text} matches no layer to adapt{more}; candidates: {_ends(names)}")
    return [name for name in names if any(matches(name, pattern) for pattern in each)]


def _ends(names: list[str]) -> str:
    """The names without numbered prefixes, which is how they are given as targets, for an error."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] if not name[-1].isdigit() else name for name in names))
    return ", ".join(ends[:40]) + (", ..." if len(ends) > 40 else "")


def qlora_layers(model: nn.Module) -> Iterator[tuple[str, QLinear]]:
    """(name, layer) of every QLinear in a model, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            yield name, module
