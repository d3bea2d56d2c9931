"""Heads that a model of transformers has on top of its trunk, such as a classifier."""

from __future__ import annotations

from torch import nn

from .dense_layers import is_linear_like

#: What quantize_model leaves dense unless told otherwise.
DEFAULT_SKIP = ("lm_head",)


def heads(model: nn.Module) -> dict[str, str]:
    """The linear layers outside a model's trunk, and its output embeddings, with what each is.

    The trunk is what ``base_model_prefix`` names. A model that has none of that name (one that is itself a trunk, or is
    no model of transformers) has only its output embeddings, if any.
    """
    found: dict[str, str] = {}
    output = _output_embeddings(model)
    trunk = _trunk(model)
    for name, module in model.named_modules():
        if output is not None and module is output:
            found[name] = "the output embeddings"
        elif trunk and is_linear_like(module) and not f"{name}.".startswith(f"{trunk}."):
            found[name] = f"a head of {type(model).__name__}"
    return found


def new_heads(model: nn.Module) -> list[str]:
    """Names of the modules that a task adds to a pretrained trunk, to be trained with the adapters.

    A language model's head was pretrained with it, so a model with output embeddings has no new ones.
    """
    if _output_embeddings(model) is not None:
        return []
    return [name for name, what in heads(model).items() if what.startswith("a head")]


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
