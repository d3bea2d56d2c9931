"""Where a model has its layers, and putting others there."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

#: All (parent, key) that hold one module: it may be in several places.
Places = list[tuple[nn.Module, str]]

# Where nn.Module keeps hooks on forward and backward. They belong to the place in the model, not to the weight.
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


def places_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, Places]:
    """For the first name of each wanted module inside ``model``, all places that hold it."""
    first = {id(module): name for name, module in model.named_modules() if wanted(module)}
    places: dict[str, Places] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if id(child) in first:
                places.setdefault(first[id(child)], []).append((parent, key))
    return places


def put(layer: nn.Module, places: Places) -> None:
    """Puts a layer where another one is, in all its places, with that one's hooks."""
    parent, key = places[0]
    old = parent._modules[key]
    if old is not None:
        take_hooks(layer, old)
    for parent, key in places:
        parent._modules[key] = layer


def take_hooks(layer: nn.Module, old: nn.Module) -> None:
    """Gives a layer the hooks of the one that it replaces."""
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(old, hooks))
