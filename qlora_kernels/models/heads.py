"""Heads that a model of transformers has on top of its trunk, such as a classifier."""

from __future__ import annotations

from torch import nn

from ..layers.packed import PackedLayer
from .dense_layers import is_linear_like

#: What quantize_model leaves dense unless told otherwise.
DEFAULT_SKIP = ("lm_head",)


def heads(model: nn.Module) -> dict[str, str]:
    """The linear layers outside a model's trunk, and its output embeddings, with what each is.

    The trunk is what ``base_model_prefix`` names. A model that has none of that name (one that is itself a trunk, or is
    no model of transformers) has only its output embeddings, if any. But a task's model of transformers may hold the
    parts of a trunk side by side (Whisper's classifier, CLIP's); without output embeddings, its heads are the layers
    beside them.
    """
    found: dict[str, str] = {}
    output = _output_embeddings(model)
    for name, module in model.named_modules():
        if output is not None and module is output:
            found[name] = "the output embeddings"
    outside = _outside(model)
    found |= {
        name: f"a head of {type(model).__name__}"
        for name, module in outside.items()
        if is_linear_like(module) and name not in found
    }
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def new_heads(model: nn.Module) -> list[str]:
    """Names of the modules that a task adds to a pretrained trunk, to be trained with the adapters.

    These are linear layers, and others with parameters of their own (norms, convolutions); no 4-bit or 8-bit ones.

    A language model's head was pretrained with it, so a model with output embeddings has no new ones.
    """
    if _output_embeddings(model) is not None:
        return []
    outside = _outside(model)
    packed = tuple(f"{name}." for name, module in outside.items() if isinstance(module, PackedLayer))
    return [name for name, module in outside.items() if _can_be_trained(module) and not name.startswith(packed)]


def _can_be_trained(module: nn.Module) -> bool:
    """Whether it has parameters of its own, none of them packed in integers."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return bool(own) and all(parameter.is_floating_point() for parameter in module.parameters())


def _outside(model: nn.Module) -> dict[str, nn.Module]:
    """The modules outside a model's trunk; none for a model without a trunk."""
    trunk = _trunk(model)
    modules = {name: module for name, module in model.named_modules() if name}
    if trunk:
        return {name: module for name, module in modules.items() if not f"{name}.".startswith(f"{trunk}.")}
    is_task = hasattr(model, "base_model_prefix") and "For" in type(model).__name__
    if is_task and _output_embeddings(model) is None:
        return {name: module for name, module in modules.items() if "." not in name and is_linear_like(module)}
    return {}


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except (AttributeError, NotImplementedError):  # transformers' own default, where a model has no such layer
        return None


def _trunk(model: nn.Module) -> str:
    """The name of a transformers model's trunk inside it, or nothing; what holds less than half is no trunk."""
    prefix = getattr(model, "base_model_prefix", "")
    trunk = model._modules.get(prefix) if isinstance(prefix, str) else None
    if trunk is None:
        return ""
    inside, everything = (sum(p.numel() for p in module.parameters()) for module in (trunk, model))
    return prefix if 2 * inside >= everything else ""
