"""Mutations of files that torch.save wrote: of their values, of the archive, and of the pickle inside."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .files import Files
from .mutations import RAW_BEGIN, VALUES, Mutation, change_tree, content_of, places, shortened

_load = torch.load  # not what a test may have put in its place


def _nasty_tensors() -> tuple[torch.Tensor, ...]:
    sparse = torch.eye(3).to_sparse()
    return (
        torch.tensor(float("nan")),
        torch.tensor(1e300, dtype=torch.float64),
        torch.tensor(float("inf")),
        torch.tensor(-1.0),
        torch.tensor(2**62),
        torch.tensor(3.5),
        torch.zeros(0),
        torch.zeros(3, 0),
        torch.zeros(2, 3),
        torch.ones(8),
        torch.ones(1).expand(40, 8),
        torch.zeros(1, dtype=torch.uint8).expand(1 << 40),
        torch.zeros(8, 40).t(),
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4, dtype=torch.complex64).conj(),
        torch.ones(4, dtype=torch.complex64).conj().imag,
        torch.ones(4, dtype=torch.bool),
        torch.ones(4, dtype=torch.int8),
        torch.ones(4).to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
        sparse,
        torch.eye(3).to_sparse_csr(),
        torch.ones(3, device="meta"),
        torch.nn.Parameter(torch.ones(3)),
        torch.full((4,), float("nan"), dtype=torch.bfloat16),
    )


def _torch_values() -> tuple[Any, ...]:
    plain = tuple(v for v in VALUES if not (isinstance(v, str) and v.startswith(RAW_BEGIN)))
    more = (
        b"",
        b"x" * 9,
        (1, 2),
        (),
        {1, "a"},
        {1: 2, (3,): 4},
        1 + 2j,
        complex("nan"),
        torch.float32,
        torch.device("cpu"),
    )
    return (*plain, *more, _doubled(), _in_itself(), *_nasty_tensors(), *_nasty_tensors())


def _doubled() -> list:
    """A list of lists that takes forever to go through, and little room in a file."""
    value: list = [0]
    for _ in range(60):
        value = [value, value]
    return value


def _in_itself() -> list:
    value: list = []
    value.append(value)
    return value


def _bend(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A tensor that is nearly the given one."""
    kind = rng.choice(("value", "value", "type", "expanded", "shape", "strided", "layout", "meta", "quantized", "many"))
    if kind == "type":
        types = (
            torch.float64,
            torch.float16,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
        )
        return tensor.to(rng.choice(types))
    if kind == "expanded":
        return torch.ones(1, dtype=tensor.dtype).expand(tensor.shape)
    if kind == "many":
        return torch.ones(1, dtype=tensor.dtype).expand(rng.choice((1 << 33, 1 << 40)))
    if kind == "shape":
        return rng.choice((tensor.reshape(-1), tensor[None], tensor[..., :0] if tensor.dim() else tensor[None][:0]))
    if kind == "strided":
        return torch.stack((tensor, tensor), -1)[..., 0]
    if kind == "layout":
        return tensor.to_sparse()
    if kind == "meta":
        return tensor.to("meta")
    if kind == "quantized":
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)
    changed = tensor.clone().reshape(-1)
    if changed.numel():
        at = slice(None) if rng.random() < 0.3 else rng.randrange(changed.numel())
        changed[at] = rng.choice((0, -1, 1e30, float("nan"), float("inf"), 255)) if changed.is_floating_point() else 255
    return changed.reshape(tensor.shape)


def _without_addresses(content: bytes) -> bytes:
    """The same file with other names for storages: torch's old format names them by where they lie in memory."""
    if content.startswith(b"PK"):
        return content
    names: dict[bytes, bytes] = {}

    def renamed(match: re.Match[bytes]) -> bytes:
        return names.setdefault(match[0], str(len(names) + 1).rjust(len(match[0]), "9").encode())

    return re.sub(rb"(?<=\x00\x00\x00)[1-9][0-9]{11,14}(?=[q\x94r])", renamed, content)


def torch_value(name: str, sign: Callable[[dict[str, Any]], dict[str, Any]], keys: Sequence[str]) -> Mutation:
    """Another value in a file of torch, with a valid digest: ``sign`` puts it there."""

    def mutate(files: Files, rng: random.Random) -> str:
        data = content_of(files, name)
        try:
            value = _load(io.BytesIO(data or b""), weights_only=True)
            spots = [(c, k) for c, k in places(value) if isinstance(c[k], torch.Tensor)]
            if spots and rng.random() < 0.4:
                holder, key = rng.choice(spots)
                holder[key] = _bend(holder[key], rng)
                note = f"{key!r} = {shortened(holder[key])}"
            else:
                note = change_tree(value, rng, _torch_values(), keys)
            if isinstance(value, dict) and rng.random() < 0.95:
                value = sign(value)
            buffer = io.BytesIO()
            torch.save(value, buffer, _use_new_zipfile_serialization=rng.random() < 0.95)
        except Exception:  # torch can save this value no more
            return ""
        if buffer.tell() > 1 << 20:
            return ""
        files[name] = _without_addresses(buffer.getvalue())
        return f"{name}: {note}" if note else ""

    return mutate


class _Call:
    """Unpickles to the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def _evil(rng: random.Random) -> tuple[str, bytes]:
    """A pickle that would run code, or fill memory, if anything followed it."""
    storage = torch.UntypedStorage(4)
    choices: dict[str, Callable[[], bytes]] = {
        "os.system": lambda: pickle.dumps(_Call(os.system, "touch ran"), 2),
        "eval": lambda: pickle.dumps(_Call(eval, "open('ran', 'w')"), 2),
        "exec": lambda: pickle.dumps({"state": _Call(exec, "open('ran', 'w')")}, 2),
        "open": lambda: pickle.dumps(_Call(open, "ran", "w"), 2),
        "getattr": lambda: b"\x80\x02c__builtin__\ngetattr\nctorch\nos\nX\x06\x00\x00\x00system\x86R.",
        "torch.load": lambda: b"\x80\x02ctorch.serialization\nload\nX\x01\x00\x00\x00x\x85R.",
        "bytearray": lambda: pickle.dumps(_Call(bytearray, 1 << 40), 2),
        "storage": lambda: pickle.dumps(_Call(type(storage), 1 << 40), 2),
        "deep": lambda: b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
        "deep tuples": lambda: b"\x80\x02)" + b"\x85" * 50_000 + b".",
        "itself": lambda: b"\x80\x02]q\x00h\x00a.",
        "itself, a dict": lambda: b"\x80\x02}q\x00X\x05\x00\x00\x00stateh\x00s.",
        "doubling": lambda: (
            b"\x80\x02]"
            + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
            + b"."
        ),
        "no end": lambda: b"\x80\x02}",
        "memo": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
        "text": lambda: b"\x80\x02X\xff\xff\xff\x7fx.",
        "long": lambda: b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        "empty": lambda: b"",
    }
    name = rng.choice(list(choices))
    return name, choices[name]()


def _change_numbers(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A pickle with other numbers: sizes, strides and offsets of its tensors are among them."""
    spots = [
        (at, code.name) for code, _, at in pickletools.genops(data) if code.name in ("BININT", "BININT1", "BININT2")
    ]
    if not spots:
        return "", data
    at, kind = rng.choice(spots)
    if kind == "BININT":
        value = rng.choice((-1, -(1 << 31), (1 << 31) - 1, 1 << 20, 0))
        return f"number at {at} = {value}", data[: at + 1] + struct.pack("<i", value) + data[at + 5 :]
    width = 1 if kind == "BININT1" else 2
    if rng.random() < 0.5:
        value = rng.choice((-1, 1 << 31, 1 << 40, 1 << 62, -(1 << 63), 1 << 70))
        coded = value.to_bytes(16, "little", signed=True)
        return f"number at {at} = {value}", data[:at] + b"\x8a\x10" + coded + data[at + 1 + width :]
    value = rng.choice((0, 1, 2, 3, 127, 255))
    return f"number at {at} = {value}", data[: at + 1] + value.to_bytes(width, "little") + data[at + 1 + width :]


def torch_archive(name: str) -> Mutation:
    """The zip file around a pickle with other entries, and the pickle with other opcodes; all checksums are right."""

    def mutate(files: Files, rng: random.Random) -> str:
        try:
            with zipfile.ZipFile(io.BytesIO(content_of(files, name) or b"")) as archive:
                entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
            at = rng.randrange(len(entries))
            pickled = next((i for i, (entry, _) in enumerate(entries) if entry.endswith("data.pkl")), at)
            kind = rng.choices(
                (
                    "evil",
                    "numbers",
                    "pickle bytes",
                    "drop",
                    "rename",
                    "double",
                    "bytes",
                    "shorter",
                    "compress",
                    "byteorder",
                ),
                (4, 6, 3, 1, 1, 1, 1, 2, 1, 1),
            )[0]
            method, note = zipfile.ZIP_STORED, kind
            if kind == "evil":
                note, data = _evil(rng)
                entries[pickled] = (entries[pickled][0], data)
            elif kind == "numbers":
                note, data = _change_numbers(entries[pickled][1], rng)
                entries[pickled] = (entries[pickled][0], data)
            elif kind == "pickle bytes":
                data = bytearray(entries[pickled][1])
                for _ in range(rng.choice((1, 1, 2, 4))):
                    data[rng.randrange(len(data))] = rng.choice(
                        (rng.randrange(256), ord("."), ord("R"), ord("0"), ord("c"))
                    )
                entries[pickled] = (entries[pickled][0], bytes(data))
            elif kind == "drop":
                note = f"without {entries.pop(at)[0]}"
            elif kind == "rename":
                new = rng.choice(
                    ("../x", "/x", "data.pkl", "x", "", "archive/data/0", "archive/.data/serialization_id")
                )
                note = f"{entries[at][0]} is called {new!r}"
                entries[at] = (new, entries[at][1])
            elif kind == "double":
                entries.append(
                    (entries[at][0], rng.choice((b"", rng.randbytes(9), entries[rng.randrange(len(entries))][1])))
                )
            elif kind == "bytes":
                entries[at] = (entries[at][0], rng.choice((b"", rng.randbytes(9), entries[at][1] * 2)))
            elif kind == "shorter":
                entry, data = entries[at]
                entries[at] = (entry, data[: rng.randrange(len(data) + 1)])
                note = f"{entry} is shorter"
            elif kind == "byteorder":
                entries = [
                    (e, rng.choice((b"big", b"middle", b""))) if e.endswith("byteorder") else (e, d) for e, d in entries
                ]
            else:
                method = zipfile.ZIP_DEFLATED
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", method) as archive:
                for entry, data in entries:
                    archive.writestr(zipfile.ZipInfo(entry), data, method)
        except Exception:  # an earlier mutation left no archive, or no pickle
            return ""
        files[name] = buffer.getvalue()
        return f"{name}: {note}"

    return mutate


def bare_pickle(name: str) -> Mutation:
    """A pickle without its archive, as torch wrote long ago, or as anybody may."""

    def mutate(files: Files, rng: random.Random) -> str:
        note, data = _evil(rng)
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        files[name] = rng.choice((data, magic + pickle.dumps({"little_endian": True}, 2) + data))
        return f"{name}: bare pickle, {note}"

    return mutate


# ------------------------------------------------------------------------------------------------------- whole cases
