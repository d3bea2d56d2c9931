"""adapter_config.json as PEFT has it: written from a model's adapters, and checked before it is used."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.adapters.named import Adapters
from ..layers.qlinear import QLinear
from .expressions import Expression, Steps, ends
from .targets import matches

CONFIG_NAME = "adapter_config.json"

# Names that wrappers put into module paths: torch.compile, activation checkpointing, FSDP.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

# Of all patterns together. Names of 2,000 layers, in full, have about 100,000.
_MOST_CHARACTERS = 1_000_000

# Of matching all patterns with all layers: some seconds.
_MOST_STEPS = 20_000_000

# The keys that decide how the weights are used; a difference in any other is harmless.
_DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters")

# Features of LoRA in PEFT that change more than A and B; each is off when its value is false or absent.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)

_BIASES = (None, "none", "lora_only", "all")

# Initialisations that keep the base weights; all others (pissa, olora, loftq, ...) change them.
_KEEPING_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def describe(model: nn.Module, layers: Mapping[str, Adapters], adapter: str, base: str | None) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Args:
        model: without wrappers.
        layers: those that have the adapter.
        adapter: its name here.
        base: what PEFT should load it onto.

    Raises:
        ValueError: for layers that PEFT cannot have in one adapter.
    """
    configs = {name: layer.adapters[adapter] for name, layer in layers.items()}
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, QLinear)}
    experts = len(linear) < len(layers)
    transposed = any(layer.fan_in_fan_out for layer in linear.values())
    if experts and transposed:
        raise ValueError(f"PEFT has no adapter for both transformers' Conv1D and experts, as {adapter!r} is")
    # PEFT has one kind of scaling for all layers. Where layers differ, alpha gives the same scaling without rslora.
    mixed = len({config.rslora for config in configs.values()}) > 1
    rslora = not mixed and all(config.rslora for config in configs.values())
    alphas = {name: _whole(config.scaling * config.rank if mixed else config.alpha) for name, config in configs.items()}
    rank = _commonest(config.rank for config in configs.values())
    alpha = _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT takes no dropout for the whole adapter where it covers experts.
        "lora_dropout": 0.0 if experts else _commonest(config.dropout for config in configs.values()),
        "use_rslora": rslora,
        "bias": "none",  # the caller sets this, modules_to_save, target_parameters and revision
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": target_modules(model, list(linear)),
        # PEFT matches a key, a regular expression, from any dot on; ^ makes it this one layer.
        "rank_pattern": {f"^{re.escape(n)}": c.rank for n, c in configs.items() if c.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
    }


def target_modules(model: nn.Module, layers: list[str]) -> list[str] | str:
    """The shortest description of exactly these layers: last components, full names, or a regular expression."""
    modules = [WRAPPERS.sub("", name) for name, _ in model.named_modules()]
    for patterns in (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers)):
        if {name for name in modules if matches(name, patterns)} == set(layers):
            return patterns
    return "|".join(re.escape(name) for name in layers)


def _commonest(values) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float | int:
    """A number as JSON should show it: 16 rather than 16.0."""
    return int(value) if float(value).is_integer() else value


def differences(copy: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """How the copy of a configuration that the weights carry differs from the file beside them, a phrase each."""
    return [
        f"{key} is {copy.get(key)} beside the weights, {config.get(key)} in {CONFIG_NAME}"
        for key in _DECISIVE
        if (copy.get(key) or None) != (config.get(key) or None)
    ]


def check(config: Mapping[str, Any], path: str) -> None:
    """
    Raises:
        ValueError: for a configuration that is not plain LoRA, or is malformed; the message starts with ``path``.
    """
    _check_plain_lora(config, path)
    for key, whole in (("r", True), ("lora_alpha", False)):
        if not _is_number(config.get(key), whole):
            raise ValueError(f"{path}: {key} should be {_a_number(whole)}, found {config.get(key)!r}")
    if config.get("lora_dropout") is not None and not _is_number(config["lora_dropout"]):
        raise ValueError(f"{path}: lora_dropout should be a number, found {config['lora_dropout']!r}")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"{path}: use_rslora should be true or false, found {config['use_rslora']!r}")
    _check_patterns(config, path)
    _check_parameters(config, path)
    _check_saved(config, path)


def _check_parameters(config: Mapping[str, Any], path: str) -> None:
    names = config.get("target_parameters")
    if not (names is None or _is_names(names)):
        raise ValueError(f"{path}: target_parameters should be a list of names, found {names!r}")
    if names and config.get("lora_dropout"):
        raise ValueError(
            f"{path}: adapters of parameters have no dropout, but lora_dropout is {config['lora_dropout']}; set it to 0"
        )


def _check_saved(config: Mapping[str, Any], path: str) -> None:
    modules, tokens = config.get("modules_to_save"), config.get("trainable_token_indices")
    if not (modules is None or _is_names(modules)) or "" in (modules or ()):
        raise ValueError(f"{path}: modules_to_save should be a list of names, found {modules!r}")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    for each in lists:
        if not isinstance(each, list) or not each or not all(_is_number(index, whole=True) for index in each):
            raise ValueError(f"{path}: trainable_token_indices should be lists of row numbers, found {tokens!r}")


def _check_plain_lora(config: Mapping[str, Any], path: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type should be LORA, found {kind}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key} = {config[key]!r} is not supported; only plain LoRA is")
    if config.get("bias") not in _BIASES:
        raise ValueError(f"{path}: bias = {config['bias']!r} is not supported; 'none', 'lora_only' and 'all' are")
    init = config.get("init_lora_weights")
    if init not in _KEEPING_INITS:
        raise ValueError(f"{path}: init_lora_weights = {init!r} changes the base weights; convert it to plain LoRA")


def _check_patterns(config: Mapping[str, Any], path: str) -> None:
    targets = config.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _is_names(targets)):
        raise ValueError(f"{path}: target_modules should be a list of names or a regular expression, found {targets!r}")
    expressions = [targets] if isinstance(targets, str) else []
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} should be an object, found {patterns!r}")
        for pattern, value in patterns.items():
            if not _is_number(value, whole):
                raise ValueError(f"{path}: {key}[{pattern!r}] should be {_a_number(whole)}, found {value!r}")
        expressions += patterns
    if sum(len(pattern) + 1 for pattern in expressions) > _MOST_CHARACTERS:
        raise ValueError(f"{path}: the patterns have more than {_MOST_CHARACTERS:,} characters together")
    for pattern in expressions:
        try:
            Expression(pattern)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _is_number(value: Any, whole: bool = False) -> bool:
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _a_number(whole: bool) -> str:
    return "a whole number" if whole else "a number"


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


class Targets:
    """target_modules: which layers PEFT would put an adapter on, as far as target_modules alone decides that."""

    def __init__(self, config: Mapping[str, Any], steps: Steps) -> None:
        patterns = config.get("target_modules")
        more = config.get("layers_to_transform") or config.get("exclude_modules")
        self._patterns = [] if more or patterns == "all-linear" else patterns or []
        if not isinstance(self._patterns, str):
            self._patterns = frozenset(self._patterns)
        self._steps = steps

    def has(self, name: str) -> bool:
        return matches(name, self._patterns, self._steps)


class Values:
    """rank_pattern or alpha_pattern: a value for each layer."""

    def __init__(self, patterns: Mapping[str, Any] | None, default: Any, steps: Steps) -> None:
        self._values = [(Expression(pattern), value) for pattern, value in (patterns or {}).items()]
        self._default = default
        self._steps = steps

    def for_layer(self, name: str) -> Any:
        """PEFT's rule: a pattern is a regular expression for the end of the name, from any dot; the first counts."""
        starts = ends(name)
        for pattern, value in self._values:
            if pattern.matches(name, starts, self._steps):
                return value
        return self._default


def steps(folder: str) -> Steps:
    """What matching all patterns of the adapter in a folder with a model's layers may take."""
    return Steps(_MOST_STEPS, f"{os.path.join(folder, CONFIG_NAME)}: ")
