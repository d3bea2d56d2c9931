"""Options of a run from a YAML or TOML file, under the names that they have on the command line."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections import Counter
from dataclasses import fields
from typing import Any

from ..errors import InputError, sentence
from ..storage.regular_file import open_regular
from .options import Options

_LARGEST = 1 << 20
# Options of names with commas between, which a file may give as a list.
_LISTS = ("target_modules", "target_parameters", "report_to")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_config_file(path: str) -> dict[str, Any]:
    """The options in a file whose name ends in .yaml, .yml or .toml, by their fields of Options.

    ``eval-tokens`` and ``eval_tokens`` are the same option. A null leaves an option at its default. Paths in the file
    are relative to the working directory, as on the command line.

    Raises:
        InputError: for a file that cannot be read, an option that is not known or given twice, or a value of the
            wrong type.
    """
    where = f"--config {path}"
    readers = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml}
    reader = readers.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise InputError(f"{where}: the name of the file should end in .yaml, .yml or .toml")
    value = reader(_text(path, where), where)
    if value is None:  # an empty YAML file
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where} should hold options and their values, such as 'rank: 16'")
    types = typing.get_type_hints(Options)
    found: dict[str, Any] = {}
    for key, entry in value.items():
        name, entry = _named(key, entry, where)
        if name in found:
            raise InputError(f"{where}: {key!s:.60} is given twice")
        found[name] = None if entry is None else _typed(key, name, entry, types[name], where)
    return {name: entry for name, entry in found.items() if entry is not None}


def _text(path: str, where: str) -> str:
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or sentence(error)}") from None
    except ValueError as error:  # a folder, a pipe
        raise InputError(f"--config: {error}") from None
    if len(content) > _LARGEST:
        raise InputError(f"{where} has more than {_LARGEST >> 20} MiB, which no file of options has")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where} is not in UTF-8") from None


def _toml(text: str, where: str) -> Any:
    try:
        import tomllib as reader  # Python 3.11
    except ImportError:
        try:
            import tomli as reader  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                f"{where}: TOML needs Python 3.11 or the package 'tomli' (pip install tomli); or write it in YAML"
            ) from None
    try:
        return reader.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not TOML ({_reason(error)})") from None


def _yaml(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise InputError(
            f"{where}: YAML needs the package 'pyyaml' (pip install pyyaml); or write it in TOML"
        ) from None

    class Loader(yaml.SafeLoader):
        """Plain values only: no aliases, which can stand for more than fits into memory, and no key twice."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("an alias (*), which files of options cannot have")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            twice = [key for key, count in Counter(keys).items() if count > 1]
            if twice:
                raise InputError(f"{where}: {twice[0]!s:.60} is given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{where} is not YAML ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """What the parser says, and at which line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}: {problem}"
    return sentence(error)


def _named(key: Any, entry: Any, where: str) -> tuple[str, Any]:
    """The field of Options that a key means, and its value: ``no-compare: true`` is ``compare: false``."""
    known = {field.name: field.default for field in fields(Options)}
    name = key.replace("-", "_") if isinstance(key, str) else key
    if name in known:
        return name, entry
    if isinstance(name, str) and name.startswith("no_") and isinstance(known.get(name[3:]), bool):
        if not isinstance(entry, bool):
            raise InputError(f"{where}: {key} should be true or false, found {entry!r:.60}")
        return name[3:], not entry
    near = difflib.get_close_matches(str(name), known, 1)
    guess = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
    raise InputError(f"{where}: {key!r:.60} is not an option of finetune{guess}")


def _typed(key: str, name: str, value: Any, kind: Any, where: str) -> Any:
    """A value of an option's type.

    Raises:
        InputError: for one of another type.
    """
    kinds = set(typing.get_args(kind) or (kind,)) - {type(None)}
    if float in kinds:
        converted, expected = _number(value), "a number"
    elif int in kinds:
        converted, expected = _whole(value), "a whole number"
    elif bool in kinds:
        converted, expected = value if isinstance(value, bool) else None, "true or false"
    else:
        listed = name in _LISTS and isinstance(value, list) and all(isinstance(v, str) for v in value)
        converted = ",".join(value) if listed else value if isinstance(value, str) else None
        expected = "text or a list of texts" if name in _LISTS else "text"
        if not isinstance(value, (list, dict)):
            expected += " (in quotes)"
    if converted is not None:
        return converted
    raise InputError(f"{where}: {key} should be {expected}, found {value!r:.60}")


def _number(value: Any) -> float | None:
    if isinstance(value, str):  # YAML 1.1 reads 2e-4, without a point, as text
        return float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
