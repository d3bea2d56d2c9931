"""The adapters of all layers of a model at once: select, disable, merge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from ..errors import listed
from ..layers.adapters.named import Adapters
from ..layers.experts import QExperts
from ..layers.merging import MergeReport
from .experts import adapted_layers
from .targets import is_of_peft, qlora_layers


def set_adapter(model: nn.Module, name: str) -> None:
    """Makes an adapter the active one in every layer that has it; layers without it become their base alone.

    Raises:
        KeyError: when no layer has it; the message lists those there are.
        RuntimeError: while an adapter is merged. Nothing has changed then.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not any(name in layer.adapters for layer in layers):
        raise no_adapter(name, layers, peft_hint(model, "model.set_adapter(name)"))
    for layer in layers:
        if layer.merged_adapter_name not in (None, name):
            raise RuntimeError(f"adapter '{layer.merged_adapter_name}' is merged into the base; unmerge it first")
    for layer in layers:
        layer.set_adapter(name if name in layer.adapters else None)


def no_adapter(name: str, layers: Iterable[Adapters], hint: str = "") -> KeyError:
    """The error for an adapter that none of these layers has."""
    known = dict.fromkeys(other for layer in layers for other in layer.adapters)
    return KeyError(f"no adapter {name!r} in this model; it has: {listed(map(repr, known)) or 'none'}{hint}")


def peft_hint(model: nn.Module, instead: str) -> str:
    """What to add to an error about the adapters of a model in which PEFT has some; empty where it has none."""
    name = next((name for name, module in model.named_modules() if is_of_peft(module)), None)
    if name is None:
        return ""
    return (
        f"; PEFT manages the adapters of {name or 'the model'}: use {instead} of the model that get_peft_model returned"
    )


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base alone, without PEFT's adapters too. Contexts may be nested.

    Raises:
        RuntimeError: while an adapter is merged.
        ValueError: when PEFT has adapters in the model, and the model is only a part of what ``get_peft_model``
            returned.
    """
    hint = peft_hint(model, "disable_adapters, or 'with model.disable_adapter():',")
    disable_peft = getattr(model, "disable_adapter", None)
    if hint and not callable(disable_peft):
        raise ValueError(f"disable_adapters cannot reach all adapters from here{hint}")
    with contextlib.ExitStack() as stack:
        if hint:
            stack.enter_context(cast(Any, disable_peft)())
        for _, layer in adapted_layers(model):
            stack.enter_context(layer.disable_adapters())
        yield


def merge_adapters(model: nn.Module) -> dict[str, MergeReport]:
    """Folds the active adapter of every layer that has one into its base: see :meth:`QLinear.merge`.

    Adapters of experts (:class:`QExperts`) are not merged, and stay beside their weights.

    Returns:
        A report for each layer, by name.

    Raises:
        RuntimeError, ValueError: as QLinear.merge, or when there is no adapter to merge; nothing is merged then.
    """
    layers = dict(qlora_layers(model))
    reports: dict[str, MergeReport] = {}
    try:
        for name, layer in layers.items():
            if layer.active_adapter is not None:
                reports[name] = layer.merge()
    except BaseException:
        for name in reports:
            layers[name].unmerge()
        raise
    if not reports:
        hint = peft_hint(model, "model.merge_adapter()")
        if any(isinstance(layer, QExperts) and layer.active_adapter is not None for _, layer in adapted_layers(model)):
            hint += "; adapters of experts are not merged"
        raise RuntimeError(f"no layer of this model has an active adapter to merge{hint}")
    return reports


def unmerge_adapters(model: nn.Module) -> None:
    """Takes the merged adapter out of every layer that has one, bit for bit.

    Raises:
        RuntimeError: when none is merged.
    """
    merged = [layer for _, layer in qlora_layers(model) if layer.merged_adapter_name is not None]
    if not merged:
        raise RuntimeError("no layer of this model has a merged adapter")
    for layer in merged:
        layer.unmerge()
