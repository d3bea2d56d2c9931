"""quantize_folder: writes a Hugging Face folder with 4-bit weights, one tensor in memory at a time."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import nn

from ...console.progress import bar
from ...errors import InputError, listed, readable
from ...formats.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, PIECES, check_range, meta_weight, quantize
from ...layers.adapters.config import AdapterConfig
from ...models.dense_layers import is_conv1d, matrix_shape
from ...models.targets import Plan, plan
from ...storage.atomic_folder import new_folder, write_folder_atomically
from ...storage.formats import save_json
from ...storage.safetensors_stream import DTYPES, Entry, Writer, read
from ...version import BASE
from .folder import INDEX, METHOD, copy_other_files, other_files, read_config, read_entries, refuse_outer_link
from .skeleton import load_config, same_parameter, skeleton, skipped


@dataclass(frozen=True)
class FolderReport:
    """What :func:`quantize_folder` wrote.

    Attributes:
        folder: its path.
        layers: linear layers in 4 bits.
        copied: other tensors.
        left_alone: linear layers that stayed dense, with the reason; the printed report names ten.
        bytes_before, bytes_after: of all tensors.
        files: safetensors files written.
    """

    folder: str
    layers: int
    copied: int
    left_alone: dict[str, str]
    bytes_before: int
    bytes_after: int
    files: int

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.layers} linear layers in NF4, {self.copied} other tensors copied, "
            f"{self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB "
            f"in {self.files} file{'s' if self.files != 1 else ''}"
        ]
        if self.left_alone:
            alone = (f"left alone: {name}: {reason}" for name, reason in self.left_alone.items())
            lines.append(listed(alone, separator="\n"))
        return "\n".join(lines)


def quantize_folder(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    double_quant: bool = True,
    max_shard_size: int = 2 * 10**9,
    progress: bool = True,
) -> FolderReport:
    """Writes a model's folder again, with its linear layers in 4 bits and everything else unchanged.

    A quantized layer's tensors are named as in the state dict that :func:`qlora_kernels.quantize_model` leaves;
    :func:`load_quantized` reads the folder. One weight is in memory at a time. The folder appears whole or not at all.

    Args:
        model: folder with config.json and safetensors, in one file or in shards with an index.
        out: the folder to write; must not exist, or be empty.
        double_quant: 4.127 bits per weight rather than 4.5.
        max_shard_size: bytes in a file, at most; a single layer that is larger gets a file of its own.
        progress: show a bar.

    Raises:
        InputError: for a model that is missing, damaged, already 4-bit or not finite, for links to files outside its
            folder (the cache of huggingface_hub excepted), for an ``out`` that is not empty or cannot be written, and
            for a ``max_shard_size`` below 1.
    """
    if not max_shard_size >= 1:
        raise InputError(f"max_shard_size should be at least 1 byte, found {max_shard_size}")
    model, out = os.fspath(model), os.path.abspath(os.fspath(out))
    config = read_config(model)
    _check_source(model, config)
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise InputError(f"{out} exists already and is not an empty folder")
    planned, conversions = _plan_conversions(model, double_quant)
    shards = _shards(conversions, max_shard_size)

    def write(folder: str) -> None:
        copy_other_files(model, folder)
        with bar(show=progress, total=len(conversions), desc="quantizing", unit="tensor") as shown:
            weight_map = _write_shards(folder, shards, double_quant, shown)
        if len(shards) > 1:
            size = sum(conversion.nbytes for conversion in conversions)
            save_json({"metadata": {"total_size": size}, "weight_map": weight_map}, os.path.join(folder, INDEX))
        quantization = _describe(planned)
        save_json({**config, "quantization_config": quantization}, os.path.join(folder, "config.json"))

    try:
        with new_folder(os.path.dirname(out)):
            write_folder_atomically(out, write)
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written: {error.strerror or error}") from None
    return FolderReport(
        folder=out,
        layers=len(planned.quantized),
        copied=sum(not conversion.quantized for conversion in conversions),
        left_alone=dict(planned.left_alone),
        bytes_before=sum(conversion.source.nbytes for conversion in conversions),
        bytes_after=sum(conversion.nbytes for conversion in conversions),
        files=len(shards),
    )


def _check_source(model: str, config: dict) -> None:
    for name in other_files(model):
        refuse_outer_link(model, name)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise InputError(f"{model} is quantized already (by {method}); a model with dense weights was expected")


def _describe(planned: Plan) -> dict[str, object]:
    """The quantization_config of the new folder's config.json."""
    return {
        "quant_method": METHOD,
        "version": BASE,
        "double_quant": planned.double_quant,
        "block_size": BLOCK_SIZE,
        "nested_block_size": NESTED_BLOCK_SIZE,
        "modules_to_not_convert": sorted(planned.left_alone),
    }


# ------------------------------------------------------------------------------------------------ what to write


@dataclass(frozen=True)
class _Conversion:
    """One tensor of the source, and what it is written as: a copy, or the pieces of a 4-bit weight."""

    key: str
    source: Entry
    outputs: dict[str, Entry]
    quantized: bool
    transposed: bool = False  # the source holds [in, out]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.outputs.values())


def _plan_conversions(model: str, double_quant: bool) -> tuple[Plan, list[_Conversion]]:
    """Which layers of the model in a folder become 4-bit, and what becomes of each tensor in its files."""
    entries = read_entries(model)
    with readable(model):
        bones = skeleton(load_config(model))
    names = _match_names(model, bones, entries)
    with readable(model):
        planned = plan(bones, AdapterConfig(rank=0, alpha=1), skip=skipped(bones), double_quant=double_quant)
    return planned, _conversions(model, entries, names, bones, planned)


def _conversions(
    model: str, entries: dict[str, Entry], names: dict[str, str], bones: nn.Module, planned: Plan
) -> list[_Conversion]:
    """What becomes of each tensor, in the order of the source."""
    quantized = {f"{name}.weight" for name in planned.quantized}
    state = bones.state_dict()
    conversions = []
    for stored, key in names.items():
        entry, expected = entries[stored], tuple(state[key].shape)
        if entry.shape != expected:
            raise InputError(f"{model}: {stored} is {list(entry.shape)}, but the config says {list(expected)}")
        if key not in quantized:
            copy = {key: Entry(entry.dtype, entry.shape, entry.nbytes)}
            conversions.append(_Conversion(key, entry, copy, quantized=False))
            continue
        if DTYPES.get(entry.dtype) not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"{model}: {stored} is {entry.dtype}; F32, BF16 and F16 can be quantized")
        layer = bones.get_submodule(key.removesuffix(".weight"))
        n, k = matrix_shape(layer)
        weight = meta_weight(n, k, planned.double_quant)
        pieces = {
            f"{key}_{name}": Entry.like(piece)
            for name, piece in zip(PIECES, weight.pieces, strict=True)
            if piece is not None
        }
        conversions.append(_Conversion(key, entry, pieces, quantized=True, transposed=is_conv1d(layer)))
    return conversions


def _shards(conversions: list[_Conversion], limit: int) -> list[list[_Conversion]]:
    """Deals them out to files of at most ``limit`` bytes; a layer is never cut."""
    shards: list[list[_Conversion]] = [[]]
    size = 0
    for conversion in conversions:
        if shards[-1] and size + conversion.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(conversion)
        size += conversion.nbytes
    return shards


# ------------------------------------------------------------------------------------------------ writing


def _write_shards(folder: str, shards: list[list[_Conversion]], double_quant: bool, shown) -> dict[str, str]:
    """Writes the safetensors files, and returns which of them holds each tensor."""
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        outputs = {key: entry for conversion in shard for key, entry in conversion.outputs.items()}
        weight_map.update(dict.fromkeys(outputs, name))
        with Writer(os.path.join(folder, name), outputs) as writer:
            for conversion in shard:
                _write_tensor(writer, conversion, double_quant)
                shown.update(1)
    return weight_map


def _write_tensor(writer: Writer, conversion: _Conversion, double_quant: bool) -> None:
    key = conversion.key
    if not conversion.quantized:
        writer.copy(key, conversion.source)
        return
    try:
        dense = read(conversion.source)
        weight = quantize(dense.t() if conversion.transposed else dense, double_quant, name=key)
        check_range(weight, key)
    except ValueError as error:
        raise InputError(str(error)) from None
    for name in conversion.outputs:
        writer.write(name, getattr(weight, name.removeprefix(f"{key}_")))


# ------------------------------------------------------------------------------------------------ names


def _match_names(model: str, bones: nn.Module, entries: dict[str, Entry]) -> dict[str, str]:
    """Names in the files -> names in the model. Files may have the prefix of the model's trunk, or lack it.

    Raises:
        InputError: when the files hold a tensor that the model lacks, or lack one of the model's.
    """
    state = bones.state_dict()
    prefix = f"{getattr(bones, 'base_model_prefix', '')}."
    ignored = [re.compile(p) for p in (getattr(bones, "_keys_to_ignore_on_load_unexpected", None) or [])]
    names, unknown = {}, []
    for stored in entries:
        key = next((k for k in (stored, prefix + stored, stored.removeprefix(prefix)) if k in state), None)
        if key is not None:
            names[stored] = key
        elif not any(pattern.search(stored) for pattern in ignored) and not stored.endswith("rotary_emb.inv_freq"):
            unknown.append(stored)
    if unknown:
        raise InputError(
            f"{model} holds {unknown[0]}, which {type(bones).__name__} does not have under that name; load the model "
            "with transformers and use qlora_kernels.quantize_model instead"
        )
    present = set(names.values())
    missing = [k for k in state if k not in present and not any(same_parameter(bones, k, other) for other in present)]
    if missing:
        raise InputError(f"{model} lacks {len(missing)} tensors of {type(bones).__name__}, first {missing[0]}")
    # One of several tied names is enough; the model ties the others.
    kept: dict[str, str] = {}
    for stored, key in names.items():
        if not any(same_parameter(bones, key, other) for other in kept.values()):
            kept[stored] = key
    return kept
