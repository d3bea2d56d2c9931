"""NF4Config: the quantization_config of a 4-bit model, an argument of from_pretrained and part of config.json."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...errors import peft_names
from ...formats.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from ...layers.adapters.config import AdapterConfig
from ...models.origin import NAME, REVISION
from ...models.targets import checked_names
from ...version import BASE
from .folder import METHOD

# Floating types by the names that JSON has for them.
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

# What a layer's entry in "layers", and a group's in "adapters", may hold, with the type of each value.
_LAYER = {"double_quant": bool, "nf4_levels": bool, "dtype": str}
_GROUP = {"name": str, "rank": int, "alpha": (int, float), "dropout": (int, float), "rslora": bool, "dtype": str}
_GROUP_NEEDS = ("name", "rank", "alpha")


class NF4Config:
    """How to load a transformers model in 4 bits: ``from_pretrained(model, quantization_config=NF4Config())``.

    The linear layers become :class:`QLinear`, and a mixture's experts :class:`QExperts`, each as its weight comes from
    the disk. Everything is frozen but new adapters and parts that the checkpoint does not hold, such as a new head. A
    4-bit folder needs no argument: the same settings lie in the ``quantization_config`` of its config.json, which
    ``save_pretrained`` and ``qlora-kernels quantize`` write. An argument may add adapters to it.

    Args:
        double_quant: 4.127 bits per weight rather than 4.5.
        skip: layers to leave dense, as for :func:`quantize_model`; by default the output embedding. Tied layers are
            always left dense.
        rank: of a new adapter "default" on each layer; 0, the default, adds none.
        alpha, dropout, rslora, target_modules, target_parameters: of the new adapters, as for :func:`quantize_model`.
        adapter_dtype: of the new adapters, by default that of the model; float32 keeps master copies.
        modules_to_not_convert: another name of ``skip``, which config.json uses.
        settings: others from a folder's config.json.

    Raises:
        ValueError: for a value out of range, and for a setting that this version does not know.
        TypeError: for a value of another type, and for PEFT's names.
    """

    quant_method = METHOD

    @peft_names
    def __init__(
        self,
        double_quant: bool = True,
        skip: str | Sequence[str] | None = None,
        rank: int = 0,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        target_modules: str | Sequence[str] = "all-linear",
        adapter_dtype: torch.dtype | None = None,
        *,
        target_parameters: Sequence[str] = (),
        modules_to_not_convert: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        if skip is not None and modules_to_not_convert is not None:
            raise ValueError("skip and modules_to_not_convert are the same; give one of them")
        _check_stored(settings)
        if not isinstance(double_quant, bool):
            raise TypeError(f"double_quant should be true or false, found {double_quant!r:.100}")
        AdapterConfig(rank, alpha, dropout, rslora).check(sys.maxsize, sys.maxsize)
        if adapter_dtype is not None and adapter_dtype not in _DTYPES.values():
            raise TypeError(f"adapter_dtype should be one of {', '.join(_DTYPES)}, found {adapter_dtype}")
        self.double_quant = double_quant
        self.modules_to_not_convert = _names("skip", modules_to_not_convert if skip is None else skip)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.target_modules = _names("target_modules", target_modules)
        self.target_parameters = list(checked_names("target_parameters", target_parameters))
        self.adapter_dtype = adapter_dtype
        #: The adapters that a folder holds: groups of layers with the same settings.
        self.adapters: list[dict[str, Any]] = settings.get("adapters", [])
        #: Layers whose weight or bias differs from the others'.
        self.layers: dict[str, dict[str, Any]] = settings.get("layers", {})
        #: The modules of a mixture's experts that a folder holds in 4 bits.
        self.experts: list[str] = settings.get("experts", [])
        #: The dense model that the weights came from, which adapters name as their base, and its commit.
        self.base_model_name_or_path: str | None = settings.get(NAME)
        self.base_model_revision: str | None = settings.get(REVISION)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> NF4Config | tuple[NF4Config, dict[str, Any]]:
        """From a folder's ``quantization_config``.

        Raises:
            ValueError: for settings that this version does not know, or that are not as it writes them.
        """
        try:
            config = cls(**{key: value for key, value in config_dict.items() if key != "return_unused_kwargs"})
        except TypeError as error:
            raise ValueError(f"quantization_config in config.json: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it; what is there for new adapters alone is left out."""
        described: dict[str, Any] = {
            "quant_method": METHOD,
            "version": BASE,
            "double_quant": self.double_quant,
            "block_size": BLOCK_SIZE,
            "nested_block_size": NESTED_BLOCK_SIZE,
        }
        if self.modules_to_not_convert is not None:
            described["modules_to_not_convert"] = self.modules_to_not_convert
        if self.layers:
            described["layers"] = self.layers
        if self.experts:
            described["experts"] = self.experts
        if self.adapters:
            described["adapters"] = self.adapters
        if self.base_model_name_or_path is not None:
            described |= {NAME: self.base_model_name_or_path, REVISION: self.base_model_revision}
        return copy.deepcopy(described)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of from_pretrained may add to a folder's own settings: new adapters."""
        names = ("rank", "alpha", "dropout", "rslora", "target_modules", "target_parameters", "adapter_dtype")
        return {name: getattr(self, name) for name in names} if self.rank else {}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Sets the attributes among ``kwargs``, and returns the others."""
        others = {}
        for key, value in kwargs.items():
            if key in self.__dict__:
                setattr(self, key, value)
            else:
                others[key] = value
        return others

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __repr__(self) -> str:
        shown = {**self.to_dict(), **self.get_loading_attributes()}
        return f"{type(self).__name__}({', '.join(f'{key}={value!r:.200}' for key, value in shown.items())})"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as config.json names it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(entry: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that an entry names, None where it names none."""
    return _DTYPES.get(entry.get("dtype", ""))


def _names(argument: str, value: Any) -> Any:
    """Patterns, a sequence of them as a list."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        where = "modules_to_not_convert" if argument == "skip" else argument
        raise TypeError(f"{where} should be a list of names or a regular expression, found {value!r:.100}")
    return list(value)


def _check_stored(settings: Mapping[str, Any]) -> None:
    """Checks the settings that only folders have.

    Raises:
        ValueError, TypeError: naming the key.
    """
    sizes = ("block_size", "nested_block_size")
    known = ("quant_method", "version", *sizes, "adapters", "layers", "experts", NAME, REVISION)
    unknown = [key for key in settings if key not in known]
    if unknown:
        version = settings.get("version", BASE)
        hint = "" if version == BASE else f"; it was written by version {version!r:.40}, this is {BASE}: upgrade"
        raise ValueError(f"NF4Config has no setting {unknown[0]!r:.100}{hint}")
    for key, value in (("quant_method", METHOD), ("block_size", BLOCK_SIZE), ("nested_block_size", NESTED_BLOCK_SIZE)):
        if settings.get(key, value) != value:
            raise ValueError(f"{key} in quantization_config should be {value}, found {settings[key]!r:.100}")
    for key in (NAME, REVISION):
        if not isinstance(settings.get(key), str | None):
            raise TypeError(f"{key} in quantization_config should be a string, found {settings[key]!r:.100}")
    layers, groups = settings.get("layers", {}), settings.get("adapters", [])
    experts = settings.get("experts", [])
    if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
        raise TypeError(f"experts in quantization_config should be a list of names, found {experts!r:.100}")
    if not isinstance(layers, dict):
        raise TypeError(f"layers in quantization_config should be a JSON object, found {layers!r:.100}")
    for name, entry in layers.items():
        _check_entry(f"layers in quantization_config, {name!r:.100}", entry, _LAYER)
    if not isinstance(groups, list):
        raise TypeError(f"adapters in quantization_config should be a list, found {groups!r:.100}")
    for number, group in enumerate(groups):
        _check_group(f"adapters in quantization_config, entry {number}", group)


def _check_group(where: str, group: Any) -> None:
    _check_entry(where, group, {**_GROUP, "active": bool, "layers": list})
    missing = [key for key in _GROUP_NEEDS if key not in group]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    if not all(isinstance(name, str) for name in group.get("layers", [])):
        raise TypeError(f"{where}: layers should be names")
    adapter_of(group).check(sys.maxsize, sys.maxsize, where)


def _check_entry(where: str, entry: Any, types: Mapping[str, Any]) -> None:
    if not isinstance(entry, dict):
        raise TypeError(f"{where} should be a JSON object, found {entry!r:.100}")
    for key, value in entry.items():
        if key not in types:
            raise ValueError(f"{where}: unknown setting {key!r:.100}")
        if not isinstance(value, types[key]) or (isinstance(value, bool) and types[key] is not bool):
            raise TypeError(f"{where}: {key} has the wrong type, found {value!r:.100}")
    if "dtype" in entry and entry["dtype"] not in _DTYPES:
        raise ValueError(f"{where}: dtype should be one of {', '.join(_DTYPES)}, found {entry['dtype']!r:.100}")


def adapter_of(group: Mapping[str, Any]) -> AdapterConfig:
    """The settings of the adapters in a group."""
    return AdapterConfig(group["rank"], group["alpha"], group.get("dropout", 0.0), group.get("rslora", False))
