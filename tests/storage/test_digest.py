"""Digests of nested values, and how much of a hostile one is read."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from qlora_kernels.storage.digest import digest


def nested(levels: int) -> tuple:
    value: tuple = ()
    for _ in range(levels):
        value = (value, value)
    return value


LONG = "x" * (1 << 20)


def test_digests_stay_what_they_were():
    """Files hold them."""
    value = {
        "a": [1, 2.5, None, True, "é\ud800", b"b"],
        ("k", (1,)): {3, "s"},
        0: {"t": torch.arange(6, dtype=torch.int16).reshape(2, 3), "c": 1 + 2j},
    }
    expected = "dac9a285f14deb80385c23ef88d91163d3bb40724e06dfbbe1c041e229e9d190"
    assert digest(value) == expected
    assert digest(value, 1000) == expected


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([LONG] * 1000, id="text"),
        pytest.param([LONG.encode()] * 1000, id="bytes"),
        pytest.param([bytearray(LONG.encode())] * 1000, id="bytearray"),
        pytest.param([{LONG: 1}] * 1000, id="keys"),
        pytest.param([{(LONG, 1): 1}] * 1000, id="keys in tuples"),
        pytest.param({(1, (LONG,) * 1000): 1}, id="a key"),
        pytest.param([{LONG}] * 1000, id="sets"),
        pytest.param({nested(20): 1}, id="a nested key"),
        pytest.param({nested(20)}, id="a nested element"),
    ],
)
def test_text_counts(value: Any):
    began = time.process_time()
    with pytest.raises(ValueError, match="more than eight times the size"):
        digest(value, 1 << 17 if isinstance(value, list) else 1 << 16)
    assert time.process_time() - began < 1
