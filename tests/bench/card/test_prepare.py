"""What is brought to a card: whole, small enough, found by variables, and known to be what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import emulator
from bench.card import prepare, visit
from qlora_kernels.native import extension

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ("cpu", "cuda118", "cuda130", "rocm62")


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "bitsandbytes-9.9-py3-none-manylinux_2_24_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("__init__.py", *(f"libbitsandbytes_{one}.so" for one in LIBRARIES)):
            archive.writestr(f"bitsandbytes/{name}", name)
        archive.writestr("bitsandbytes-9.9.dist-info/METADATA", "Name: bitsandbytes\nVersion: 9.9\n")
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, wheel) -> Path:
    """A prepared folder, with modules that are none."""
    modules = {}
    for name in prepare.VARIABLES:
        modules[name] = tmp_path / f"{name}.so"
        modules[name].write_bytes(name.encode())
    monkeypatch.setattr(prepare, "compiled", lambda *_: modules)
    monkeypatch.setattr(prepare, "stripped", lambda source, target: copied(source, target))
    made = tmp_path / "made"
    prepare.prepare(made, sys.executable, ["90a"], wheel=wheel)
    return made


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / prepare.MANIFEST).read_text())


def test_what_is_brought(folder):
    names = [name for name, _ in prepare.files_of(folder)]
    assert names == [
        *("bitsandbytes/bitsandbytes/__init__.py", "bitsandbytes/bitsandbytes/libbitsandbytes_cpu.so"),
        "bitsandbytes/bitsandbytes/libbitsandbytes_cuda130.so",
        "bitsandbytes/bitsandbytes-9.9.dist-info/METADATA",
        *("modules/_C.so", "modules/_conformance.so", "modules/_emulated.so"),
    ]
    manifest = manifest_of(folder)
    assert sorted(manifest["files"]) == sorted(names)
    assert manifest["environment"] == {
        "QLORA_KERNELS_EXTENSION_MODULE": "modules/_C.so",
        "QLORA_KERNELS_EMULATOR_MODULE": "modules/_emulated.so",
        "QLORA_KERNELS_CONFORMANCE_MODULE": "modules/_conformance.so",
        "PYTHONPATH": "bitsandbytes",
    }
    assert manifest["archs"] == ["90a"]
    assert not manifest["stand_in"]
    assert manifest["left_out"] == []
    assert prepare.problems_of(folder, manifest) == {}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_damaged_or_missing_is_not_used(folder, monkeypatch):
    (folder / "modules" / "_emulated.so").write_bytes(b"_emulatef")
    (folder / "bitsandbytes" / "bitsandbytes" / "libbitsandbytes_cpu.so").unlink()
    wrong = prepare.problems_of(folder, manifest_of(folder))
    assert sorted(wrong.values()) == [
        "bitsandbytes/bitsandbytes/libbitsandbytes_cpu.so is missing",
        "modules/_emulated.so is damaged",
    ]
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "before"})
    manifest, problems = visit.carried_by(folder)
    assert set(problems) == set(wrong.values())
    assert os.environ["QLORA_KERNELS_EXTENSION_MODULE"] == str(folder / "modules" / "_C.so")
    assert "QLORA_KERNELS_EMULATOR_MODULE" not in os.environ
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "before"]
    assert os.environ["QLORA_KERNELS_COMMIT"] == manifest["commit"]


def test_a_tree_that_is_not_what_was_compiled_is_told(folder, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert visit.carried_by(folder)[1] == []
    manifest = manifest_of(folder)
    (folder / prepare.MANIFEST).write_text(json.dumps({**manifest, "sources": "of another day"}))
    [problem] = visit.carried_by(folder)[1]
    assert problem.startswith("the modules were compiled from other sources")


def test_another_python_is_told_at_once(folder, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    manifest = manifest_of(folder)
    (folder / prepare.MANIFEST).write_text(json.dumps({**manifest, "python": "cpython-399-x86_64-linux-gnu"}))
    assert visit.main(["--second", "--carried", str(folder), "--out", str(folder / "out")]) == 2
    assert "what was brought is for cpython-399-x86_64-linux-gnu, and this Python is" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_the_conformance_kernels_are_found_by_their_variable(monkeypatch):
    monkeypatch.setenv("QLORA_KERNELS_CONFORMANCE_MODULE", "/somewhere/_conformance.so")
    monkeypatch.setattr(emulator, "load", lambda *arguments: arguments)
    emulator.conformance_module.cache_clear()
    try:
        assert emulator.conformance_module() == (Path("/somewhere/_conformance.so"), "_conformance")
    finally:
        emulator.conformance_module.cache_clear()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {}, "environment": 3}'])
def test_without_a_list_nothing_is_done(tmp_path, capsys, text):
    (tmp_path / prepare.MANIFEST).write_text(text)
    assert visit.main(["--first", "--carried", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no list of what was brought" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_too_large_is_refused_and_the_older_one_stays(folder, monkeypatch):
    before = manifest_of(folder)
    prepare.check_size(folder, prepare.MOST_BYTES - 1000)
    monkeypatch.setattr(prepare, "tree_bytes", lambda: prepare.MOST_BYTES - 10)
    with pytest.raises(prepare.Problem, match=r"the tree 64\.0 MiB, and at most 64 MiB"):
        prepare.prepare(folder, sys.executable, ["90a"], with_peer=False)
    assert manifest_of(folder) == before
    assert len(list(folder.parent.glob(".made-*"))) == 0


def test_the_tree_is_counted_without_what_git_ignores():
    if not (ROOT / ".git").exists():
        pytest.skip("there is no repository here")
    assert (ROOT / "CHANGELOG.md").stat().st_size < prepare.tree_bytes() < 40 << 20


def test_a_peer_that_is_not_there_is_left_out_with_the_reason(folder, tmp_path, monkeypatch, wheel):
    bare = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(bare, "w") as archive:
        archive.writestr("bitsandbytes/__init__.py", "")
    bad = tmp_path / "bad.whl"
    bad.write_text("no wheel")
    for given, words in (
        (bare, "has no libbitsandbytes_cuda130.so, libbitsandbytes_cpu.so"),
        (bad, "not a zip file"),
        (tmp_path / "none.whl", "No such file"),
    ):
        manifest = prepare.prepare(folder, sys.executable, ["90a"], wheel=given)
        [why] = manifest["left_out"]
        assert why.startswith("bitsandbytes is not brought: ")
        assert words in why
        assert "PYTHONPATH" not in manifest["environment"]
    ended = subprocess.CompletedProcess([], 1, "", "no network")
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **more: ended if "download" in c else real(c, **more))
    assert prepare.prepare(folder, sys.executable, ["90a"])["left_out"] == ["bitsandbytes is not brought: no network"]


def test_the_peers_version_is_the_one_that_is_compared_with():
    assert prepare._pinned().startswith("bitsandbytes==0.")


# ------------------------------------------------------------------------------------------------------- interpreters


def test_an_interpreter_is_found_or_the_lack_is_told(tmp_path, capsys):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert prepare.python_of(sys.executable) == sys.executable
    assert prepare.python_of(here) == sys.executable
    for wanted, words in (
        ("3.1", "there is no Python 3.1 with its headers"),
        ("/nowhere/python", "no /nowhere/python"),
    ):
        assert visit.main(["--prepare", "--python", wanted, "--out", str(tmp_path / "made")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert words in err
        assert "--python" in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------- the extension by its file


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)


@pytest.mark.slow
def test_the_extension_is_found_by_its_variable(tmp_path):
    source = Path(extension.native().__file__)
    moved = tmp_path / source.name
    moved.write_bytes(source.read_bytes())
    code = "from qlora_kernels.native import extension; print(extension.native().__file__)"
    assert run(code, QLORA_KERNELS_EXTENSION_MODULE=str(moved)).stdout.strip() == str(moved)
    moved.write_bytes(b"\x7fELF")
    for path in (moved, tmp_path / "none.so", tmp_path / "other.txt"):
        said = run(code, QLORA_KERNELS_EXTENSION_MODULE=str(path)).stderr.strip().splitlines()[-1]
        assert said.startswith("ImportError: the native extension that QLORA_KERNELS_EXTENSION_MODULE names could not")
