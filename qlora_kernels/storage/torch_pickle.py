"""The pickle in a file of torch.save, followed step by step without making anything.

``torch.load(weights_only=True)`` runs no code, but may be told to make ``bytearray(1 << 40)``, or to hash a tuple that
holds itself twice at thirty levels. This follows the same operations on placeholders first.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.storage import _storage_type_to_dtype_map


class ForeignContents(ValueError):
    """The file is whole, but holds what this package does not save."""


# Hashing recurses in C without a limit.
_DEEPEST_KEY = 20

_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")
_STORAGE = "torch.storage UntypedStorage"


class _Made:
    """Stands for an object that is no number, text or tuple.

    Attributes:
        kind: "list", "dict", "set", "tensor", "storage", "bytes", "bytearray", "simple" (it has no parts and can be a
            key), or for what GLOBAL names "global".
        parts: a list's elements.
        size: of bytes.
        name: of a global.
    """

    __slots__ = ("kind", "name", "parts", "size")

    def __init__(self, kind: str, size: int = 0, name: str = "") -> None:
        self.kind, self.size, self.name = kind, size, name
        self.parts: list[Any] = []


def check_pickle(data: bytes, storages: Mapping[str, int]) -> None:
    """Refuses a pickle unless torch.load makes of it, in time and memory like its size, what this package saves.

    That is: None, bools, numbers, text, bytes, tuples, lists, dicts, OrderedDicts, sets, dense tensors, parameters,
    dtypes, devices and sizes. Keys and elements of sets are None, bools, numbers, text, bytes, dtypes and devices, and
    tuples of these.

    Args:
        data: the pickle.
        storages: sizes of the storages in the file in bytes, by key.

    Raises:
        ForeignContents: for anything else.
        ValueError, IndexError, KeyError: for a damaged pickle.
    """
    _Follower(storages, 8 * len(data) + 1000).follow(data)


class _Follower:
    def __init__(self, storages: Mapping[str, int], budget: int) -> None:
        self.storages, self.budget = storages, budget
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}

    def follow(self, data: bytes) -> None:
        for code, argument, _ in pickletools.genops(data):
            name = code.name
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE"):
                self.stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                assert argument is not None
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                assert argument is not None
                self.stack.append(self.memo[argument])
            elif name == "STOP":
                return
            elif name == "PROTO":
                _require(argument == 2, f"a pickle of protocol {argument}")
            elif name == "GLOBAL":
                self.stack.append(_global(str(argument)))
            elif name in _STEPS:
                _STEPS[name](self)
            else:
                raise ForeignContents(f"it has the pickle operation {name}, which is not allowed here")

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise ForeignContents("it refers to its own parts too often")

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        parts, self.stack = self.stack, self.outer.pop()
        return parts

    def make_tuple(self, count: int | None) -> None:
        if count is None:
            parts = self.since_mark()
        elif len(self.stack) < count:
            raise ValueError("the pickle is damaged")
        else:
            parts = self.stack[-count:]
            del self.stack[-count:]
        self.stack.append(tuple(parts))

    def append(self, parts: list[Any]) -> None:
        self.container("list").parts.extend(parts)

    def set_items(self, parts: list[Any]) -> None:
        self.container("dict")
        for key in parts[::2]:
            self.check_key(key)

    def container(self, kind: str) -> _Made:
        top = self.stack[-1]
        _require(_is(top, kind), f"something is put into what is no {kind}")
        return top

    def check_key(self, key: Any) -> None:
        left = [(key, 0)]
        while left:
            value, depth = left.pop()
            self.spend(1)
            if type(value) is tuple:
                _require(depth < _DEEPEST_KEY, "a key is nested too deeply")
                self.spend(len(value))
                left += [(inner, depth + 1) for inner in value]
            elif isinstance(value, _Made):
                _require(value.kind in ("bytes", "simple"), f"a {value.kind} is a key or in a set")

    def persistent(self) -> None:
        pid: Any = self.stack.pop()
        _require(type(pid) is tuple and len(pid) == 5 and pid[0] == "storage", "a reference to no storage")
        _, kind, key, location, count = pid
        width = _element_size(kind)
        if not (width and type(key) is str and type(location) is str and type(count) is int and count >= 0):
            raise ForeignContents("it has a reference to no storage")
        if count * width > self.storages[key]:
            raise ValueError(f"storage {key!r} is cut off")
        self.stack.append(_Made("storage"))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if _is(function, "global") else ""
        _require(name in _CALLS, f"a call of {name.replace(' ', '.') or 'something'} is not allowed")
        _require(type(arguments) is tuple, f"a call of {name.replace(' ', '.')} without arguments")
        result = _CALLS[name](self, *arguments) if len(arguments) <= 10 else None
        _require(result is not None, f"a call of {name.replace(' ', '.')} with other arguments than torch.save writes")
        self.stack.append(result)

    def make_tensor(self, *arguments: Any) -> _Made | None:
        if len(arguments) < 6 or not _is(arguments[0], "storage"):
            return None
        for sizes in arguments[2:4]:
            if type(sizes) is not tuple:
                return None
            self.spend(len(sizes))
        return _Made("tensor")

    def make_parameter(self, *arguments: Any) -> _Made | None:
        return _Made("tensor") if len(arguments) == 3 and _is(arguments[0], "tensor") else None

    def make_dict(self, *arguments: Any) -> _Made | None:
        return None if arguments else _Made("dict")

    def make_set(self, *arguments: Any) -> _Made | None:
        if len(arguments) != 1 or not _is(arguments[0], "list"):
            return None
        for part in arguments[0].parts:
            self.check_key(part)
        return _Made("set")

    def make_complex(self, *arguments: Any) -> complex | None:
        return complex(*arguments) if [*map(type, arguments)] == [float, float] else None

    def make_bytes(self, *arguments: Any) -> _Made | None:
        if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
            return None
        self.spend(len(arguments[0]))
        return _Made("bytes", len(arguments[0]))

    def make_bytearray(self, *arguments: Any) -> _Made | None:
        if arguments and not (len(arguments) == 1 and _is(arguments[0], "bytes")):
            return None
        self.spend(sum(one.size for one in arguments))
        return _Made("bytearray")

    def make_size(self, *arguments: Any) -> tuple[Any, ...] | None:
        if len(arguments) != 1 or type(arguments[0]) is not tuple:
            return None
        self.spend(len(arguments[0]))
        return arguments[0] if all(type(one) is int for one in arguments[0]) else None

    def make_device(self, *arguments: Any) -> _Made | None:
        return _Made("simple") if [*map(type, arguments)] in ([str], [str, int]) else None


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

_STEPS: dict[str, Callable[[_Follower], None]] = {
    "MARK": _Follower.mark,
    "EMPTY_LIST": lambda f: f.stack.append(_Made("list")),
    "EMPTY_DICT": lambda f: f.stack.append(_Made("dict")),
    "TUPLE": lambda f: f.make_tuple(None),
    "TUPLE1": lambda f: f.make_tuple(1),
    "TUPLE2": lambda f: f.make_tuple(2),
    "TUPLE3": lambda f: f.make_tuple(3),
    "APPEND": lambda f: f.append([f.stack.pop()]),
    "APPENDS": lambda f: f.append(f.since_mark()),
    "SETITEM": lambda f: f.set_items([f.stack.pop(), f.stack.pop()][::-1]),
    "SETITEMS": lambda f: f.set_items(f.since_mark()),
    "BINPERSID": _Follower.persistent,
    "REDUCE": _Follower.call,
}

_CALLS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_TENSORS, _Follower.make_tensor),
    "torch._utils _rebuild_parameter": _Follower.make_parameter,
    "collections OrderedDict": _Follower.make_dict,
    "__builtin__ set": _Follower.make_set,
    "__builtin__ complex": _Follower.make_complex,
    "__builtin__ bytearray": _Follower.make_bytearray,
    "_codecs encode": _Follower.make_bytes,
    "torch Size": _Follower.make_size,
    "torch device": _Follower.make_device,
}


def _global(name: str) -> _Made:
    if name in _CALLS or name == _STORAGE:
        return _Made("global", name=name)
    module, _, attribute = name.partition(" ")
    value = getattr(torch, attribute, None) if module == "torch" else None
    if isinstance(value, torch.dtype):
        return _Made("simple")
    known = module == "torch" and attribute in _storage_type_to_dtype_map()
    _require(known, f"it names {name.replace(' ', '.')}, which is not allowed here")
    return _Made("global", name=name)


def _element_size(kind: Any) -> int:
    """Of a kind of storage, in bytes; 0 for what is none."""
    if not _is(kind, "global") or kind.name in _CALLS:
        return 0
    return 1 if kind.name == _STORAGE else _storage_type_to_dtype_map()[kind.name.partition(" ")[2]].itemsize


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Made) and value.kind == kind


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ForeignContents(f"it has {what}" if what.startswith("a ") else what)
