"""The picture of the tree: drawn from the sources, and drawn again when they change."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.readme import architecture

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def test_the_committed_picture_is_of_these_sources():
    assert architecture.PATH.read_text() == architecture.svg(), "python -m bench.readme.architecture"
    assert f"]({architecture.PATH.name})" in (architecture.PATH.parent / "architecture.md").read_text()


@pytest.fixture
def package(tmp_path) -> Path:
    """Imports of every form, in every place."""
    files = {
        "__init__.py": "from .top import x\n",
        "errors.py": "",
        "low/__init__.py": "from .. import errors\n",
        "low/deep/one.py": "from ...errors import a\nfrom ..two import b\nimport torch\n",
        "low/two.py": "def f():\n    from ..errors import a\n",
        "middle/a.py": "import qlora_kernels.low.two\n",
        "other/__init__.py": "",
        "other/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..low.deep import one\n",
        "top/a.py": "from qlora_kernels.middle import a\nfrom .. import other, low\nfrom . import b\n",
        "top/b.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "qlora_kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_found_wherever_they_stand(package):
    assert architecture.python_graph(package) == {
        "errors": set(),
        "low": {"errors"},
        "middle": {"low"},
        "other": {"low"},
        "top": {"low", "middle", "other"},
    }


def test_arrows_that_follow_from_others_are_left_out(package):
    graph = architecture.python_graph(package)
    assert architecture.reduced(graph)["top"] == {"middle", "other"}
    assert architecture.levels(graph) == {"errors": 0, "low": 1, "middle": 2, "other": 2, "top": 3}


def test_a_circle_is_drawn_and_does_not_hang():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert architecture.levels(graph) == {"a": 1, "b": 1, "c": 1, "d": 0, "e": 2}
    assert architecture.reduced(graph)["a"] == {"b"}


def test_includes_are_found_by_the_compilers_search_path(tmp_path):
    csrc = tmp_path / "csrc"
    files = {
        "kernels.h": "",
        "cpu/a.cpp": '#include "kernels.h"\n#include <vector>\n',
        "cuda/device/device.cuh": "",
        "cuda/linear/b.cu": '#include <device.cuh>\n#include "cuda/linear/b.cuh"\n  #  include "kernels.h"\n',
        "cuda/linear/b.cuh": '#include "cuda/device/device.cuh"\n',
    }
    for name, text in files.items():
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(text)
    assert architecture.include_graph(csrc) == {
        "csrc": set(),
        "csrc/cpu": {"csrc"},
        "csrc/cuda/device": set(),
        "csrc/cuda/linear": {"csrc", "csrc/cuda/device"},
    }


def test_boxes_do_not_overlap_and_lie_inside():
    root = ElementTree.fromstring(architecture.svg())
    space = "{http://www.w3.org/2000/svg}"
    width, height = map(float, root.get("viewBox").split()[2:])
    groups = [[*root.findall(f"{space}rect")[1:]], root.find(f"{space}g").findall(f"{space}rect")]
    assert len(groups[0]) >= 10
    for group in groups:
        boxes = sorted([float(box.get(key)) for key in ("y", "x", "width", "height")] for box in group)
        for y, x, wide, high in boxes:
            assert x >= 0
            assert x + wide <= width
            assert y + high <= height
        for first, second in itertools.pairwise(boxes):
            assert first[0] != second[0] or first[1] + first[2] <= second[1]
