"""Hugging Face folders with 4-bit weights: writing one with one tensor in memory at a time, and loading one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import nn

from ...console.progress import bar
from ...errors import InputError, readable
from ...formats.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight, check_range, quantize
from ...models.quantize import QuantizeReport, quantize_model
from ...storage.atomic_folder import new_folder, write_folder_atomically
from ...storage.formats import save_json
from ...storage.safetensors_stream import DTYPES, Entry, Writer, read
from ...version import BASE
from .folder import INDEX, METHOD, copy_other_files, read_config, read_entries
from .skeleton import same_parameter, skeleton, skipped


@dataclass(frozen=True)
class FolderReport:
    """What :func:`quantize_folder` wrote.

    Attributes:
        folder: where.
        layers: linear layers in 4 bits.
        copied: other tensors.
        left_alone: linear layers that stayed dense, with the reason.
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
        lines += [f"left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def quantize_folder(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    double_quant: bool = True,
    max_shard_size: int = 2 * 10**9,
    progress: bool = True,
) -> FolderReport:
    """Writes a folder with the linear layers of a model in 4 bits and everything else as it was.

    The tensors of a quantized layer have the names that they have in the state dict of a model that
    :func:`qlora_kernels.quantize_model` made; :func:`load_quantized` reads the folder. One weight is in memory at a
    time. The folder appears whole or not at all.

    Args:
        model: folder with config.json and safetensors, in one file or in shards with an index.
        out: the folder to write; must not exist, or be empty.
        double_quant: 4.127 bits per weight rather than 4.5.
        max_shard_size: bytes in a file, at most; a single layer that is larger gets a file of its own.
        progress: show a bar.

    Raises:
        InputError: for a model that is missing, damaged, 4-bit already or not finite, for an ``out`` that holds
            something or cannot be written, and for a ``max_shard_size`` below 1.
    """
    if not max_shard_size >= 1:
        raise InputError(f"max_shard_size should be at least 1 byte, found {max_shard_size}")
    model, out = os.fspath(model), os.path.abspath(os.fspath(out))
    config = read_config(model)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise InputError(f"{model} is quantized already (by {method}); a model with dense weights was expected")
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise InputError(f"{out} exists already and is not an empty folder")
    entries = read_entries(model)
    with readable(model):
        from transformers import AutoConfig

        bones = skeleton(AutoConfig.from_pretrained(model))
    names = _match_names(model, bones, entries)
    weights = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in bones.named_modules()
        if isinstance(module, nn.Linear)
    }
    with readable(model):
        report = quantize_model(bones, rank=0, skip=skipped(bones), double_quant=double_quant, progress=False)
    plan = _plan(model, entries, names, bones, report, weights)
    shards = _shards(plan, max_shard_size)

    def write(folder: str) -> None:
        copy_other_files(model, folder)
        weight_map = {}
        with bar(show=progress, total=len(plan), desc="quantizing", unit="tensor") as shown:
            for number, shard in enumerate(shards, 1):
                name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
                outputs = {key: entry for group in shard for key, entry in group.outputs.items()}
                weight_map.update(dict.fromkeys(outputs, name))
                with Writer(os.path.join(folder, name), outputs) as writer:
                    for group in shard:
                        _write_group(writer, group, double_quant)
                        shown.update(1)
        size = sum(group.nbytes for group in plan)
        if len(shards) > 1:
            save_json({"metadata": {"total_size": size}, "weight_map": weight_map}, os.path.join(folder, INDEX))
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": BASE,
            "double_quant": double_quant,
            "block_size": BLOCK_SIZE,
            "nested_block_size": NESTED_BLOCK_SIZE,
            "modules_to_not_convert": sorted(report.left_alone),
        }
        save_json(config, os.path.join(folder, "config.json"))

    try:
        with new_folder(os.path.dirname(out)):
            write_folder_atomically(out, write)
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written: {error.strerror or error}") from None
    return FolderReport(
        folder=out,
        layers=len(report.quantized),
        copied=sum(not group.quantized for group in plan),
        left_alone=report.left_alone,
        bytes_before=sum(group.source.nbytes for group in plan),
        bytes_after=sum(group.nbytes for group in plan),
        files=len(shards),
    )


# ------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class _Group:
    """One tensor of the source, and what becomes of it: itself, or the pieces of a 4-bit weight."""

    key: str
    source: Entry
    outputs: dict[str, Entry]
    quantized: bool

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.outputs.values())


def _plan(
    model: str,
    entries: dict[str, Entry],
    names: dict[str, str],
    bones: nn.Module,
    report: QuantizeReport,
    weights: dict[str, tuple[int, ...]],
) -> list[_Group]:
    """What to write, in the order of the source."""
    quantized = {f"{name}.weight" for name in report.quantized}
    state = bones.state_dict()
    plan = []
    for stored, key in names.items():
        entry = entries[stored]
        if key not in quantized:
            expected = tuple(state[key].shape)
            if entry.shape != expected:
                raise InputError(f"{model}: {stored} is {list(entry.shape)}, but the config says {list(expected)}")
            plan.append(_Group(key, entry, {key: Entry(entry.dtype, entry.shape, entry.nbytes)}, False))
            continue
        if entry.shape != weights[key]:
            raise InputError(f"{model}: {stored} is {list(entry.shape)}, but the config says {list(weights[key])}")
        if DTYPES.get(entry.dtype) not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"{model}: {stored} is {entry.dtype}; F32, BF16 and F16 can be quantized")
        pieces = {name: Entry.like(tensor) for name, tensor in state.items() if name.startswith(f"{key}_")}
        plan.append(_Group(key, entry, pieces, True))
    return plan


def _shards(plan: list[_Group], limit: int) -> list[list[_Group]]:
    """Cuts the plan into files of at most ``limit`` bytes, never through a layer."""
    shards: list[list[_Group]] = [[]]
    size = 0
    for group in plan:
        if shards[-1] and size + group.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return shards


def _write_group(writer: Writer, group: _Group, double_quant: bool) -> None:
    if not group.quantized:
        writer.copy(group.key, group.source)
        return
    try:
        weight: NF4Weight = quantize(read(group.source), double_quant, name=group.key)
        check_range(weight, group.key)
    except ValueError as error:
        raise InputError(str(error)) from None
    for name in group.outputs:
        writer.write(name, getattr(weight, name[len(group.key) + 1 :]))


def _match_names(model: str, bones: nn.Module, entries: dict[str, Entry]) -> dict[str, str]:
    """Names in the files -> names in the model: a file may lack, or have, the prefix of the model's trunk.

    Raises:
        InputError: when a tensor has no place in the model, or the model's has none in the files.
    """
    state = bones.state_dict()
    prefix = f"{getattr(bones, 'base_model_prefix', '')}."
    ignored = [re.compile(p) for p in (getattr(bones, "_keys_to_ignore_on_load_unexpected", None) or [])]
    names, strange = {}, []
    for stored in entries:
        key = next((k for k in (stored, prefix + stored, stored.removeprefix(prefix)) if k in state), None)
        if key is not None:
            names[stored] = key
        elif not any(pattern.search(stored) for pattern in ignored) and not stored.endswith("rotary_emb.inv_freq"):
            strange.append(stored)
    if strange:
        raise InputError(
            f"{model} holds {strange[0]}, which {type(bones).__name__} does not have under that name; load the model "
            "with transformers and use qlora_kernels.quantize_model instead"
        )
    present = set(names.values())
    missing = [k for k in state if k not in present and not any(same_parameter(bones, k, other) for other in present)]
    if missing:
        raise InputError(f"{model} lacks {len(missing)} tensors of {type(bones).__name__}, first {missing[0]}")
    # Of tied names one is enough; the model ties the others.
    kept: dict[str, str] = {}
    for stored, key in names.items():
        if not any(same_parameter(bones, key, other) for other in kept.values()):
            kept[stored] = key
    return kept
