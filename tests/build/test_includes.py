"""The includes of csrc/ go one way: no file includes itself by a detour, and folders include only those below them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
if not (ROOT / "bench" / "readme" / "graph.py").is_file():
    pytest.skip("the graph's reader comes with the source tree only", allow_module_level=True)

from bench.readme.graph import Arrow, circles, folder, includes, sources  # noqa: E402

#: What each folder may include besides itself, lowest first; "." is csrc/ itself.
MAY_INCLUDE = {
    ".": (),
    "cpu": (".",),
    "cpu/quantize": (".", "cpu"),
    "cpu/linear": (".", "cpu", "cpu/quantize"),
    "cpu/optimizer": (".", "cpu"),
    "cpu/instruction_sets": (".", "cpu", "cpu/quantize", "cpu/linear", "cpu/optimizer"),
    "cuda/device": (".",),
    "cuda/common": (".", "cuda/device"),
    "cuda/quantize": (".", "cuda/device", "cuda/common"),
    "cuda/optimizer": (".", "cuda/device", "cuda/common"),
    "cuda/linear/simt": (".", "cuda/device", "cuda/common"),
    "cuda/linear/mma": (".", "cuda/device", "cuda/common"),
    "cuda/linear/wgmma": (".", "cuda/device", "cuda/common", "cuda/linear/mma"),
    "cuda/linear": (".", "cuda/device", "cuda/common", "cuda/linear/simt", "cuda/linear/mma", "cuda/linear/wgmma"),
    "bindings": (".", "cuda/common", "cuda/optimizer"),
}


def upward(arrows: list[Arrow]) -> list[str]:
    """Each include that MAY_INCLUDE doesn't allow."""
    return [
        f"{one}, and {folder(one.source)} may not include {folder(one.target)}"
        for one in arrows
        if folder(one.target) not in (folder(one.source), *MAY_INCLUDE.get(folder(one.source), ()))
    ]


def test_no_file_includes_itself_by_a_detour():
    arrows = includes(ROOT / "csrc")
    assert len(arrows) > 100
    assert {one.source for one in arrows} >= {"bindings/module.cpp", "cuda/linear/launch.cu", "cpu/linear/forward.h"}
    assert not circles(arrows)


def test_folders_include_only_what_is_below_them():
    assert not upward(includes(ROOT / "csrc"))


def test_every_folder_has_its_place_and_every_place_is_used():
    assert {folder(file) for file in sources(ROOT / "csrc")} == set(MAY_INCLUDE)


def test_the_declared_order_has_no_circle():
    """Every folder names only folders before it."""
    order = list(MAY_INCLUDE)
    for place, (name, below) in enumerate(MAY_INCLUDE.items()):
        assert set(below) <= set(order[:place]), name


# ------------------------------------------------------------------------------------------- that these can fail


@pytest.fixture
def tree(tmp_path):
    """Writes files of a made-up csrc and gives its includes."""

    def write(files: dict[str, str]) -> list[Arrow]:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return includes(tmp_path)

    return write


def test_a_circle_is_found(tree):
    arrows = tree(
        {
            "cpu/a.h": '#pragma once\n#include "cpu/b.h"\n',
            "cpu/b.h": '#if defined(X)\n  #  include "cpu/c.h"\n#endif\n',
            "cpu/c.h": '#include <vector>\n\n#include "cpu/b.h"\n',
            "cpu/d.cpp": '#include "cpu/a.h"\n#include "cpu/c.h"\n',
        }
    )
    assert circles(arrows) == ["csrc/cpu/b.h:2 includes cpu/c.h; csrc/cpu/c.h:3 includes cpu/b.h"]
    assert upward(arrows) == []


def test_a_file_that_includes_itself_is_a_circle(tree):
    assert circles(tree({"cpu/a.h": '#include "cpu/a.h"\n'})) == ["csrc/cpu/a.h:1 includes cpu/a.h"]


def test_two_ways_to_one_file_are_no_circle(tree):
    files = {"a.h": '#include "b.h"\n#include "c.h"\n', "b.h": '#include "d.h"\n', "c.h": '#include "d.h"\n', "d.h": ""}
    assert circles(tree(files)) == []


def test_an_include_upward_is_found(tree):
    files = {
        "kernels.h": "",
        "cuda/device/device.cuh": '#include "kernels.h"\n// #include "cuda/common/bias.cuh"\n',
        "cuda/common/bias.cuh": "#include <device.cuh>\n",
        "cuda/common/splits.cuh": '#include <tuple>\n#include "cuda/linear/launch.h"\n',
        "cuda/linear/launch.h": "#include <device.cuh>\n",
        "cuda/linear/launch.cu": '#include "cuda/common/bias.cuh"\n#include "cuda/quantize/quantize.cuh"\n',
        "cuda/quantize/quantize.cuh": "",
        "elsewhere/new.h": '#include "kernels.h"\n',
    }
    assert upward(tree(files)) == [
        "csrc/cuda/common/splits.cuh:2 includes cuda/linear/launch.h, and cuda/common may not include cuda/linear",
        "csrc/cuda/linear/launch.cu:2 includes cuda/quantize/quantize.cuh,"
        " and cuda/linear may not include cuda/quantize",
        "csrc/elsewhere/new.h:1 includes kernels.h, and elsewhere may not include .",
    ]


def test_a_name_that_is_no_path_from_csrc_is_found(tree):
    with pytest.raises(ValueError, match=r"csrc/cpu/a\.h:1: b\.h is not a path from csrc"):
        tree({"cpu/a.h": '#include "b.h"\n', "cpu/b.h": ""})
