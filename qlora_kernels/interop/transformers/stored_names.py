"""From the tensors in a checkpoint's files to those of its model: names differ, and some are stored in pieces."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ...errors import InputError, readable
from ...storage.safetensors_stream import DTYPES, Entry, read
from .skeleton import same_parameter

# Buffers that older releases of transformers stored; models compute them.
_COMPUTED = ("rotary_emb.inv_freq", ".position_ids")


@dataclass(frozen=True)
class Source:
    """What one tensor of a model is made from.

    Attributes:
        name: in the files; of the first piece.
        key: in the model.
        pieces: (transformers' pattern, tensor in the files): one, or several to be merged, such as experts that the
            model keeps in one parameter.
        model: on the meta device.
        converter: transformers' WeightConverter that merges them; None for one tensor as it is stored.
    """

    name: str
    key: str
    pieces: tuple[tuple[str, Entry], ...]
    model: nn.Module
    converter: Any = None

    @property
    def dtype(self) -> str:
        return self.pieces[0][1].dtype

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.pieces)

    def check(self, model: str, expected: tuple[int, ...]) -> None:
        """
        Raises:
            InputError: when it cannot have the shape that the model's config asks for.
        """
        entry = self.pieces[0][1]
        if self.converter is None:
            if entry.shape != expected:
                raise InputError(f"{model}: {self.name} is {list(entry.shape)}, but the config says {list(expected)}")
            return
        if {piece.dtype for _, piece in self.pieces} != {entry.dtype}:
            raise InputError(f"{model}: the tensors that make up {self.key}, first {self.name}, differ in type")
        count = sum(math.prod(piece.shape) for _, piece in self.pieces)
        if count != math.prod(expected):
            raise InputError(
                f"{model}: the tensors that make up {self.key}, first {self.name}, have {count:,} elements, but the "
                f"config says {list(expected)}"
            )

    @property
    def stored(self) -> Entry | None:
        """The one tensor in the files that it is, if it is one."""
        return self.pieces[0][1] if self.converter is None else None

    def read(self) -> Tensor:
        """The tensor, merged if it has to be.

        Raises:
            InputError: when the pieces do not fit together.
        """
        if self.converter is None:
            return read(self.pieces[0][1])
        converter = copy.deepcopy(self.converter)
        for pattern, entry in self.pieces:
            converter.add_tensor(self.key, entry.file, pattern, functools.partial(read, entry))
        with readable(f"the tensors that make up {self.key}"):
            made = converter.convert(self.key, model=self.model, config=cast(Any, self.model).config)
        # transformers 5.0 returns the tensors and its own notes of errors.
        value = (made[0] if isinstance(made, tuple) else made).get(self.key)
        value = value[0] if isinstance(value, list) else value
        expected = tuple(self.model.get_parameter(self.key).shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != expected or value.dtype != DTYPES.get(self.dtype):
            raise InputError(f"the tensors that make up {self.key}, first {self.name}, do not fit together")
        return value.contiguous()


def match_names(model: str, bones: nn.Module, entries: Mapping[str, Entry]) -> list[Source]:
    """What each tensor of a model is made from; files may have the prefix of its trunk, or lack it.

    One of several tied names is enough; the model ties the others.

    Args:
        model: the folder, for errors.
        bones: the model, on the meta device.
        entries: the tensors in the files.

    Raises:
        InputError: when the files hold a tensor that the model lacks, or lack one of the model's.
    """
    state = bones.state_dict()
    prefix = f"{getattr(bones, 'base_model_prefix', '')}."
    ignored = [re.compile(p) for p in (getattr(bones, "_keys_to_ignore_on_load_unexpected", None) or [])]
    sources, unknown = {}, {}
    for stored, entry in entries.items():
        key = next((k for k in (stored, prefix + stored, stored.removeprefix(prefix)) if k in state), None)
        if key is not None:
            sources[key] = Source(stored, key, (("", entry),), bones)
        elif not any(pattern.search(stored) for pattern in ignored) and not stored.endswith(_COMPUTED):
            unknown[stored] = entry
    sources |= _converted(bones, unknown, state, taken=sources)
    if unknown:
        raise InputError(
            f"{model} holds {next(iter(unknown))}, which {type(bones).__name__} does not have under that name; load "
            "the model with transformers and use qlora_kernels.quantize_model instead"
        )
    missing = [k for k in state if k not in sources and not any(same_parameter(bones, k, other) for other in sources)]
    if missing:
        raise InputError(f"{model} lacks {len(missing)} tensors of {type(bones).__name__}, first {missing[0]}")
    kept: dict[str, Source] = {}
    for key, source in sources.items():
        if not any(same_parameter(bones, key, other) for other in kept):
            kept[key] = source
    return list(kept.values())


def _converted(
    bones: nn.Module, unknown: dict[str, Entry], state: Mapping[str, Any], taken: Mapping[str, Source]
) -> dict[str, Source]:
    """What transformers renames or merges when it loads; what it knows is taken out of ``unknown``."""
    if not unknown:
        return {}
    try:  # transformers 5
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return {}
    rules = get_model_conversion_mapping(cast(Any, bones), add_legacy=False)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, known = getattr(bones, "base_model_prefix", None), dict(state)
    found: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(unknown, key=dot_natural_key):  # experts in the order of their numbers
        key, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if key in state and key not in taken:
            found.setdefault(key, []).append((stored, pattern or ""))
    sources = {}
    for key, pieces in found.items():
        converter = of_pattern.get(pieces[0][1])
        if (converter is None and len(pieces) > 1) or any(of_pattern.get(p) is not converter for _, p in pieces):
            continue
        if converter is not None and len(converter.target_patterns) > 1:
            continue  # one tensor that is cut into several
        entries = tuple((pattern, unknown.pop(stored)) for stored, pattern in pieces)
        sources[key] = Source(pieces[0][0], key, entries, bones, converter)
    return sources
