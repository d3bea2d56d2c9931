"""A Hugging Face model's folder: its config, its safetensors files, and the other files in it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

from ...errors import InputError
from ...models.origin import METHOD as METHOD
from ...storage.formats import load_json
from ...storage.safetensors_stream import Entry, read_header

INDEX = "model.safetensors.index.json"
# Files with weights. All others (tokenizer, licence, chat template) are copied.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


# Keys of a config that say how many modules (or names of labels) to make, and more than any model has.
_COUNT = re.compile(r"(^|_)(layers?|blocks?|experts?|depths?|groups?|stages?|labels?)$")
_MOST_MODULES = 100_000

# The cache of huggingface_hub holds files by their digest, and folders of links to them.
_BLOB = re.compile(r"/(models|datasets|spaces)--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})")


def read_config(folder: str, flag: str = "") -> dict[str, Any]:
    """config.json.

    Args:
        folder: the model's folder.
        flag: the beginning of an error's sentence.

    Raises:
        InputError: when there is none, or it or its quantization_config is not a JSON object, or it asks for more
            than data; and when the folder holds pipes or devices.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise InputError(f"{flag}{folder}: no such folder; a Hugging Face model's folder was expected")
    _refuse_special_files(folder, flag)
    if not os.path.isfile(path):
        raise InputError(f"{flag}{folder} has no config.json; a Hugging Face model's folder was expected")
    try:
        config = load_json(path)
        _check_values(config, path)
        # transformers takes one of these instead, if its version is the one in the name.
        for name in _other_configs(config, path):
            other = os.path.join(folder, name)
            if os.path.isfile(other):
                _check_values(load_json(other), other)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}{error}") from None
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise InputError(f"{flag}{path}: quantization_config should be a JSON object")
    return config


def _refuse_special_files(folder: str, flag: str) -> None:
    """Pipes and devices may block whoever reads them, or never end. transformers reads what it finds."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise InputError(f"{flag}{path} is not a regular file")


def _other_configs(config: dict[str, Any], path: str) -> list[str]:
    names = config.get("configuration_files", [])
    if not isinstance(names, list) or not all(map(_is_plain_name, names)):
        raise ValueError(f"{path}: configuration_files should be names of files in the same folder")
    return names


def _check_values(config: dict[str, Any], path: str) -> None:
    """
    Raises:
        ValueError: for numbers of modules that would take for ever to build, and for code from elsewhere.
    """
    for key, value in _nested(config):
        if _COUNT.search(key.lower()) and isinstance(value, int) and value > _MOST_MODULES:
            number = f"{value:,}" if value < 10**15 else "more"
            raise ValueError(f"{path}: {key} should be at most {_MOST_MODULES:,}, found {number}")
        if "implementation" in key and isinstance(value, str) and "/" in value:
            raise ValueError(f"{path}: {key} = {value!r} names code to download; remove it")


def _nested(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested objects and lists, each with the key nearest above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            # {"": "sdpa", "vision_config": "..."} gives one setting for each part of a model.
            yield from _nested(inner, key if "implementation" in key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _nested(inner, key)
    else:
        yield key, value


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not set(name) & {*"/\\\0"}


def refuse_outer_link(folder: str, name: str) -> None:
    """Refuses a link that leads out of a folder: what it leads to is not part of the model, and may be private.

    Links into the cache of huggingface_hub are how it lays out its folders.

    Raises:
        InputError: naming the link.
    """
    path = os.path.join(folder, name)
    inside, target = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([inside, target]) != inside and not _BLOB.search(target):
        raise InputError(f"{path} is a link to a file outside the folder; put the file itself there")


def read_entries(folder: str) -> dict[str, Entry]:
    """All tensors of a folder's safetensors files, without their data.

    Raises:
        InputError: when there are no safetensors files, or one is missing, damaged or outside the folder.
    """
    index = os.path.join(folder, INDEX)
    if os.path.isfile(index):
        refuse_outer_link(folder, INDEX)
        try:
            names = set(load_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is not an index of safetensors files") from None
        foreign = [name for name in names if not _is_plain_name(name)]
        if foreign:
            raise InputError(
                f"{index} is not an index of safetensors files in the same folder; it names {foreign[0]!r:.100}"
            )
    elif os.path.isfile(os.path.join(folder, "model.safetensors")):
        names = {"model.safetensors"}
    else:
        raise InputError(f"{folder} has neither model.safetensors nor {INDEX}")
    entries: dict[str, Entry] = {}
    for name in sorted(names):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise InputError(f"{path} is named in the index, but there is no such file")
        refuse_outer_link(folder, name)
        try:
            entries.update(read_header(path)[0])
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from None
    return entries


def copy_other_files(model: str, folder: str) -> None:
    """Copies the files of a model's folder that hold no weights; not its subfolders.

    Raises:
        InputError: for a link that leads out of the folder.
    """
    for name in other_files(model):
        refuse_outer_link(model, name)
        shutil.copyfile(os.path.join(model, name), os.path.join(folder, name))


def other_files(model: str) -> list[str]:
    """The files of a model's folder that hold no weights."""
    return [
        name
        for name in sorted(os.listdir(model))
        if os.path.isfile(os.path.join(model, name)) and name[0] != "." and not name.endswith(_WEIGHT_SUFFIXES)
    ]
