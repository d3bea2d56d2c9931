"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import listed
from ..layers.adapters.config import AdapterConfig
from ..layers.adapters.named import (
    Adapters,
    adapter_options,
    check_adapter_name,
    put_adapter,
    refuse_sharded,
    set_config,
)
from ..layers.experts import QExperts
from ..layers.offloading import offloaded
from ..layers.packed import is_sharded
from ..layers.qlinear import QLinear
from ..ops import dispatcher
from ..storage.atomic_file import write_atomically
from ..storage.formats import load_json, parse_json, save_json, save_safetensors
from ..storage.lock import exclusive, unchanging
from ..storage.regular_file import identity_of
from ..storage.safetensors_stream import DTYPES, Entry, Reader, read_header
from . import expert_adapter_files, peft_config, sharded
from .adapters import no_adapter, peft_hint
from .experts import adapted_layers
from .origin import Origin, origin_of_model
from .peft_config import CONFIG_NAME
from .trained import PREFIX, Values, find_trained, read_values

WEIGHTS_NAME = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# The weights' metadata carries a copy of the configuration. Two files cannot be replaced as one, so a kill between
# them could pair new weights with an old configuration; the copy gives that away.
_COPY = "qlora_kernels.adapter_config"

# How often to start again when the files change while they are read.
_ATTEMPTS = 10


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes an adapter as PEFT does: ``PeftModel.from_pretrained(dense_model, folder)`` reads it.

    Adapters of experts (:class:`QExperts`) are written as PEFT's ``target_parameters``, with those of linear layers.
    PEFT takes no dropout where an adapter covers experts, so its linear layers' dropout is written as 0 then.

    What else asks for gradients is saved with it, as PEFT's modules_to_save and bias: heads, embeddings and norms as
    whole modules, biases alone where the weight beside them is frozen. Modules that share a trained tensor are saved
    each with a copy.

    After a kill at any moment :func:`load_adapter` finds the old adapter or the new one. The exception is a folder
    that another program wrote: a kill may leave a mixture there, which load_adapter refuses. PEFT has one dropout and
    one kind of scaling for all layers, so the commonest dropout is written, and where only some layers use rslora,
    alphas that give the same scalings.

    Of a model that FSDP2 has sharded every process has to call this: all gather, the first one writes.

    Args:
        model: a model with QLinear or QExperts layers.
        folder: created if it does not exist.
        adapter_name: which adapter; the files do not name it.
        base_model_name_or_path: the dense model that PEFT should load the adapter onto. By default the model's
            ``name_or_path`` with its revision, or what a 4-bit folder says that it was made from.

    Raises:
        KeyError: when no layer has this adapter; the message lists those there are.
        ValueError: when the model is itself a QLinear or its experts, since PEFT has no name for such a layer, when a
            tensor to be saved holds NaN or infinity, and when PEFT's format cannot name a trained module, or a stack of
            experts, alone.
        RuntimeError: for a model in FullyShardedDataParallel (FSDP1), and for tensors on the meta device.
        OSError: when the folder cannot be created or written.

    Warns:
        UserWarning: when the model came from a 4-bit folder that does not name its dense model: pass
            ``base_model_name_or_path`` then.
    """
    model = _unwrapped(model)
    sharded.refuse_flat_parameters(model)
    sharded.reshard(model)
    everything = _layers(model)
    layers = {name: layer for name, layer in everything.items() if adapter_name in layer.adapters}
    if not layers:
        raise no_adapter(adapter_name, everything.values(), peft_hint(model, "model.save_pretrained(folder)"))
    base = origin_of_model(model) if base_model_name_or_path is None else Origin(base_model_name_or_path)
    trained = find_trained(model, layers)
    config = peft_config.describe(model, layers, adapter_name, base.name)
    config |= {"revision": base.revision, "bias": trained.bias, "modules_to_save": trained.modules}
    experts = [name for name, layer in layers.items() if isinstance(layer, QExperts)]
    if experts:
        config["target_parameters"] = expert_adapter_files.target_parameters(model, experts)
    places = expert_adapter_files.places(experts)
    tensors: dict[str, Tensor] = {}
    for key, tensor in trained.tensors.items():
        key = expert_adapter_files.beside(key, experts, PREFIX)
        tensors[key] = _to_save(key, tensor, adapter_name)
    mesh = sharded.mesh_of(layer.lora_A[adapter_name] for layer in layers.values())
    for name, layer in layers.items():
        for letter, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
            key = f"{PREFIX}{places.get(name, name)}.lora_{letter}.weight"
            with offloaded(matrices):
                matrix = _to_save(key, matrices[adapter_name], adapter_name)
            tensors[key] = expert_adapter_files.to_file(letter, matrix)

    def write() -> None:
        os.makedirs(folder, exist_ok=True)
        with exclusive(os.fspath(folder)):  # two saves at once would pair one's weights with the other's configuration
            _write(os.fspath(folder), tensors, config)

    sharded.on_first_process(mesh, write)


def _to_save(key: str, tensor: Tensor, adapter_name: str) -> Tensor:
    if tensor.is_meta:
        raise RuntimeError(f"{key} is on the meta device and has no values to save; bring offloaded weights back first")
    if not is_sharded(tensor):
        dispatcher.require_memory(key, tensor)
    value = sharded.whole(tensor).cpu()
    if not torch.isfinite(value).all():
        raise ValueError(f"{key} of adapter {adapter_name!r} holds NaN or infinity and is not saved")
    return value


def load_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> list[str]:
    """Reads an adapter that :func:`save_adapter` or PEFT wrote, into a model with QLinear or QExperts layers.

    An adapter of the same name is replaced, whatever its rank; layers that the file does not cover lose it. The new
    one is active if the old one was, or if the model has no active adapter; otherwise call
    :func:`qlora_kernels.set_adapter`. Everything is checked before anything changes.

    Args:
        model: a model with QLinear or QExperts layers.
        folder: with adapter_config.json and adapter_model.safetensors.
        adapter_name: what to call it.

    Returns:
        The names of the layers it went into; of experts the names of their weights.

    Raises:
        FileNotFoundError: when the folder, or a file in it, does not exist.
        ValueError: for a truncated or foreign file, an adapter that is not plain LoRA, or one for another model (the
            first layers that do not fit are named); for a module that was trained but is 4-bit here; for a folder that
            other programs keep writing to.
        RuntimeError: when the adapter to be replaced is merged, or when another is merged and this one would be active;
            for a model on the meta device, or sharded by FSDP2 with no such adapter; for one in FSDP1.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    model = _unwrapped(model)
    layers = _layers(model)
    _check_memory(model, layers)
    with unchanging(folder):
        configs, pairs, values = _read(folder, model, layers, adapter_name)
    active = {layer.active_adapter for layer in layers.values()}
    activate = adapter_name in active or active <= {None}
    for name, layer in layers.items():
        merged = layer.merged_adapter_name
        if merged is not None and (activate or merged == adapter_name):
            raise RuntimeError(f"adapter '{merged}' is merged into {name}; unmerge it first")
        if adapter_name not in layer.adapters:
            check_adapter_name(layer, adapter_name)
        _check_shards(layer, name, adapter_name, configs.get(name))
    others = {other for layer in layers.values() for other in layer.adapters} - {adapter_name}
    if values and others:
        raise ValueError(
            f"{folder}: the adapter brings its own {listed(values.names, 3)}, which the model has only once; delete "
            f"its other adapters first: {listed(map(repr, sorted(others)))}"
        )

    values.put()
    for name, layer in layers.items():
        if name in configs:
            _put(layer, adapter_name, configs[name], pairs[name])
        elif adapter_name in layer.adapters:
            layer.delete_adapter(adapter_name)
    if activate:
        for layer in layers.values():
            layer.set_adapter(adapter_name if adapter_name in layer.adapters else None)
    return list(configs)


def _check_memory(model: nn.Module, layers: Mapping[str, Adapters]) -> None:
    sharded.refuse_flat_parameters(model)
    sharded.reshard(model)
    for name, layer in layers.items():
        if layer.weight_packed.is_meta:
            raise RuntimeError(
                f"{name} is on the meta device, where an adapter's values would be lost; load the adapter when the "
                "model has its weights (and before they are offloaded)"
            )


def _check_shards(layer: Adapters, name: str, adapter_name: str, config: AdapterConfig | None) -> None:
    """
    Raises:
        RuntimeError: for a layer of FSDP2 that would get other parameters than it has.
    """
    own = layer.adapters.get(adapter_name)
    if (None if own is None else own.rank) != (None if config is None else config.rank):
        wanted = "is not in the file" if config is None else f"has rank {config.rank} in the file"
        ours = "does not have it" if own is None else f"has it with rank {own.rank}"
        refuse_sharded(layer, f"adapter {adapter_name!r} {wanted}, while {name} {ours}: load it")


def _put(layer: Adapters, name: str, config: AdapterConfig, pair: Mapping[str, Tensor]) -> None:
    if not is_sharded(layer.weight_packed):
        put_adapter(layer, name, config, pair["A"], pair["B"])
        return
    sharded.fill(layer.lora_A[name], pair["A"])
    sharded.fill(layer.lora_B[name], pair["B"])
    set_config(layer, name, config)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _layers(model: nn.Module) -> dict[str, Adapters]:
    if isinstance(model, (QLinear, QExperts)):
        raise ValueError(
            f"the model is itself a {type(model).__name__}; PEFT's format has names only for layers within a model"
        )
    layers = {peft_config.WRAPPERS.sub("", name): layer for name, layer in adapted_layers(model)}
    if not layers:
        raise ValueError("the model has no QLinear layers; quantize it with quantize_model first")
    return layers


# ------------------------------------------------------------------------------------------------------- writing


def _write(folder: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    config_path, weights_path = os.path.join(folder, CONFIG_NAME), os.path.join(folder, WEIGHTS_NAME)
    # A configuration that contradicts the new weights is removed before they arrive; the old weights carry a copy.
    obsolete = os.path.exists(config_path) and _carries_copy(weights_path) and _contradicts(config_path, config)

    def write(temporary: str) -> None:
        save_safetensors(tensors, temporary, metadata={"format": "pt", _COPY: json.dumps(config)})
        if obsolete:
            os.unlink(config_path)

    write_atomically(weights_path, write)
    save_json(config, config_path)


def _carries_copy(path: str) -> bool:
    try:
        return _COPY in read_header(path)[1]
    except (FileNotFoundError, ValueError):
        return False


def _contradicts(path: str, config: Mapping[str, Any]) -> bool:
    try:
        return bool(peft_config.differences(config, load_json(path)))
    except ValueError:
        return True


# ------------------------------------------------------------------------------------------------------- reading


_Pairs = dict[str, dict[str, Tensor]]  # {layer: {"A": ..., "B": ...}}


_Found = tuple[dict[str, AdapterConfig], _Pairs, Values]


def _read(folder: str, model: nn.Module, layers: Mapping[str, Adapters], adapter_name: str) -> _Found:
    """The configuration, the matrices and other values, all of one save, after checking that they fit.

    The matrices have the layer's dtype and device: nothing that can fail is left for when the model changes.

    Programs other than this one take no lock when they write, and some file systems have none.
    """
    paths = [os.path.join(folder, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    for _ in range(_ATTEMPTS):
        before = [identity_of(path) for path in paths]
        try:
            result = _read_once(folder, model, layers, adapter_name)
        except (OSError, ValueError):
            if [identity_of(path) for path in paths] == before:
                raise
        else:
            if [identity_of(path) for path in paths] == before:
                return result
    raise ValueError(f"{folder} is being written by another program; load it when that is done")


def _read_once(folder: str, model: nn.Module, layers: Mapping[str, Adapters], adapter_name: str) -> _Found:
    config_path, weights_path = os.path.join(folder, CONFIG_NAME), os.path.join(folder, WEIGHTS_NAME)
    config = load_json(config_path) if os.path.exists(config_path) else None
    if not os.path.exists(weights_path):
        other = os.path.join(folder, "adapter_model.bin")
        hint = f"; {other} is a pickle, save it again as safetensors" if os.path.exists(other) else ""
        raise FileNotFoundError(f"{weights_path}: no such file{hint}")
    with Reader(weights_path) as file:
        config = _matching_config(config, file.metadata, config_path, weights_path)
        peft_config.check(config, config_path)
        matrices = {key: entry for key, entry in file.entries.items() if _KEY.fullmatch(key)}
        takers = expert_adapter_files.takers(model, layers, config, folder)
        found = _by_layer(_pair(matrices, folder), takers, folder)
        others = {key: entry for key, entry in file.entries.items() if key not in matrices}
        values = read_values(file, others, model, config, weights_path)
        configs = _fit(layers, found, config, folder)
        pairs: _Pairs = {}
        for name in configs:
            options = adapter_options(layers[name], adapter_name)
            pairs[name] = {
                letter: expert_adapter_files.from_file(
                    layers[name], letter, _finite(file, entry, name, letter, options)
                )
                for letter, entry in found[name].items()
            }
    return configs, pairs, values


def _matching_config(
    config: dict[str, Any] | None, metadata: Mapping[str, str], config_path: str, weights_path: str
) -> dict[str, Any]:
    """The configuration, or the weights' copy of it where there is no other; both must be the same."""
    copy = parse_json(metadata[_COPY], f"{weights_path}: the metadata {_COPY}") if _COPY in metadata else None
    if config is None:
        if copy is None:
            raise FileNotFoundError(f"{config_path}: no such file; not an adapter's folder, or an incomplete one")
        return copy
    if copy is not None:
        different = peft_config.differences(copy, config)
        if different:
            raise ValueError(
                f"{config_path} and {weights_path} do not belong together ({'; '.join(different)}): a save was "
                f"interrupted, or one was edited. Remove {CONFIG_NAME} to use the copy that the weights carry"
            )
    return config


def _pair(entries: Mapping[str, Entry], folder: str) -> dict[str, dict[str, Entry]]:
    """The two matrices of each layer, {layer: {"A": ..., "B": ...}}: complete, and floating."""
    path = os.path.join(folder, WEIGHTS_NAME)
    pairs: dict[str, dict[str, Entry]] = {}
    names = {key: match.groups() for key in entries if (match := _KEY.fullmatch(key))}
    if not entries:
        raise ValueError(f"{path} holds no tensors of an adapter")
    for key, entry in entries.items():
        dtype = DTYPES.get(entry.dtype)
        if len(entry.shape) != 2 or dtype is None or not dtype.is_floating_point:
            raise ValueError(
                f"{path}: {key} should be a floating matrix, found {dtype or entry.dtype} {list(entry.shape)}"
            )
        layer, letter = names[key]
        pairs.setdefault(layer, {})[letter] = entry
    lone = [layer for layer, pair in pairs.items() if len(pair) < 2]
    if lone:
        raise ValueError(f"{path}: lora_A and lora_B come together, but one is missing for {listed(lone, 3)}")
    return pairs


def _finite(file: Reader, entry: Entry, layer: str, letter: str, options: Mapping[str, Any]) -> Tensor:
    """The values of a matrix, with a layer's dtype and device."""
    stored = file.read(entry)
    if stored.element_size() == 1:
        stored = stored.float()  # float8 can be converted, and nothing else
    tensor = stored.to(**options, copy=True)
    if not tensor.is_meta and torch.isfinite(tensor).all():
        return tensor
    if not torch.isfinite(stored).all():
        raise ValueError(f"{entry.file}: lora_{letter} of {layer} holds NaN or infinity")
    if not tensor.is_meta:
        raise ValueError(
            f"{entry.file}: lora_{letter} of {layer} holds values too large for the layer's {tensor.dtype}"
        )
    return tensor


def _by_layer(
    pairs: Mapping[str, dict[str, Entry]], takers: Mapping[str, str], folder: str
) -> dict[str, dict[str, Entry]]:
    """The matrices under the names of the layers that take them."""
    unknown = [name for name in pairs if name not in takers]
    if unknown:
        raise ValueError(
            f"{folder}: an adapter for another model: {listed(unknown, 3)} {'are' if len(unknown) > 1 else 'is'} not "
            f"among its QLinear layers{expert_adapter_files.hint(unknown)}, such as {listed(takers, 2) or 'none'}"
        )
    return {takers[name]: pair for name, pair in pairs.items()}


def _fit(
    layers: Mapping[str, Adapters], pairs: Mapping[str, dict[str, Entry]], config: Mapping[str, Any], folder: str
) -> dict[str, AdapterConfig]:
    """The adapter's configuration for each of its layers, after checking that all of them fit the model."""
    configs, misfits, steps = {}, [], peft_config.steps(folder)
    ranks = peft_config.Values(config.get("rank_pattern"), config["r"], steps)
    alphas = peft_config.Values(config.get("alpha_pattern"), config["lora_alpha"], steps)
    for name, pair in pairs.items():
        rank, alpha = ranks.for_layer(name), alphas.for_layer(name)
        layer = layers[name]
        wanted = expert_adapter_files.shapes(layer, rank)
        shapes = (list(pair["A"].shape), list(pair["B"].shape))
        if wanted != shapes:
            misfits.append(f"{name} takes A {wanted[0]} and B {wanted[1]}, found {shapes[0]} and {shapes[1]}")
            continue
        configs[name] = AdapterConfig(
            rank, alpha, float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora"))
        )
        configs[name].check(layer.out_features, layer.in_features, f"{folder}: {name}")
    if misfits:
        raise ValueError(f"{folder}: an adapter for another model, or of another rank: {listed(misfits, 3)}")
    targets = peft_config.Targets(config, steps)
    linear = [name for name, layer in layers.items() if isinstance(layer, QLinear) and targets.has(name)]
    stacks = expert_adapter_files.stacks(layers, config)
    for key, names in (("target_modules", linear), ("target_parameters", stacks)):
        uncovered = [name for name in names if name not in pairs]
        if uncovered:
            raise ValueError(
                f"{folder}: an adapter for another model, or an incomplete one: {key} covers {listed(uncovered, 3)}, "
                f"but {WEIGHTS_NAME} does not"
            )
    return configs
