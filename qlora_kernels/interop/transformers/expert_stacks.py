"""A mixture's 4-bit experts while transformers loads and saves a model: its files hold the merged weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...errors import listed
from ...formats.nf4_stack import quantize_stack
from ...layers.experts import QExperts, QExpertsModule
from ...models.experts import experts_layers, stacked_weights
from ...models.places import Places, places_of, put


def expert_modules(model: nn.Module) -> dict[str, QExpertsModule]:
    """The modules of 4-bit experts, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QExpertsModule)}


def bias_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """The bias that a module of experts keeps for one of its weights."""
    module, _, weight = name.rpartition(".")
    return model.get_submodule(module)._parameters.get(f"{weight}_bias")


def keep_merged(model: Any) -> None:
    """Tells transformers not to take 4-bit experts apart when it saves.

    A dense model's merged weights are written one expert at a time, and under the names of older releases. Pieces of a
    4-bit stack stay together, under the names that they have in the model, and so does what the same rules would change
    elsewhere. These names are found when the folder is loaded, and are those by which Trainer resumes.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    keys = [f"{name}.weight_packed" for name, _ in experts_layers(model)]
    if not keys:
        return
    rules = getattr(model, "_weight_conversions", None)
    prefixes = getattr(loading, "PrefixChange", ())
    if rules is None:  # not loaded, so transformers would take the rules of the model's type, but for its prefixes
        rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False) or []]
        rules = [rule for rule in rules if not isinstance(rule, prefixes)]
    model._weight_conversions = [rule for rule in rules if isinstance(rule, prefixes) or not _changes(rule, keys)]


def _changes(rule: Any, keys: list[str]) -> bool:
    """Whether transformers would apply a rule when it saves tensors of these names, and not when it loads them."""
    reverse = rule.reverse_transform()
    if not any(reverse.rename_source_key(key)[1] is not None for key in keys):
        return False
    if hasattr(rule, "operations"):  # it would take the tensors apart
        return True
    return all(copy.deepcopy(rule).rename_source_key(key)[0] == key for key in keys)


def mark_as_initialized(experts: QExpertsModule) -> None:
    """Keeps transformers from filling 4-bit experts with random numbers."""
    for module in (experts, *(child for child in experts.children() if isinstance(child, QExperts))):
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


class Stacks:
    """The experts of a model while a dense checkpoint is loaded.

    A module stays dense, without memory, until all of its weights have come; each becomes 4-bit as it does.

    Attributes:
        waiting: full names of the weights that have not come yet.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.waiting = {f"{name}.{weight}" for name in names for weight in stacked_weights(model.get_submodule(name))}
        self._places: dict[str, Places] = places_of(model, lambda module: bool(stacked_weights(module)))
        self._made: dict[str, dict[str, QExperts]] = {}

    def quantize(self, model: nn.Module, name: str, weights: torch.Tensor, double_quant: bool) -> None:
        """Takes one weight, by its full name.

        Raises:
            ValueError, TypeError: as :func:`quantize_stack`.
        """
        module, _, weight = name.rpartition(".")
        experts: Any = model.get_submodule(module)
        weights = weights.transpose(1, 2) if experts.is_transposed else weights
        made = self._made.setdefault(module, {})
        made[weight] = QExperts(quantize_stack(weights, double_quant, name=name))
        self.waiting.discard(name)
        names = stacked_weights(experts)
        if set(made) == set(names):  # in the model's order, not the files'
            swapped = QExpertsModule(experts, {key: made[key] for key in names})
            del self._made[module]
            put(swapped, self._places[module])
            mark_as_initialized(swapped)

    def check_complete(self, model: Any) -> None:
        """
        Raises:
            ValueError: when a weight has not come, or a bias: what transformers would fill it with is random.
        """
        missing = [*self.waiting]
        for module, made in self._made.items():
            missing += [
                f"{module}.{weight}" for weight in stacked_weights(model.get_submodule(module)) if weight not in made
            ]
        for name, module in expert_modules(model).items():
            missing += [
                f"{name}.{key}"
                for key, parameter in module.named_parameters(recurse=False)
                if not getattr(parameter, "_is_hf_initialized", False) and not hasattr(module, "_hf_hook")
            ]
        if missing:
            folder = getattr(model, "name_or_path", "") or "the checkpoint"
            missing = sorted(dict.fromkeys(missing))
            raise ValueError(f"{folder} lacks {len(missing)} weights of experts: {listed(missing, 3)}; it is damaged")
