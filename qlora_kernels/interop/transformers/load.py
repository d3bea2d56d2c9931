"""load_quantized: a model from a 4-bit folder, this package's or bitsandbytes'."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import InputError, readable, require
from ...formats.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from ...layers.adapters.config import AdapterConfig
from ...models.experts import adapted_layers
from ...models.quantize import swap_layers
from ...models.targets import plan
from ...storage.safetensors_stream import DTYPES, Entry, read
from . import recorded
from .bitsandbytes_folder import is_bitsandbytes, put_layers
from .folder import METHOD, read_config, read_entries
from .mark import mark
from .skeleton import config_dtype, load_config, same_parameter, skeleton, skipped


def load_quantized(
    folder: str | os.PathLike,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    target_modules: str | list[str] = "all-linear",
    adapter_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    target_parameters: Sequence[str] = (),
) -> nn.Module:
    """A model from a 4-bit folder, with fresh adapters; everything else is frozen.

    The folder is one that ``qlora-kernels quantize`` wrote, or one that ``save_pretrained`` wrote for a model in 4 bits
    by bitsandbytes, in which case its weights decode to bitsandbytes' bits; bitsandbytes itself is not needed.

    The model is built without memory for its weights and then loaded, so no dense weight ever exists. Its class is the
    one that ``architectures`` in config.json names, or that of a causal language model. It needs transformers.

    Args:
        folder: the folder.
        rank, alpha, dropout, rslora, target_modules, adapter_dtype, target_parameters: as for
            :func:`qlora_kernels.quantize_model`. Folders of bitsandbytes have no 4-bit experts.
        dtype: of everything that is not 4-bit; by default the config's.
        device: where to put the model.

    Raises:
        InputError: for another folder, or one that is damaged or incomplete, or whose parameters or constants are not
            finite; and for a layer of bitsandbytes in blocks of 32, by its name.
        ValueError: for adapters that do not fit.
    """
    folder = os.fspath(folder)
    settings = read_config(folder).get("quantization_config") or {}
    of_bitsandbytes = is_bitsandbytes(settings, folder)
    if settings.get("quant_method") != METHOD and not of_bitsandbytes:
        raise InputError(f"{folder} is not a 4-bit folder of 'qlora-kernels quantize', nor one of bitsandbytes")
    _check_settings(settings, folder)
    entries = read_entries(folder)
    with readable(folder):
        config = load_config(folder)
        dtype = config_dtype(config) if dtype is None else dtype
        config._name_or_path = os.path.abspath(folder)  # an adapter's base is looked up there
        # Every parameter has a tensor in the files, unless it is tied to one that has: there cannot be many more.
        model = skeleton(config, dtype, most=4 * len(entries) + 1000)
    adapter = AdapterConfig(rank, alpha, dropout, rslora)
    if of_bitsandbytes:
        require(
            not target_parameters, ValueError, f"target_parameters: bitsandbytes leaves experts dense, as in {folder}"
        )
        adapted, entries = put_layers(model, entries, folder, dtype, adapter, target_modules)
    else:
        adapted = _swap_layers(model, settings, folder, adapter, target_modules, target_parameters)
    _load(model, entries, folder, dtype)
    layers = dict(adapted_layers(model))
    for name in adapted:
        layers[name].add_adapter("default", rank, alpha, dropout, rslora, dtype=adapter_dtype or dtype)
    mark(model)
    return model.to(device)


def _swap_layers(
    model: nn.Module,
    settings: dict[str, Any],
    folder: str,
    adapter: AdapterConfig,
    target_modules: str | list[str],
    target_parameters: Sequence[str],
) -> tuple[str, ...]:
    """Makes the layers of a model on the meta device 4-bit; returns the names of those to adapt."""
    skip, double_quant = settings.get("modules_to_not_convert", skipped(model)), settings.get("double_quant", True)
    with readable(folder):  # what is wrong without adapters, the folder is to blame for
        experts = recorded.experts(model, settings.get("experts", []))
        plan(model, AdapterConfig(rank=0, alpha=1), skip=skip, double_quant=double_quant, experts=bool(experts))
    planned = plan(
        model,
        adapter,
        target_modules,
        skip,
        double_quant,
        target_parameters=target_parameters,
        experts=experts,
    )
    # Adapters come when there is memory to put values in.
    swap_layers(model, replace(planned, experts=experts, adapted=(), adapted_experts=()))
    return (*planned.adapted, *planned.adapted_experts)


def _check_settings(settings: dict[str, Any], folder: str) -> None:
    """
    Raises:
        InputError: naming the key.
    """

    def require(key: str, usable: bool, expected: str) -> None:
        if key in settings and not usable:
            where = f"{os.path.join(folder, 'config.json')}: {key} in quantization_config"
            raise InputError(f"{where} should be {expected}, found {settings[key]!r:.100}")

    if settings.get("adapters") or settings.get("layers"):
        raise InputError(
            f"{folder} holds adapters, or layers of several kinds; load it with transformers' from_pretrained after "
            "'import qlora_kernels'"
        )
    for key in ("modules_to_not_convert", "experts"):
        value = settings.get(key)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        require(key, names, "a list of names")
    require("double_quant", isinstance(settings.get("double_quant"), bool), "true or false")
    for key, size in (("block_size", BLOCK_SIZE), ("nested_block_size", NESTED_BLOCK_SIZE)):
        require(key, settings.get(key) == size, str(size))


def _load(model: nn.Module, entries: dict[str, Entry], folder: str, dtype: torch.dtype) -> None:
    """Gives a model on the meta device its tensors from a folder; tied parameters need to be there only once.

    Parameters get the type ``dtype``; buffers, such as rotary frequencies, keep theirs.
    """
    state = model.state_dict()
    unexpected = sorted(set(entries) - set(state))
    if unexpected:
        hint = (
            "; from_pretrained of transformers reads folders with dense experts" if "experts" in unexpected[0] else ""
        )
        raise InputError(f"{folder} holds {unexpected[0]}, which its model does not have{hint}")
    types = dict.fromkeys(dict(model.named_parameters(remove_duplicate=False)), dtype)
    values = {key: _read(key, entry, state[key], types.get(key), folder) for key, entry in entries.items()}
    missing = sorted(set(state) - set(values))
    for key in list(missing):
        twin = next((k for k in values if same_parameter(model, k, key)), None)
        if twin is not None:
            values[key] = values[twin]
            missing.remove(key)
    missing = [key for key in missing if state[key].is_meta]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} tensors of its model, first {missing[0]}")
    with readable(folder):
        try:
            model.load_state_dict(values, strict=False, assign=True)
        except RuntimeError as error:  # a heading, and a line for each misfit
            raise InputError(f"{folder}: {str(error).strip().splitlines()[-1].strip()}") from None
    cast(Any, model).tie_weights()  # a method of transformers' models
    model.requires_grad_(False)


def _read(key: str, entry: Entry, expected: Tensor, cast_to: torch.dtype | None, folder: str) -> Tensor:
    """A tensor from a file, which is read only if it fits.

    Args:
        cast_to: for a parameter, the type to give it; its values are checked.

    Raises:
        InputError: when it does not fit, or is a parameter with NaN or infinity, before or after the cast. Constants of
            4-bit weights are checked together, by their layers.
    """
    if entry.shape != tuple(expected.shape):
        raise InputError(f"{folder}: {key} should be {list(expected.shape)}, found {list(entry.shape)}")
    dtype = DTYPES.get(entry.dtype)
    floating = expected.is_floating_point() and dtype is not None and dtype.is_floating_point
    if dtype != expected.dtype and not floating:
        raise InputError(f"{folder}: {key} should be {expected.dtype}, found {entry.dtype}")
    with readable(folder):
        stored = read(entry)
    if cast_to is None or not floating:
        return stored
    value = stored.to(cast_to)
    if _is_finite(value):
        return value
    if not _is_finite(stored):
        raise InputError(f"{folder}: {key} holds NaN or infinity; only finite weights can be used")
    raise InputError(f"{folder}: {key} holds values too large for {cast_to}; load it with another dtype")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    # The extremes show NaN and infinity in one pass, with no copy. float8 has no such function, and no large tensors.
    extremes = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return bool(torch.isfinite(torch.stack(extremes)).all())
