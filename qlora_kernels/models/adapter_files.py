"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in a folder."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters.config import AdapterConfig
from ..layers.qlinear import QLinear
from ..storage.atomic_file import write_atomically
from ..storage.formats import load_json, load_safetensors, parse_json, save_json, save_safetensors
from ..storage.safetensors_stream import read_header
from .targets import matches, qlora_layers

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# The configuration travels in the weights' metadata as well. Two files cannot be replaced as one, so a kill between
# them could pair new weights with an old configuration: with the copy, that shows.
_COPY = "qlora_kernels.adapter_config"

# What decides how the weights are used; a difference in anything else harms nothing.
_MEANING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

# Names that wrappers put into module paths: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

# Features of LoRA in PEFT that change more than A and B; each is off when its value is false or absent.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)

# Initialisations that leave A and B alone or only fill them; all others (pissa, olora, loftq, ...) change the base.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes an adapter as PEFT does: ``PeftModel.from_pretrained(dense_model, folder)`` reads it.

    A kill at any moment leaves, for :func:`load_adapter`, the old adapter or the new; the one exception is a folder
    that another program wrote, where it may leave a mixture, which load_adapter refuses. PEFT has one dropout and one
    kind of scaling for all layers: dropout becomes the commonest, and where some layers use rslora and others do not,
    alphas are given that lead to the same scalings.

    Args:
        model: a model with QLinear layers.
        folder: is made if it does not exist.
        adapter_name: which adapter; in the files it has no name.
        base_model_name_or_path: what PEFT should load the adapter onto; by default the model's ``name_or_path``.

    Raises:
        KeyError: when no layer has this adapter; the message lists the known.
        ValueError: when the model is itself a QLinear, since PEFT has no name for such a layer, and when the adapter
            holds NaN or infinity.
        OSError: when the folder cannot be made or written.
    """
    model = _unwrapped(model)
    everything = _layers(model)
    layers = {name: layer for name, layer in everything.items() if adapter_name in layer.adapters}
    if not layers:
        known = ", ".join(map(repr, _known(everything))) or "none"
        raise KeyError(f"no adapter {adapter_name!r} in this model; it has: {known}")
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    config = _describe(model, layers, adapter_name, base_model_name_or_path)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A[adapter_name].detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B[adapter_name].detach().cpu()
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} of adapter {adapter_name!r} holds NaN or infinity and is not saved")

    os.makedirs(folder, exist_ok=True)
    config_path, weights_path = os.path.join(folder, CONFIG_NAME), os.path.join(folder, WEIGHTS_NAME)
    # A configuration that the new weights contradict goes before they come: the old weights carry a copy of it.
    obsolete = os.path.exists(config_path) and _carries_copy(weights_path) and _contradicts(config_path, config)

    def write(temporary: str) -> None:
        save_safetensors(tensors, temporary, metadata={"format": "pt", _COPY: json.dumps(config)})
        if obsolete:
            os.unlink(config_path)

    write_atomically(weights_path, write)
    save_json(config, config_path)


def load_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> list[str]:
    """Reads an adapter that :func:`save_adapter` or PEFT wrote, into a model with QLinear layers.

    An adapter that has this name already is replaced, whatever its rank; layers that the file does not cover lose it.
    It becomes active where one of its name was, or when the model has no active adapter; otherwise call
    :func:`qlora_kernels.set_adapter`. Everything is checked before anything changes.

    Args:
        model: a model with QLinear layers.
        folder: with adapter_config.json and adapter_model.safetensors.
        adapter_name: what to call it.

    Returns:
        The names of the layers it went into.

    Raises:
        FileNotFoundError: when the folder, or a file in it, does not exist.
        ValueError: for a truncated or foreign file, an adapter that is not plain LoRA, or one for another model (the
            first layers that do not fit are named).
        RuntimeError: when the adapter to be replaced is merged, or another one is where this one would be active.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    config, tensors = _read(folder)
    _check_config(config, folder)
    layers = _layers(_unwrapped(model))
    pairs = _pair(tensors, folder)
    plan = _fit(layers, pairs, config, folder)
    active = {layer.active_adapter for layer in layers.values()}
    activate = adapter_name in active or active <= {None}
    for name, layer in layers.items():
        merged = layer.merged_adapter_name
        if merged is not None and (activate or merged == adapter_name):
            raise RuntimeError(f"adapter '{merged}' is merged into {name}; unmerge it first")
        if adapter_name not in layer.adapters:
            layer._check_name(adapter_name)

    for name, layer in layers.items():
        if name in plan:
            options = layer._adapter_options(adapter_name)
            A, B = (pairs[name][part].to(**options, copy=True) for part in "AB")
            layer._put_adapter(adapter_name, plan[name], A, B)
        elif adapter_name in layer.adapters:
            layer.delete_adapter(adapter_name)
    if activate:
        for layer in layers.values():
            layer.set_adapter(adapter_name if adapter_name in layer.adapters else None)
    return list(plan)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _layers(model: nn.Module) -> dict[str, QLinear]:
    if isinstance(model, QLinear):
        raise ValueError("the model is itself a QLinear; PEFT's format has names only for layers within a model")
    layers = {_WRAPPERS.sub("", name): layer for name, layer in qlora_layers(model)}
    if not layers:
        raise ValueError("the model has no QLinear layers; quantize it with quantize_model first")
    return layers


def _known(layers: Mapping[str, QLinear]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))


# ------------------------------------------------------------------------------------------------------- writing


def _describe(model: nn.Module, layers: Mapping[str, QLinear], adapter: str, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    configs = {name: layer.adapters[adapter] for name, layer in layers.items()}
    kinds = {config.rslora for config in configs.values()}
    rslora = kinds == {True}
    alphas = {
        name: _number(config.alpha if len(kinds) == 1 else config.scaling * config.rank)
        for name, config in configs.items()
    }
    rank = _commonest(config.rank for config in configs.values())
    alpha = _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _commonest(config.dropout for config in configs.values()),
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _target_modules(model, list(layers)),
        # A key is a regular expression that PEFT lets begin at any dot; with ^ it is this very layer.
        "rank_pattern": {f"^{re.escape(n)}": c.rank for n, c in configs.items() if c.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
    }


def _carries_copy(path: str) -> bool:
    try:
        return _COPY in read_header(path)[1]
    except (FileNotFoundError, ValueError):
        return False


def _contradicts(path: str, config: Mapping[str, Any]) -> bool:
    try:
        return bool(_differences(config, load_json(path)))
    except ValueError:
        return True


def _target_modules(model: nn.Module, layers: list[str]) -> list[str] | str:
    """The shortest description of exactly these layers: last components, full names, or a regular expression."""
    modules = [_WRAPPERS.sub("", name) for name, _ in model.named_modules()]
    for patterns in (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers)):
        if {name for name in modules if matches(name, patterns)} == set(layers):
            return patterns
    return "|".join(re.escape(name) for name in layers)


def _commonest(values) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


# ------------------------------------------------------------------------------------------------------- reading


def _read(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights that belong together."""
    config_path, weights_path = os.path.join(folder, CONFIG_NAME), os.path.join(folder, WEIGHTS_NAME)
    config = load_json(config_path) if os.path.exists(config_path) else None
    if not os.path.exists(weights_path):
        other = os.path.join(folder, "adapter_model.bin")
        hint = f"; {other} is a pickle, save it again as safetensors" if os.path.exists(other) else ""
        raise FileNotFoundError(f"{weights_path}: no such file{hint}")
    tensors, metadata = load_safetensors(weights_path)
    copy = parse_json(metadata[_COPY], f"{weights_path}: the metadata {_COPY}") if _COPY in metadata else None
    if config is None and copy is None:
        raise FileNotFoundError(f"{config_path}: no such file; not an adapter's folder, or an incomplete one")
    if config is not None and copy is not None:
        different = _differences(copy, config)
        if different:
            raise ValueError(
                f"{config_path} and {weights_path} do not belong together ({'; '.join(different)}): a save was "
                f"interrupted, or one was edited. Remove {CONFIG_NAME} to go by the copy that the weights carry"
            )
    return config if config is not None else copy, tensors


def _differences(copy: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {copy.get(key)} beside the weights, {config.get(key)} in {CONFIG_NAME}"
        for key in _MEANING
        if (copy.get(key) or None) != (config.get(key) or None)
    ]


def _check_config(config: Mapping[str, Any], folder: str) -> None:
    path = os.path.join(folder, CONFIG_NAME)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type should be LORA, found {kind}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key} = {config[key]!r} is not supported; only plain LoRA on linear layers is")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias = {config['bias']!r} is not supported; only 'none' is")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise ValueError(f"{path}: init_lora_weights = {init!r} changes the base weights; convert it to plain LoRA")
    for key, whole in (("r", True), ("lora_alpha", False)):
        if not _is_number(config.get(key), whole):
            raise ValueError(f"{path}: {key} should be {_a_number(whole)}, found {config.get(key)!r}")
    if config.get("lora_dropout") is not None and not _is_number(config["lora_dropout"]):
        raise ValueError(f"{path}: lora_dropout should be a number, found {config['lora_dropout']!r}")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"{path}: use_rslora should be true or false, found {config['use_rslora']!r}")
    targets = config.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _is_names(targets)):
        raise ValueError(f"{path}: target_modules should be a list of names or a regular expression, found {targets!r}")
    expressions = [targets] if isinstance(targets, str) else []
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} should be an object, found {patterns!r}")
        for expression, value in patterns.items():
            if not _is_number(value, whole):
                raise ValueError(f"{path}: {key}[{expression!r}] should be {_a_number(whole)}, found {value!r}")
        expressions += patterns
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{path}: {expression!r} is not a regular expression ({error})") from None


def _is_number(value: Any, whole: bool = False) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _a_number(whole: bool) -> str:
    return "a whole number" if whole else "a number"


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _pair(tensors: Mapping[str, Tensor], folder: str) -> dict[str, dict[str, Tensor]]:
    """{layer: {"A": ..., "B": ...}}, complete, two-dimensional, floating and finite."""
    path = os.path.join(folder, WEIGHTS_NAME)
    pairs: dict[str, dict[str, Tensor]] = {}
    foreign = [key for key in tensors if _KEY.fullmatch(key) is None]
    if not tensors:
        raise ValueError(f"{path}: there is no tensor in it")
    if foreign:
        found = _first(foreign)
        raise ValueError(
            f"{path}: keys should be base_model.model.<layer>.lora_A.weight and lora_B.weight, found {found}"
        )
    for key, tensor in tensors.items():
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} should be a floating matrix, found {tensor.dtype} {list(tensor.shape)}")
        if tensor.element_size() == 1:
            tensor = tensor.float()  # float8 can be converted, and nothing else
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity")
        layer, part = _KEY.fullmatch(key).groups()
        pairs.setdefault(layer, {})[part] = tensor
    lone = [layer for layer, pair in pairs.items() if len(pair) < 2]
    if lone:
        raise ValueError(f"{path}: lora_A and lora_B come together, but one is missing for {_first(lone)}")
    return pairs


def _fit(
    layers: Mapping[str, QLinear], pairs: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any], folder: str
) -> dict[str, AdapterConfig]:
    """The adapter's configuration for each layer, when all of them fit the model."""
    unknown = [name for name in pairs if name not in layers]
    if unknown:
        raise ValueError(
            f"{folder}: an adapter for another model: {_first(unknown)} "
            f"{'are' if len(unknown) > 1 else 'is'} not among its QLinear layers, such as {_first(list(layers), 2)}"
        )
    plan, misfits = {}, []
    for name, pair in pairs.items():
        rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        layer = layers[name]
        wanted = ([rank, layer.in_features], [layer.out_features, rank])
        found = (list(pair["A"].shape), list(pair["B"].shape))
        if wanted != found:
            misfits.append(f"{name} takes A {wanted[0]} and B {wanted[1]}, found {found[0]} and {found[1]}")
            continue
        plan[name] = AdapterConfig(
            rank, alpha, float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora"))
        )
        plan[name].check(layer.out_features, layer.in_features, f"{folder}: {name}")
    if misfits:
        raise ValueError(f"{folder}: an adapter for another model, or of another rank: {_first(misfits)}")
    uncovered = [name for name in layers if name not in pairs and _targeted(name, config)]
    if uncovered:
        raise ValueError(
            f"{folder}: an adapter for another model, or an incomplete one: target_modules covers {_first(uncovered)}, "
            f"but {WEIGHTS_NAME} does not"
        )
    return plan


def _targeted(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would put this adapter on the layer; False where that depends on more than target_modules."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear" or config.get("layers_to_transform") or config.get("exclude_modules"):
        return False
    return matches(name, targets)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the name, from any dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
