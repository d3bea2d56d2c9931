"""Imports of qlora_kernels and bench go one way: no module imports itself by a detour, and packages import only those
below them. An import inside a function or under TYPE_CHECKING counts too."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
if not (ROOT / "bench" / "readme" / "graph.py").is_file():
    pytest.skip("the graph's reader comes with the source tree only", allow_module_level=True)

from bench.readme.graph import Arrow, circles, imports, modules  # noqa: E402

PACKAGES = ("qlora_kernels", "bench")

#: The floors, lowest first. A room may import those below it, and not its neighbours on the same floor. A package's
#: name stands for all modules without an entry of their own; "qlora_kernels" stands for its __init__ alone.
FLOORS = (
    ("qlora_kernels.errors", "qlora_kernels.version"),
    ("qlora_kernels.native", "qlora_kernels.storage", "qlora_kernels.console"),
    ("qlora_kernels.ops.dispatcher",),
    ("qlora_kernels.ops.weight", "qlora_kernels.ops.lora"),
    ("qlora_kernels.ops.backends",),
    ("qlora_kernels.ops",),
    ("qlora_kernels.formats",),
    ("qlora_kernels.layers.packed",),
    ("qlora_kernels.layers.adapters",),
    ("qlora_kernels.layers",),
    ("qlora_kernels.models", "qlora_kernels.optim.arena", "qlora_kernels.optim.options"),
    ("qlora_kernels.optim.engines",),
    ("qlora_kernels.optim",),
    ("qlora_kernels.interop",),
    ("qlora_kernels",),
    ("qlora_kernels.finetune",),
    ("qlora_kernels.bench",),
    ("qlora_kernels.cli",),
    ("qlora_kernels.__main__",),
    ("bench",),
)

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@functools.cache
def the_imports() -> list[Arrow]:
    return imports(ROOT, PACKAGES)


def room(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to: the longest that begins its name."""
    if module == "qlora_kernels":
        return module
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR and name != "qlora_kernels"), None)


def upward(arrows: list[Arrow]) -> list[str]:
    """Each import of a room that does not lie below."""
    wrong = []
    for one in arrows:
        source, target = room(one.source), room(one.target)
        if source is None or target is None:
            wrong.append(f"{one}, and {one.source if source is None else one.target} has no floor")
        elif source != target and FLOOR[target] >= FLOOR[source]:
            wrong.append(f"{one}, and {target} is not below {source}")
    return wrong


def test_no_module_imports_itself_by_a_detour():
    arrows = the_imports()
    assert len(arrows) > 300
    assert not circles(arrows)


def test_packages_import_only_what_is_below_them():
    assert not upward(the_imports())


def test_every_module_has_its_floor_and_every_floor_is_used():
    assert {room(name) for package in PACKAGES for name in modules(ROOT, package)} == set(FLOOR)


# ------------------------------------------------------------------------------------------- that these can fail


@pytest.fixture
def tree(tmp_path):
    """Writes files of made-up packages and gives their imports."""

    def write(files: dict[str, str]) -> list[Arrow]:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return imports(tmp_path, PACKAGES)

    return write


def test_every_form_of_import_is_read(tree):
    arrows = tree(
        {
            "qlora_kernels/__init__.py": "from .errors import E\n",
            "qlora_kernels/errors.py": "import os, qlora\nfrom torch import nn\n",
            "qlora_kernels/ops/__init__.py": "from . import weight, weight as w\nfrom .weight import nothing\n",
            "qlora_kernels/ops/weight.py": "from .. import errors as e\nimport qlora_kernels.errors, qlora_kernels\n",
            "qlora_kernels/layers/q.py": "from qlora_kernels import ops, E\nfrom ..ops import (\n  weight,\n)\n",
            "bench/run.py": "from qlora_kernels.layers.q import f, g\nfrom .x import y\n",
        }
    )
    assert [str(one) for one in arrows] == [
        "qlora_kernels/__init__.py:1 imports qlora_kernels.errors",
        "qlora_kernels/layers/q.py:1 imports qlora_kernels.ops",
        "qlora_kernels/layers/q.py:1 imports qlora_kernels",
        "qlora_kernels/layers/q.py:2 imports qlora_kernels.ops.weight",
        "qlora_kernels/ops/__init__.py:1 imports qlora_kernels.ops.weight",
        "qlora_kernels/ops/__init__.py:2 imports qlora_kernels.ops.weight",
        "qlora_kernels/ops/weight.py:1 imports qlora_kernels.errors",
        "qlora_kernels/ops/weight.py:2 imports qlora_kernels.errors",
        "qlora_kernels/ops/weight.py:2 imports qlora_kernels",
        "bench/run.py:1 imports qlora_kernels.layers.q",
    ]


LAZY = "def f():\n    from .a import x\n"
CHECKED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x\n"


@pytest.mark.parametrize(("text", "line"), [("from .a import x\n", 1), (LAZY, 2), (CHECKED, 3)])
def test_a_circle_is_found_wherever_the_import_stands(tree, text, line):
    arrows = tree(
        {
            "qlora_kernels/ops/a.py": "from . import b\n",
            "qlora_kernels/ops/b.py": "import qlora_kernels.ops.c\n",
            "qlora_kernels/ops/c.py": text,
            "qlora_kernels/ops/d.py": "from . import a, c\n",
        }
    )
    assert circles(arrows) == [
        "qlora_kernels/ops/a.py:1 imports qlora_kernels.ops.b; qlora_kernels/ops/b.py:1 imports qlora_kernels.ops.c; "
        f"qlora_kernels/ops/c.py:{line} imports qlora_kernels.ops.a"
    ]
    assert upward(arrows) == []


def test_a_circle_by_way_of_a_packages_face_is_found(tree):
    arrows = tree(
        {
            "qlora_kernels/ops/__init__.py": "from .a import f\n",
            "qlora_kernels/ops/a.py": "from ..ops import f\n",
        }
    )
    assert len(circles(arrows)) == 1


def test_two_ways_to_one_module_are_no_circle(tree):
    files = {"a.py": "from . import b, c\n", "b.py": "from . import d\n", "c.py": "from . import d\n", "d.py": ""}
    arrows = tree({f"qlora_kernels/ops/{name}": text for name, text in files.items()})
    assert len(arrows) == 4
    assert circles(arrows) == []


def test_an_import_upward_is_found(tree):
    files = {
        "qlora_kernels/__init__.py": "from .layers import q\n",
        "qlora_kernels/errors.py": "def f():\n\n    from . import version\n",
        "qlora_kernels/version.py": "",
        "qlora_kernels/ops/backends/cpu.py": "from ...native import extension\nfrom .. import linear\n",
        "qlora_kernels/ops/linear.py": "from .backends import cpu\n",
        "qlora_kernels/native/extension.py": "from .. import errors, f\n",
        "qlora_kernels/layers/q.py": CHECKED.replace(".a", "qlora_kernels.cli.main"),
        "qlora_kernels/cli/main.py": "from bench import card\nfrom ..layers import q\n",
        "qlora_kernels/elsewhere.py": "from . import errors\n",
        "bench/card.py": "from qlora_kernels import errors\n",
    }
    assert upward(tree(files)) == [
        "qlora_kernels/cli/main.py:1 imports bench.card, and bench is not below qlora_kernels.cli",
        "qlora_kernels/elsewhere.py:1 imports qlora_kernels.errors, and qlora_kernels.elsewhere has no floor",
        "qlora_kernels/errors.py:3 imports qlora_kernels.version,"
        " and qlora_kernels.version is not below qlora_kernels.errors",
        "qlora_kernels/layers/q.py:3 imports qlora_kernels.cli.main,"
        " and qlora_kernels.cli is not below qlora_kernels.layers",
        "qlora_kernels/native/extension.py:1 imports qlora_kernels,"
        " and qlora_kernels is not below qlora_kernels.native",
        "qlora_kernels/ops/backends/cpu.py:2 imports qlora_kernels.ops.linear,"
        " and qlora_kernels.ops is not below qlora_kernels.ops.backends",
    ]
