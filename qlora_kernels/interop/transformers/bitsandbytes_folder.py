"""The 4-bit layers of a folder that save_pretrained wrote for a model quantized by bitsandbytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import InputError, sentence
from ...formats.bitsandbytes import (
    STATE,
    TENSORS,
    State,
    check_tensors,
    from_bitsandbytes_state,
    parse_state,
    state_key,
)
from ...layers.adapters.config import AdapterConfig
from ...layers.qlinear import QLinear
from ...models.dense_layers import is_conv1d, is_linear_like, matrix_shape
from ...models.places import places_of, put
from ...models.targets import adapted_among
from ...storage.safetensors_stream import DTYPES, Entry, read

_METHOD = "bitsandbytes"
_LARGEST_STATE = 1 << 16


def is_bitsandbytes(settings: dict[str, Any], folder: str) -> bool:
    """Whether a quantization_config is that of bitsandbytes in 4 bits. Files say which layers are 4-bit.

    Raises:
        InputError: for 8 bits.
    """
    if settings.get("quant_method") != _METHOD:
        return False
    if settings.get("load_in_4bit") is True or settings.get("_load_in_4bit") is True:
        return True
    raise InputError(
        f"{folder} is quantized by bitsandbytes, but not to 4 bits (quantization_config has no load_in_4bit); only its "
        "4-bit weights can be used: quantize the dense model instead"
    )


def put_layers(
    model: nn.Module,
    entries: dict[str, Entry],
    folder: str,
    dtype: torch.dtype,
    adapter: AdapterConfig,
    target_modules: str | Sequence[str],
) -> tuple[Sequence[str], dict[str, Entry]]:
    """Replaces by QLinear, with their weights, the layers that are 4-bit in a folder's files.

    Args:
        model: the dense model, on the meta device.
        entries: the tensors of the folder's files.
        folder: for errors.
        dtype: of the layers.
        adapter, target_modules: which adapters there are to be.

    Returns:
        The names of the layers to adapt, and the tensors that are not part of a 4-bit weight, by their names in the
        model.

    Raises:
        InputError: when the files do not fit the model or the format; the sentence names the layer.
        ValueError: for adapters that do not fit.
    """
    entries = _rename(model, entries, folder)
    places = places_of(model, is_linear_like)
    names = _quantized(entries)
    if not names:
        raise InputError(f"{folder} holds no 4-bit weight of bitsandbytes, though its config.json speaks of them")
    states: dict[str, State] = {}
    for name in names:
        if name not in places:
            raise InputError(f"{folder} holds {name}.weight in 4 bits, which is no linear layer of its model")
        with _named(folder):
            states[name] = _check(name, entries)
        _check_shape(name, states[name], model.get_submodule(name), folder)
    adapted = adapted_among(names, target_modules) if adapter.rank else []
    for name in adapted:
        adapter.check(*states[name].shape, name)
    for name in names:
        own = {key: entries.pop(key) for key in _own(name, entries)}
        with _named(folder):
            weight = from_bitsandbytes_state({key: read(entry) for key, entry in own.items()}, f"{name}.weight")
        layer = QLinear.from_nf4(weight, rank=0, dtype=dtype)
        layer.register_parameter("bias", model.get_submodule(name)._parameters.get("bias"))
        layer.fan_in_fan_out = is_conv1d(model.get_submodule(name))
        put(layer.eval(), places[name])
    return adapted, entries


@contextlib.contextmanager
def _named(folder: str) -> Iterator[None]:
    """Puts the folder in front of what the format says; what is no fault of the files is not caught."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {sentence(error)}") from None


def _quantized(entries: dict[str, Entry]) -> list[str]:
    """The names of the 4-bit layers: those with one of bitsandbytes' tensors beside the weight."""
    parts = [key.partition(".weight.") for key in entries]
    return list(dict.fromkeys(name for name, _, rest in parts if rest in TENSORS or rest.startswith(STATE)))


def _own(name: str, entries: dict[str, Entry]) -> list[str]:
    key = f"{name}.weight"
    own = [key, state_key(entries, key)[0], *(f"{key}.{piece}" for piece in TENSORS)]
    return [name for name in own if name in entries]


def _check(name: str, entries: dict[str, Entry]) -> State:
    """Reads a layer's JSON object, and compares types and sizes with it; nothing else is read.

    Raises:
        ValueError: naming the tensor.
    """
    key = f"{name}.weight"
    text, kind = state_key(entries, key)
    entry = entries[text]
    if entry.dtype != "U8" or entry.nbytes > _LARGEST_STATE:
        raise ValueError(f"'{text}' should be at most {_LARGEST_STATE} x U8, found {entry.nbytes} bytes {entry.dtype}")
    state = parse_state(read(entry).numpy().tobytes(), kind, f"'{text}'")

    def found(own: str) -> tuple[torch.dtype | None, int] | None:
        if own not in entries:
            return None
        dtype = DTYPES.get(entries[own].dtype)
        return dtype, entries[own].nbytes // (dtype.itemsize if dtype is not None else 1)

    check_tensors(state, key, found)
    return state


def _check_shape(name: str, state: State, layer: nn.Module, folder: str) -> None:
    if layer._parameters.get("weight") is None:
        raise InputError(f"{folder} holds {name}.weight in 4 bits, which is no parameter of its model")
    expected = matrix_shape(layer)
    if state.shape != expected:
        raise InputError(f"{folder}: {name}.weight should be {list(expected)}, but its quant_state says {state.shape}")


def _rename(model: nn.Module, entries: dict[str, Entry], folder: str) -> dict[str, Entry]:
    """The tensors by their names in the model: files may have the prefix of the model's trunk, or lack it.

    Raises:
        InputError: for two tensors of one name.
    """
    state = model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed: dict[str, Entry] = {}
    for stored, entry in entries.items():
        # The tensors beside a weight have its name, and one of their own.
        weight, dot, rest = stored.partition(".weight.")
        key = f"{weight}.weight" if dot else stored
        key = next((k for k in (key, prefix + key, key.removeprefix(prefix)) if k in state), key)
        key = f"{key}.{rest}" if dot else key
        if key in renamed:
            raise InputError(f"{folder} holds {key} twice, with and without the prefix '{prefix}'")
        renamed[key] = entry
    return renamed
