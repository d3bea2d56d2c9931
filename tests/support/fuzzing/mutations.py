"""Mutations of a case's files. Each makes one small change and says which.

A mutation is a function (files, rng) -> note; it changes the files in place, and returns "" when there is nothing that
it could change.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .files import Files, Special

Mutation = Callable[[Files, random.Random], str]

# A string that stands for text which json.dumps would not write.
RAW_BEGIN, RAW_END = "<raw|", "|raw>"


def _raw(text: str) -> str:
    return RAW_BEGIN + text + RAW_END


#: Values that a JSON file may hold and a parser may not expect.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 65, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 63, 1 << 64),
    *(-(1 << 63), 10**30, 10**400, -(10**400), 10_000_000),
    *(0.0, -0.0, 0.5, 1.5, 5e-324, 1e38, 1e39, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), _raw("1e400"), _raw("1" * 5000)),
    *("", " ", "x", "0", "1", "nan", "true", "None", "\0", "a\0b", "\ud800", "\u202e\u0000", "\N{SNOWMAN}", "x" * 5000),
    *(
        "..",
        "../x",
        "../outside",
        "../outside.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "./",
        "a/b",
        "\\",
        "%s%n",
        "{}",
    ),
    *(
        "(",
        "(?i)x",
        "(?i)q_proj",
        "(a+)+!",
        "(.*)*$",
        "(.|.)*!",
        "(.*.*)*!",
        ".*",
        "[",
        "a{99999}",
        "x|",
        "(?P<a>.)(?P=a)",
    ),
    *("((.*)*)*!", "^(\\w+\\.?)*!$", "(?:(?:[a-z0-9_]+)+\\.?)+!"),
    *(
        "torch.float32",
        "float64",
        "float16",
        "bfloat16",
        "int8",
        "complex64",
        "float8_e4m3fn",
        "nn",
        "load",
        "all-linear",
    ),
    *([], [[]], {}, [None], [1, "x"], ["x"], ["q_proj"], {"": 0}, {"a": 1}, {"x": {"y": [None]}}, {"__proto__": 1}),
    *([0] * 1000, [""] * 100, {str(i): i for i in range(300)}),
    *(_raw("[" * 100_000), _raw("[" * 5000 + "]" * 5000), _raw('{"a":' * 900 + "1" + "}" * 900)),
)


class _Twin(str):
    """A key that is equal to no other, so that a dict can hold it twice."""

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in nested dicts and lists.

    Raises:
        ValueError: for a container that is there twice: it may hold itself.
    """
    found, todo, seen = [], [tree], set()
    while todo:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
        if items is None:
            continue
        if id(node) in seen:
            raise ValueError("a container is there twice")
        seen.add(id(node))
        for key, value in items:
            found.append((node, key))
            todo.append(value)
    return found


def shortened(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} {list(value.shape)} {value.layout} on {value.device}"
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if any(isinstance(item, (torch.Tensor, list, dict)) for item in inner):  # may be without end
        return f"a {type(value).__name__} of {len(inner)}"
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 1 << 70 else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def change_tree(tree: Any, rng: random.Random, values: Sequence[Any] = VALUES, keys: Sequence[str] = ()) -> str:
    """One change in nested dicts and lists: a value replaced, a key dropped, renamed, doubled or added."""
    spots = places(tree)
    kind = rng.choices(("value", "drop", "rename", "double", "add", "swap", "wrap"), (12, 3, 1, 1, 5, 1, 1))[0]
    if kind == "add" and keys:
        name = rng.choice(keys)
        # On the top floor mostly: there the known keys mean something.
        dicts = [tree] * 3 + [c[k] for c, k in spots if isinstance(c[k], dict)]
        holder = rng.choice([d for d in dicts if isinstance(d, dict)] or [{}])
        holder[name] = value = rng.choice(values)
        return f"{name} = {shortened(value)}"
    if not spots:
        return ""
    holder, key = rng.choice(spots)
    old = holder[key]
    if kind == "drop":
        del holder[key]
        return f"without {key!r}"
    if kind == "rename" and isinstance(holder, dict):
        name = rng.choice([v for v in VALUES if isinstance(v, str)] + list(keys))
        holder[name] = holder.pop(key)
        return f"{key!r} is called {shortened(name)}"
    if kind == "double" and isinstance(holder, dict) and isinstance(key, str):
        holder[_Twin(key)] = value = rng.choice(values)
        return f"{key!r} twice, then {shortened(value)}"
    if kind == "swap":
        other, name = rng.choice(spots)
        holder[key], other[name] = other[name], old
        return f"{key!r} and {name!r} swapped"
    if kind == "wrap":
        text = old if isinstance(old, (torch.Tensor, list, dict)) else f"{old!r:.100}"
        holder[key] = rng.choice(([old], {"a": old}, [old, old], text))
        return f"{key!r} = {shortened(holder[key])}"
    if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.4:
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 100, float(old)))
    else:
        holder[key] = rng.choice(values)
    return f"{key!r} = {shortened(holder[key])}"


def dump(tree: Any) -> bytes:
    """JSON that may hold what json.dumps would not write."""
    text = json.dumps(tree)
    return text.replace(f'"{RAW_BEGIN}', "").replace(f'{RAW_END}"', "").encode()


def content_of(files: Files, name: str) -> bytes | None:
    content = files.get(name)
    return content if isinstance(content, bytes) else None


def _one_of(files: Files, patterns: Sequence[str], rng: random.Random) -> str:
    """The name of one of the files, or "" if there is none."""
    names = sorted({name for pattern in patterns for name in fnmatch.filter(files, pattern)})
    return rng.choice(names) if names else ""


# -------------------------------------------------------------------------------------------------- bytes and files


def raw(*patterns: str) -> Mutation:
    """Bytes flipped, inserted, removed, repeated or cut off."""

    def mutate(files: Files, rng: random.Random) -> str:
        name = _one_of(files, patterns, rng)
        old = content_of(files, name)
        if old is None:
            return ""
        data = bytearray(old)
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64, 512))
        kind = rng.choice(("flip", "set", "insert", "remove", "repeat", "cut", "append", "prefix", "replace"))
        if kind == "flip" and data:
            for _ in range(size):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "set" and data:
            data[at : at + size] = bytes([rng.choice((0, 255, 127, 128, 32))]) * len(data[at : at + size])
        elif kind == "insert":
            data[at:at] = rng.randbytes(size)
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        elif kind == "cut":
            del data[rng.choice((at, 0, 1, 7, 8, 9, len(data) - 1)) :]
        elif kind == "append":
            data += rng.choice((b"\0", b"\n", rng.randbytes(size), bytes(data[:size])))
        elif kind == "prefix":
            data[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"PK\x03\x04", b"#!/bin/sh\n", b"\x80\x02"))
        else:
            data[:] = rng.choice(
                (b"", b"\0" * 8, b"\xff" * 64, b"{}", b"[]", b"null", b"\x80\x04N.", rng.randbytes(size))
            )
        files[name] = bytes(data)
        return f"{name}: {kind} at {at}"

    return mutate


def no_plain_file(*names: str) -> Mutation:
    """A file that is missing, a folder, a pipe, or a link to a device or to nothing."""

    def mutate(files: Files, rng: random.Random) -> str:
        name = rng.choice(names)
        what = rng.choice(("absent", "folder", "fifo", "/dev/zero", "/dev/null", "nothing", name))
        if what == "absent":
            files.pop(name, None)
        else:
            files[name] = Special(what)
        return f"{name}: {what}"

    return mutate


def json_file(name: str, keys: Sequence[str] = ()) -> Mutation:
    """One change in a JSON file; ``keys`` are names that mean something to its readers."""

    def mutate(files: Files, rng: random.Random) -> str:
        data = content_of(files, name)
        try:
            tree = json.loads(data or b"")
            note = change_tree(tree, rng, keys=keys)
            files[name] = dump(tree)
        except (ValueError, RecursionError):
            return ""
        return f"{name}: {note}" if note else ""

    return mutate


# ------------------------------------------------------------------------------------------------------ safetensors

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"U64": 8, "U32": 4, "U16": 2, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_FLOATS = {
    "F32": ("<f", (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -0.0, 1e30)),
    "F64": ("<d", (float("nan"), float("inf"), 1e308, 1e39)),
    "F16": ("<e", (float("nan"), float("inf"), 65504.0)),
    "BF16": ("<H", (0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0x0001)),
    "I64": ("<q", (0, -1, 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))),
}

Tensors = dict[str, tuple[str, list[int], bytes]]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        raise ValueError("too short")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, data[8 + length :]


def join(header: Any, body: bytes) -> bytes:
    text = dump(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _unpack(data: bytes) -> tuple[Tensors, Any]:
    header, body = split(data)
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, value in header.items():
        begin, end = value["data_offsets"]
        tensors[name] = (value["dtype"], list(value["shape"]), body[begin:end])
    return tensors, metadata


def _pack(tensors: Tensors, metadata: Any) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    return join(header, body)


def safetensors_header(pattern: str) -> Mutation:
    """A header whose names, types, shapes or offsets no longer fit, or whose length is wrong."""

    def mutate(files: Files, rng: random.Random) -> str:
        name = _one_of(files, (pattern,), rng)
        data = content_of(files, name)
        try:
            header, body = split(data or b"")
            if rng.random() < 0.15:
                length = rng.choice((0, 1, len(data or b""), 1 << 20, 1 << 27, 1 << 31, 1 << 62, (1 << 64) - 1))
                files[name] = length.to_bytes(8, "little") + (data or b"")[8:]
                return f"{name}: a header of {length} bytes"
            note = change_tree(header, rng, keys=("__metadata__", "a", "dtype", "shape", "data_offsets"))
            files[name] = join(header, body)
        except (ValueError, RecursionError):
            return ""
        return f"{name}: header: {note}" if note else ""

    return mutate


def _change_tensor(tensors: Tensors, rng: random.Random) -> str:
    key = rng.choice(list(tensors))
    dtype, shape, content = tensors[key]
    kind = rng.choices(("value", "type", "shape", "drop", "rename", "copy", "swap"), (6, 2, 3, 2, 1, 1, 1))[0]
    if kind == "value":
        pattern, values = _FLOATS.get(dtype, ("<B", (0, 255, 127, 128)))
        value, size = rng.choice(values), struct.calcsize(pattern)
        element = struct.pack(pattern, value)
        count = len(content) // size
        if not count:
            return ""
        at = rng.randrange(count)
        everywhere = rng.random() < 0.3
        changed = element * count if everywhere else content[: at * size] + element + content[(at + 1) * size :]
        tensors[key] = (dtype, shape, changed)
        return f"{key}[{'all' if everywhere else at}] = {value}"
    if kind == "type":
        name = rng.choice(list(_SIZES))
        count = len(content) // _SIZES.get(dtype, 1)
        tensors[key] = (name, shape, (content * 8)[: count * _SIZES[name]])
        return f"{key} is {name}"
    if kind == "shape":
        count, size = len(content) // _SIZES.get(dtype, 1), _SIZES.get(dtype, 1)
        other = rng.choice(
            (
                shape[::-1],
                [count],
                [1, *shape],
                [*shape, 1],
                [0],
                [],
                [0, 1 << 40],
                [count + 1],
                [max(count - 1, 0)],
                [1] * 70,
            )
        )
        wanted = 1
        for extent in other:
            wanted *= extent
        if wanted > 1 << 16:
            return ""
        tensors[key] = (dtype, other, (content * 2 + bytes(size))[: wanted * size].ljust(wanted * size, b"\0"))
        return f"{key} is {other}"
    if kind == "drop":
        del tensors[key]
        return f"without {key}"
    if kind == "swap":
        other = rng.choice(list(tensors))
        tensors[key], tensors[other] = tensors[other], tensors[key]
        return f"{key} and {other} swapped"
    new = rng.choice(("", "x", "\0", "\ud800", "../x", key + ".x", key.rpartition(".")[0], "x" * 2000, key.upper()))
    tensors[new] = tensors.pop(key) if kind == "rename" else tensors[key]
    return f"{key} {'is called' if kind == 'rename' else 'also as'} {shortened(new)}"


def safetensors_tensors(pattern: str) -> Mutation:
    """A whole file with other tensors: other values, types, shapes, names."""

    def mutate(files: Files, rng: random.Random) -> str:
        name = _one_of(files, (pattern,), rng)
        try:
            tensors, metadata = _unpack(content_of(files, name) or b"")
            note = _change_tensor(tensors, rng)
            files[name] = _pack(tensors, metadata)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error, MemoryError):
            return ""
        return f"{name}: {note}" if note else ""

    return mutate


def safetensors_metadata(name: str, keys: Sequence[str], inner: str = "", inner_keys: Sequence[str] = ()) -> Mutation:
    """A change in the metadata, or in the JSON that its entry ``inner`` holds."""

    def mutate(files: Files, rng: random.Random) -> str:
        try:
            header, body = split(content_of(files, name) or b"")
            metadata = header.setdefault("__metadata__", {})
            if inner in metadata and rng.random() < 0.7:
                tree = json.loads(metadata[inner])
                note = change_tree(tree, rng, keys=inner_keys)
                metadata[inner] = dump(tree).decode()
            else:
                key = rng.choice((*keys, "x"))
                if rng.random() < 0.3:
                    metadata.pop(key, None)
                    note = f"without {key}"
                else:
                    value = rng.choice(VALUES)
                    metadata[key] = (
                        value if isinstance(value, str) and not value.startswith(RAW_BEGIN) else dump(value).decode()
                    )
                    note = f"{key} = {shortened(value)}"
            files[name] = join(header, body)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return ""
        return f"{name}: metadata: {note}"

    return mutate


def build(
    seeds: Sequence[Files], mutations: Sequence[tuple[int, Mutation]], key: str, keep: set[int] | None = None
) -> tuple[Files, Files, list[str]]:
    """A case, by its name alone: its seed, its files, and what was done to it.

    Args:
        key: decides everything.
        keep: which mutations to apply, by number; all of them by default.
    """
    rng = random.Random(key)
    seed = rng.choice(seeds)
    files, notes = dict(seed), []
    count = rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
    for number in range(count):
        own = random.Random(rng.getrandbits(64))
        [mutation] = own.choices([m for _, m in mutations], [w for w, _ in mutations])
        if keep is None or number in keep:
            note = ""
            for _ in range(4):  # where it finds nothing to change, another roll of the dice may
                with contextlib.suppress(Exception):  # an earlier one has left no valid file
                    note = note or mutation(files, own)
            notes.append(note)
        else:
            notes.append("")
    return seed, files, notes
