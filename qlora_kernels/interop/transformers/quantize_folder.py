"""quantize_folder: writes a Hugging Face folder with 4-bit weights, one tensor in memory at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...console.progress import bar
from ...errors import InputError, listed, readable
from ...formats.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, PIECES, NF4Weight, check_range, meta_weight, quantize
from ...formats.nf4_stack import meta_stack, quantize_stack
from ...layers.adapters.config import AdapterConfig
from ...models.dense_layers import is_conv1d, matrix_shape
from ...models.experts import stacked_weights, weight_stack
from ...models.origin import NAME, REVISION, origin_of_folder
from ...models.targets import Plan, plan
from ...storage.atomic_folder import new_folder, write_folder_atomically
from ...storage.formats import save_json
from ...storage.safetensors_stream import DTYPES, Entry, Writer
from ...version import BASE
from .folder import INDEX, METHOD, copy_other_files, other_files, read_config, read_entries, refuse_outer_link
from .skeleton import load_config, skeleton, skipped
from .stored_names import Source, match_names


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
        experts: a mixture's weights, all experts in one parameter, in 4 bits.
    """

    folder: str
    layers: int
    copied: int
    left_alone: dict[str, str]
    bytes_before: int
    bytes_after: int
    files: int
    experts: int = 0

    def __str__(self) -> str:
        experts = f"and {self.experts} stacks of experts " if self.experts else ""
        lines = [
            f"{self.folder}: {self.layers} linear layers {experts}in NF4, {self.copied} other tensors copied, "
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
    """Writes a model's folder again, with its linear layers and experts in 4 bits and everything else unchanged.

    Any model of transformers that ``architectures`` in config.json names is taken, encoders and classifiers as well as
    language models. Output embeddings and heads stay dense. Experts that a model keeps in one parameter are
    merged where the files have them one by one; of kinds that cannot be 4-bit the report has the bytes.

    A quantized layer's tensors are named as in the state dict that :func:`qlora_kernels.quantize_model` leaves;
    :func:`load_quantized` reads the folder. One weight, or stack of experts, is in memory at a time.
    The folder appears whole or not at all.

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
        quantization = _describe(planned, model)
        save_json({**config, "quantization_config": quantization}, os.path.join(folder, "config.json"))

    try:
        with new_folder(os.path.dirname(out)):
            write_folder_atomically(out, write)
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written: {error.strerror or error}") from None
    return FolderReport(
        folder=out,
        layers=len(planned.quantized),
        experts=sum(conversion.stack is not None for conversion in conversions),
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


def _describe(planned: Plan, model: str) -> dict[str, object]:
    """The quantization_config of the new folder's config.json."""
    origin = origin_of_folder(model)
    experts = {"experts": list(planned.experts)} if planned.experts else {}
    return {
        **experts,
        "quant_method": METHOD,
        "version": BASE,
        "double_quant": planned.double_quant,
        "block_size": BLOCK_SIZE,
        "nested_block_size": NESTED_BLOCK_SIZE,
        "modules_to_not_convert": sorted(planned.left_alone),
        NAME: origin.name,  # adapters that are trained on the folder name this as their base
        REVISION: origin.revision,
    }


# ------------------------------------------------------------------------------------------------ what to write


@dataclass(frozen=True)
class _Conversion:
    """One tensor of the source, and what it is written as: a copy, or the pieces of a 4-bit weight."""

    key: str
    source: Source
    outputs: dict[str, Entry]
    quantized: bool
    transposed: bool = False  # the source holds [in, out]
    stack: torch.Size | None = None  # [E, N, K] of experts

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.outputs.values())


def _plan_conversions(model: str, double_quant: bool) -> tuple[Plan, list[_Conversion]]:
    """Which layers of the model in a folder become 4-bit, and what becomes of each tensor in its files."""
    entries = read_entries(model)
    with readable(model):
        bones = skeleton(load_config(model))
    sources = match_names(model, bones, entries)
    with readable(model):
        planned = plan(
            bones, AdapterConfig(rank=0, alpha=1), skip=skipped(bones), double_quant=double_quant, experts=True
        )
    return planned, _conversions(model, sources, bones, planned)


def _conversions(model: str, sources: list[Source], bones: nn.Module, planned: Plan) -> list[_Conversion]:
    """What becomes of each tensor, in the order of the source."""
    quantized = {f"{name}.weight" for name in planned.quantized}
    stacks = {f"{n}.{weight}" for n in planned.experts for weight in stacked_weights(bones.get_submodule(n))}
    state = bones.state_dict()
    conversions = []
    for source in sources:
        key, expected = source.key, tuple(state[source.key].shape)
        source.check(model, expected)
        if key not in quantized and key not in stacks:
            copy = {key: Entry(source.dtype, expected, source.nbytes)}
            conversions.append(_Conversion(key, source, copy, quantized=False))
            continue
        if DTYPES.get(source.dtype) not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"{model}: {source.name} is {source.dtype}; F32, BF16 and F16 can be quantized")
        if key in stacks:
            conversions.append(_conversion_of_experts(source, bones, planned.double_quant))
            continue
        layer = bones.get_submodule(key.removesuffix(".weight"))
        n, k = matrix_shape(layer)
        weight = meta_weight(n, k, planned.double_quant)
        pieces = {
            f"{key}_{name}": Entry.like(piece)
            for name, piece in zip(PIECES, weight.pieces, strict=True)
            if piece is not None
        }
        conversions.append(_Conversion(key, source, pieces, quantized=True, transposed=is_conv1d(layer)))
    return conversions


def _conversion_of_experts(source: Source, bones: nn.Module, double_quant: bool) -> _Conversion:
    module, _, name = source.key.rpartition(".")
    experts: Any = bones.get_submodule(module)
    shape = weight_stack(experts, name).shape
    n_experts, n, k = shape
    pieces = {
        f"{source.key}.weight_{kind}": Entry.like(piece)
        for kind, piece in zip(PIECES, meta_stack(n_experts, n, k, double_quant).pieces, strict=True)
        if piece is not None
    }
    transposed = bool(experts.is_transposed)
    return _Conversion(source.key, source, pieces, quantized=True, transposed=transposed, stack=shape)


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
        stored = conversion.source.stored
        if stored is not None:
            writer.copy(key, stored)
        else:
            writer.write(key, conversion.source.read())
        return
    try:
        dense = conversion.source.read()
        dense = dense.transpose(-2, -1) if conversion.transposed else dense
        weight = (quantize if conversion.stack is None else quantize_stack)(dense, double_quant, name=key)
        if isinstance(weight, NF4Weight):
            check_range(weight, key)
    except ValueError as error:
        raise InputError(str(error)) from None
    for name in conversion.outputs:
        writer.write(name, getattr(weight, name.removeprefix(key)[1:].removeprefix("weight_")))
