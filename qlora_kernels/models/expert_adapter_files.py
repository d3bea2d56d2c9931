"""Adapters of experts as PEFT's files hold them: ``target_parameters``.

PEFT wraps a module once for each of its adapted parameters, in the order that the module has them, so the first one is
the innermost. Its matrices are stored under the module's name with ``.base_layer`` once for each wrapper around it, and
the parameter itself is not named: which ones a file covers, only ``target_parameters`` says. The matrices of all
experts are flattened into two: A is [E*r, K], expert by expert, and B is [N, r*E], in which an expert has every E-th
column. That holds for experts stored as [E, K, N], too. (peft/tuners/lora/layer.py, ParamWrapper, of PEFT 0.21.)
PEFT before 0.19 took [E, N, K] for [E, K, N], so its A and B for those do not mean the same.
"""

# Uses private attributes of modules.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import listed
from ..layers.adapters.named import Adapters
from ..layers.experts import QExperts, QExpertsModule
from .peft_config import WRAPPERS
from .targets import matches

_WRAPPED = ".base_layer"
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def target_parameters(model: nn.Module, experts: Sequence[str]) -> list[str]:
    """The shortest description of exactly these stacks of experts: last components, or full names.

    Raises:
        ValueError: when PEFT cannot name them without others, or as parameters of the whole model.
    """
    for name in experts:
        if "." not in name:
            raise ValueError(f"{name} is a parameter of the model itself, which PEFT's target_parameters cannot name")
    parameters = [WRAPPERS.sub("", name) for name, _ in model.named_parameters()]
    parameters += [WRAPPERS.sub("", name) for name, module in model.named_modules() if isinstance(module, QExperts)]
    meant: set[str] = set()
    for patterns in (sorted({name.rpartition(".")[2] for name in experts}), sorted(experts)):
        meant = {name for name in parameters if matches(name, patterns)}
        if meant == set(experts):
            return patterns
    raise ValueError(
        f"PEFT's target_parameters cannot name {listed(experts, 3)} without {listed(sorted(meant - set(experts)), 3)}, "
        "whose name ends with the same; give them an adapter of this name too"
    )


def places(experts: Iterable[str]) -> dict[str, str]:
    """{stack: the module's name in the file} for the stacks that have the adapter, in the model's order."""
    modules: dict[str, list[str]] = {}
    for name in experts:
        modules.setdefault(name.rpartition(".")[0], []).insert(0, name)
    return {name: module + _WRAPPED * depth for module, names in modules.items() for depth, name in enumerate(names)}


def beside(key: str, experts: Iterable[str], prefix: str) -> str:
    """The key in the file of a trained tensor that is in a module of experts, such as their biases; of others the same.

    Args:
        key: with the tensor's name in the model.
        experts: the stacks that have the adapter.
        prefix: what the key has before the name.
    """
    for name in experts:
        module = f"{prefix}{name.rpartition('.')[0]}"
        if key.startswith(f"{module}."):
            key = module + _WRAPPED + key[len(module) :]
    return key


def stacks(layers: Mapping[str, Adapters], config: Mapping[str, Any]) -> list[str]:
    """The stacks of experts that a configuration's target_parameters mean, in the model's order."""
    patterns = frozenset(config.get("target_parameters") or ())
    return [name for name, layer in layers.items() if isinstance(layer, QExperts) and matches(name, patterns)]


def takers(model: nn.Module, layers: Mapping[str, Adapters], config: Mapping[str, Any], folder: str) -> dict[str, str]:
    """{module's name in the file: layer} for all linear layers, and the experts that target_parameters mean.

    Raises:
        ValueError: when it means other parameters beside a stack, which would shift the names; for a file from before
            PEFT 0.19.
    """
    patterns = frozenset(config.get("target_parameters") or ())
    covered, old = set(stacks(layers, config)), _before_0_19(config)
    for name, module in model.named_modules():
        if isinstance(module, QExpertsModule):
            children = {WRAPPERS.sub("", f"{name}.{key}") for key, _ in module.named_children()}
            if old and not getattr(module, "is_transposed", False) and not covered.isdisjoint(children):
                raise ValueError(
                    f"{folder}: PEFT {old} wrote adapters of experts in another layout; load them with that release, "
                    "merge them into the dense model, and quantize it"
                )
            own = [WRAPPERS.sub("", f"{name}.{key}") for key, value in module._parameters.items() if value is not None]
            others = [other for other in own if matches(other, patterns)]
            if others:
                raise ValueError(
                    f"{folder}: target_parameters covers {listed(others, 3)}, which can have no adapter here; only the "
                    "experts' weights can"
                )
    linear = {name: name for name, layer in layers.items() if not isinstance(layer, QExperts)}
    return linear | {place: name for name, place in places(stacks(layers, config)).items()}


def _before_0_19(config: Mapping[str, Any]) -> str:
    """The PEFT that wrote a configuration, if it is older than 0.19; empty for another one, and for save_adapter's."""
    version = config.get("peft_version")
    if version is None:  # noted from 0.18 on; PEFT writes all of its options, and save_adapter few
        return "0.17" if "megatron_config" in config else ""
    match = re.match(r"(\d+)\.(\d+)", str(version))
    return match[0] if match and (int(match[1]), int(match[2])) < (0, 19) else ""


def hint(unknown: Iterable[str]) -> str:
    """What to add to an error about modules in a file that the model does not have."""
    unknown = list(unknown)
    if any(_ONE_EXPERT.search(name) for name in unknown):
        return (
            " (an adapter from transformers 4, with matrices for each expert alone: load it with PEFT onto the dense "
            "model under transformers 5, and save it again)"
        )
    return " or the experts that target_parameters covers" if any("experts" in name for name in unknown) else ""


def shapes(layer: Adapters, rank: int) -> tuple[list[int], list[int]]:
    """The shapes of A and B in a file, for a layer of either kind."""
    each = layer.num_experts if isinstance(layer, QExperts) else 1
    return [each * rank, layer.in_features], [layer.out_features, rank * each]


def to_file(letter: str, matrix: Tensor) -> Tensor:
    """A [E, r, K] as [E*r, K], B [E, N, r] as [N, r*E]; the matrices of a linear layer as they are."""
    if matrix.dim() == 2:
        return matrix
    return matrix.flatten(0, 1) if letter == "A" else matrix.permute(1, 2, 0).flatten(1).contiguous()


def from_file(layer: Adapters, letter: str, matrix: Tensor) -> Tensor:
    """The opposite of :func:`to_file`."""
    if not isinstance(layer, QExperts):
        return matrix
    if letter == "A":
        return matrix.unflatten(0, (layer.num_experts, -1))
    return matrix.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1).contiguous()
