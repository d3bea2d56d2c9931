"""Sentences for errors."""

from __future__ import annotations

import inspect

import pytest

from qlora_kernels import quantize_model
from qlora_kernels.errors import listed


@pytest.mark.parametrize(
    ("items", "limit", "expected"),
    [("", 2, ""), ("a", 2, "a"), ("ab", 2, "a, b"), ("abc", 2, "a, b and 1 more"), ("abcde", 1, "a and 4 more")],
)
def test_a_list_for_a_sentence(items, limit, expected):
    assert listed(items, limit) == listed(iter(items), limit) == expected


def test_ten_are_named_unless_said_otherwise():
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listed(map(str, range(12)), separator="; ") == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9 and 2 more"


def test_explaining_pefts_names_keeps_the_signature():
    assert list(inspect.signature(quantize_model).parameters)[:3] == ["model", "rank", "alpha"]
    assert inspect.getdoc(quantize_model).startswith("Swaps a model")
