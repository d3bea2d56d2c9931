"""Pickles that torch.load would follow at a price, and those that this package writes."""

from __future__ import annotations

import io
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from qlora_kernels.storage.torch_file import ForeignContents, load_torch
from qlora_kernels.storage.torch_pickle import check_pickle


def loaded(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return load_torch(buffer)


def rows(first: bytes, again: int) -> bytes:
    """A value, remembered, and dicts that have it as a key."""
    return b"\x80\x02](" + first + b"q\x00" + b"}h\x00Ns" * again + b"e."


def test_what_optimizers_and_runs_save_is_read():
    plain = {
        "numbers": [0, -1, 300, 1 << 40, 1 << 900, 0.5, float("inf"), 1 + 2j, True, None],
        "text": ["", "word", "é\ud800", b"bytes", b"", bytearray(b"xy"), bytearray()],
        "tuples": ((), (1,), (0.9, 0.999), ((1, 2), (3, (4, 5))), (1, 2, 3, 4)),
        "sets": [set(), {1, "a", (2, 3)}, {torch.float16}],
        "torch": [torch.float32, torch.device("cuda", 1), torch.device("cpu"), torch.Size([2, 3])],
        (1, ("key", 2.5)): {b"k": 1, torch.int8: 2, None: 3},
        "ordered": OrderedDict(a=1, b=[2]),
    }
    plain["text"].remove(b"")  # torch.load refuses this one itself
    assert loaded(plain) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.uint16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (4, 0, 2)])
def test_tensors_are_read(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    for value in (tensor, tensor.mT if len(shape) > 1 else tensor, tensor.reshape(-1)[: tensor.numel() // 2]):
        result = loaded([value, value])
        assert torch.equal(result[0], value)
        assert result[0] is result[1]


def test_other_tensors_are_read():
    assert isinstance(loaded(nn.Parameter(torch.ones(3))), nn.Parameter)
    assert loaded(torch.ones(2, dtype=torch.complex64).conj()).is_conj()
    assert loaded(torch.ones(2, requires_grad=True)).requires_grad


DOUBLED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))

PRICY = {
    "bytearray": b"\x80\x02c__builtin__\nbytearray\nJ\x00\x84\xd7\x17\x85R.",
    "storage": b"\x80\x02ctorch.storage\nUntypedStorage\nJ\x00\x84\xd7\x17\x85R.",
    "a tuple twice in a tuple": b"\x80\x02}" + DOUBLED + b"Ns.",
    "such a tuple in a set": b"\x80\x02c__builtin__\nset\n](" + DOUBLED + b"e\x85R.",
    "a deep tuple": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "a wide tuple": rows(b"(" + b"N" * 20_000 + b"t", 20_000),
    "a list made a set": b"\x80\x02](](" + b"N" * 20_000 + b"eq\x00" + b"c__builtin__\nset\nh\x00\x85R" * 9_999 + b"e.",
    "bytes of text": b"\x80\x02](X\x00\x00\x02\x00"
    + b"x" * (1 << 17)
    + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    + b"c_codecs\nencode\nh\x00h\x01\x86R" * 9_999
    + b"e.",
    "a codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00hex\x86R.",
    "a counter": b"\x80\x02ccollections\nCounter\n}\x85R.",
    "a function": b"\x80\x02ctorch\nsave\n.",
    "a list as a key": b"\x80\x02}]Ns.",
    "build": b"\x80\x02ccollections\nOrderedDict\n)R}b.",
}


@pytest.mark.parametrize("name", PRICY)
def test_what_is_no_data_of_this_package_or_would_take_long_is_refused(name):
    began = time.perf_counter()
    with pytest.raises(ForeignContents):
        check_pickle(PRICY[name], {})
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x02N", b"\x80\x02\x85.", b"\x80\x02h\x07.", b"\x80\x02e."])
def test_damaged_pickles(data):
    with pytest.raises((ValueError, LookupError)) as caught:
        check_pickle(data, {})
    assert caught.type is not ForeignContents


def test_a_storage_that_the_file_does_not_hold_is_refused():
    buffer, short = io.BytesIO(), io.BytesIO()
    torch.save([torch.ones(1000)], buffer)
    source = zipfile.ZipFile(buffer)
    with zipfile.ZipFile(short, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name)[: 100 if name.endswith("data/0") else None])
    with pytest.raises(ValueError, match="storage '0' is cut off"):
        load_torch(short)
