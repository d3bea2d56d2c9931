"""A Hugging Face model's folder: its config, its safetensors files, and the other files in it."""

from __future__ import annotations

import os
import shutil
from typing import Any

from ...errors import InputError
from ...storage.formats import load_json
from ...storage.safetensors_stream import Entry, read_header

METHOD = "qlora_kernels"  # quant_method in the quantization_config of a folder of ours
INDEX = "model.safetensors.index.json"
# Files with weights. All others (tokenizer, licence, chat template) are copied.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def read_config(folder: str, flag: str = "") -> dict[str, Any]:
    """config.json.

    Args:
        folder: the model's folder.
        flag: the beginning of an error's sentence.

    Raises:
        InputError: when there is none, or it or its quantization_config is not a JSON object.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise InputError(f"{flag}{folder}: no such folder; a Hugging Face model's folder was expected")
    if not os.path.isfile(path):
        raise InputError(f"{flag}{folder} has no config.json; a Hugging Face model's folder was expected")
    try:
        config = load_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}{error}") from None
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise InputError(f"{flag}{path}: quantization_config should be a JSON object")
    return config


def read_entries(folder: str) -> dict[str, Entry]:
    """All tensors of a folder's safetensors files, without their data.

    Raises:
        InputError: when there are no safetensors files, or one is missing or damaged.
    """
    index = os.path.join(folder, INDEX)
    if os.path.isfile(index):
        try:
            names = sorted(set(load_json(index)["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("file names should be strings")
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is not an index of safetensors files") from None
    elif os.path.isfile(os.path.join(folder, "model.safetensors")):
        names = ["model.safetensors"]
    else:
        raise InputError(f"{folder} has neither model.safetensors nor {INDEX}")
    entries: dict[str, Entry] = {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise InputError(f"{path} is named in the index, but there is no such file")
        try:
            entries.update(read_header(path)[0])
        except ValueError as error:
            raise InputError(str(error)) from None
    return entries


def copy_other_files(model: str, folder: str) -> None:
    """Copies the files of a model's folder that hold no weights; not its subfolders."""
    for name in sorted(os.listdir(model)):
        path = os.path.join(model, name)
        if os.path.isfile(path) and not name.startswith(".") and not name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, os.path.join(folder, name))
