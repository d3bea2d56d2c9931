"""Where a model's dense weights came from: what an adapter file names as its base."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..storage.formats import load_json

METHOD = "qlora_kernels"  # quant_method in the quantization_config of a 4-bit folder

#: Keys of a 4-bit folder's quantization_config, named as in PEFT's adapter_config.json.
NAME, REVISION = "base_model_name_or_path", "base_model_revision"

# The cache of huggingface_hub: models--<owner>--<name>/snapshots/<commit>.
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})")


class Origin(NamedTuple):
    """A dense model: an id or the path of a folder, and for an id the commit; None where it is not known."""

    name: str | None
    revision: str | None = None


def origin_of_folder(folder: str) -> Origin:
    """What a dense model's folder is: in huggingface_hub's cache an id and a commit, otherwise its absolute path."""
    path = os.path.abspath(folder)
    parent, snapshots, commit = path.rsplit(os.sep, 2) if path.count(os.sep) > 2 else ("", "", "")
    match = _SNAPSHOT.fullmatch(f"{os.path.basename(parent)}/{snapshots}/{commit}")
    return Origin(match[1].replace("--", "/"), match[2]) if match else Origin(path)


def recorded(settings: Mapping[str, Any]) -> Origin:
    """The dense model that the quantization_config of a 4-bit folder names, if it does."""
    name, revision = settings.get(NAME), settings.get(REVISION)
    if not isinstance(name, str) or not name:
        return Origin(None)
    return Origin(name, revision if isinstance(revision, str) and revision else None)


def origin_of_model(model: nn.Module) -> Origin:
    """The dense model that a quantized one was made from, as far as it says.

    Warns:
        UserWarning: when it came from a 4-bit folder that does not name its dense model.
    """
    config, name = getattr(model, "config", None), getattr(model, "name_or_path", None)
    settings = _settings(getattr(config, "quantization_config", None))
    if recorded(settings).name:
        return recorded(settings)
    if not isinstance(name, str) or not name:
        return Origin(None)
    if not os.path.isdir(name):
        commit = getattr(config, "_commit_hash", None)
        return Origin(name, commit if isinstance(commit, str) else None)
    settings = _settings_in(name)
    if settings.get("quant_method") != METHOD:
        return origin_of_folder(name)
    if not recorded(settings).name:
        warnings.warn(
            f"{name} is a 4-bit folder that does not say which dense model it was made from, so the adapter names no "
            "base model; pass base_model_name_or_path to save_adapter",
            stacklevel=3,
        )
    return recorded(settings)


def _settings(value: Any) -> Mapping[str, Any]:
    """A quantization_config as a dictionary: it may be an object of transformers."""
    if not isinstance(value, Mapping) and hasattr(value, "to_dict"):
        value = value.to_dict()
    return value if isinstance(value, Mapping) and value.get("quant_method") == METHOD else {}


def _settings_in(folder: str) -> Mapping[str, Any]:
    try:
        return _settings(load_json(os.path.join(folder, "config.json")).get("quantization_config"))
    except (OSError, ValueError):
        return {}
