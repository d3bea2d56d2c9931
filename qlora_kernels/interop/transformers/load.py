"""Models from 4-bit folders."""

from __future__ import annotations

import os

import torch
from torch import nn

from ...errors import InputError, readable
from ...models.quantize import quantize_model
from ...models.targets import qlora_layers
from ...storage.safetensors_stream import Entry, read
from .folder import METHOD, read_config, read_entries
from .skeleton import cast_parameters, config_dtype, same_parameter, skeleton, skipped


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
) -> nn.Module:
    """A model from a folder that :func:`quantize_folder` wrote, with fresh adapters; everything else is frozen.

    It is built without memory for its weights and then loaded, so no dense weight ever exists.

    Args:
        folder: the folder.
        rank, alpha, dropout, rslora, target_modules, adapter_dtype: as for :func:`qlora_kernels.quantize_model`.
        dtype: of the parts that are not 4-bit; by default the config's.
        device: where to put it.

    Raises:
        InputError: for a folder that is none of those, is damaged or incomplete.
        ValueError: for adapters that do not fit.
    """
    folder = os.fspath(folder)
    settings = read_config(folder).get("quantization_config") or {}
    if settings.get("quant_method") != METHOD:
        raise InputError(f"{folder} is not a 4-bit folder of 'qlora-kernels quantize'")
    with readable(folder):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        dtype = config_dtype(config) if dtype is None else dtype
        model = skeleton(config, dtype)
    report = quantize_model(
        model,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        target_modules=target_modules,
        skip=list(settings.get("modules_to_not_convert", skipped(model))),
        double_quant=bool(settings.get("double_quant", True)),
        progress=False,
    )
    entries = read_entries(folder)
    _load(model, entries, folder)
    cast_parameters(model, dtype)
    layers = dict(qlora_layers(model))
    for name in report.adapted:
        # What quantize_model made on the meta device has no values.
        layers[name].delete_adapter("default")
        layers[name].add_adapter("default", rank, alpha, dropout, rslora, dtype=adapter_dtype or dtype)
    return model.to(device)


def _load(model: nn.Module, entries: dict[str, Entry], folder: str) -> None:
    """Fills a model on the meta device from a folder's tensors, all but the adapters; tied ones once."""
    state = model.state_dict()
    adapters = {key for key in state if ".lora_A." in key or ".lora_B." in key}
    unexpected = sorted(set(entries) - set(state))
    if unexpected:
        raise InputError(f"{folder} holds {unexpected[0]}, which its model does not have")
    values = {key: read(entry) for key, entry in entries.items()}
    missing = sorted(set(state) - set(values) - adapters)
    for key in list(missing):
        twin = next((k for k in values if same_parameter(model, k, key)), None)
        if twin is not None:
            values[key] = values[twin]
            missing.remove(key)
    missing = [key for key in missing if state[key].is_meta]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} tensors of its model, first {missing[0]}")
    with readable(folder):
        model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
