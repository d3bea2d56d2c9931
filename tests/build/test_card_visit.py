"""A visit to a rented card, rehearsed: what is brought is made, both commands run from a copy of the tree without a
network, and what came back is read. The emulator executes the kernels; bench/card/stand_in.py has the rest of a card.

With a wheel of CUDA kernels (QLORA_KERNELS_WHEEL, as in CI) its extension is brought, so that it and the emulator are
in one process, as on a card.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from qlora_kernels.native import extension

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench" / "card" / "visit.py").is_file():
    pytest.skip("there are no sources beside the tests", allow_module_level=True)

pytestmark = pytest.mark.slow
MODULES = ("QLORA_KERNELS_EXTENSION_MODULE", "QLORA_KERNELS_EMULATOR_MODULE", "QLORA_KERNELS_CONFORMANCE_MODULE")


def clean(tree: Path) -> dict[str, str]:
    """An environment in which nothing of this tree is found, and nothing can be downloaded."""
    ours = ("QLORA_KERNELS_", "PYTEST_", "CUDA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment.pop("PYTHONPATH", None)
    nowhere = "http://127.0.0.1:9"
    environment |= {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "http_proxy": nowhere, "https_proxy": nowhere}
    environment["TMPDIR"] = str(tree.parent / "scratch")  # what is killed leaves its files there
    (tree.parent / "scratch").mkdir(exist_ok=True)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return environment


def without_network() -> list[str]:
    """What to put before a command, where a process may leave the network behind."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return []


def brought_extension(folder: Path) -> Path:
    """That of the wheel, or the one that is there."""
    if "QLORA_KERNELS_WHEEL" not in os.environ:
        return Path(extension.native().__file__)
    with zipfile.ZipFile(os.environ["QLORA_KERNELS_WHEEL"]) as wheel:
        (name,) = (one for one in wheel.namelist() if one.startswith("qlora_kernels/_C."))
        return Path(wheel.extract(name, folder))


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> tuple[Path, list[str]]:
    """A copy of the tree with what is brought, and the commands that were printed."""
    folder = tmp_path_factory.mktemp("visit")
    carried = folder / "tree" / "build" / "visit"
    command = [
        *(sys.executable, "-m", "bench.card.visit", "--prepare", "--stand-in", "--no-bitsandbytes"),
        *("--python", sys.executable, "--extension", str(brought_extension(folder)), "--out", str(carried)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("python3 -m bench.card.visit ")]
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, check=True, capture_output=True).stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (carried.parents[1] / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, carried.parents[1] / name)
    return carried.parents[1], [line.replace(str(carried), "build/visit") for line in lines]


def run(tree: Path, line: str) -> tuple[int, dict, str]:
    """A command, one line for a shell: the exit code, what it wrote, and what it printed."""
    done = subprocess.run(
        [*without_network(), "bash", "-c", line], cwd=tree, env=clean(tree), capture_output=True, text=True, timeout=900
    )
    which = "first" if "--first" in line else "second"
    path = tree / "visit-results" / f"visit-{which}.json"
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text()), done.stdout + done.stderr


def test_both_commands_and_what_they_leave(there, tmp_path):
    tree, lines = there
    assert len(lines) == 2
    assert not list(tree.glob("qlora_kernels/_C*"))
    for which, line in zip(("first", "second"), lines):
        code, found, said = run(tree, line)
        statuses = {step["name"]: (step["status"], step.get("reason")) for step in found["steps"]}
        assert code == 0, f"{statuses}\n{said[-4000:]}"
        assert set(statuses.values()) == {("passed", None)}
        assert found["complete"]
        assert found["stand_in"]
        assert found["clocks"]["samples"] > 5
        by_name = {step["name"]: step["found"] for step in found["steps"]}
        environment = by_name["facts"]["environment"]
        assert [environment.get(name, "").startswith(str(tree / "build")) for name in MODULES] == [True, True, False]
        check(which, by_name)
        with tarfile.open(tree / "visit-results" / f"visit-{which}-logs.tar.gz") as archive:
            assert "dmon.log" in archive.getnames()
    assert sorted(path.name for path in (tree / "visit-results").iterdir()) == [
        *("visit-first-logs.tar.gz", "visit-first.json", "visit-first.md"),
        *("visit-second-logs.tar.gz", "visit-second.json", "visit-second.md"),
    ]
    # Read where it was prepared.
    command = [sys.executable, "-m", "bench.card.visit", "--read", str(tree / "visit-results"), "--keep", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("nothing is kept of them") == 2
    assert done.stdout.count("A rehearsal on a stand-in: no card was there.") == 2
    assert not any(tmp_path.iterdir())


def check(which: str, found: dict) -> None:
    """What the emulator has executed, and what the stand-ins for tools were asked."""
    if which == "first":
        kernels = found["kernels"]
        assert kernels["right"] == kernels["cases"] > 200
        assert len(kernels["families"]) == 6
        assert kernels["again"] == 0
        for name in ("linear", "quantization", "optimizer"):
            assert found[name]["stand_in"]
            assert found[name]["complete"]
            assert all("failed" not in case["contenders"][0] for case in found[name]["cases"])
        assert found["launches"]["passed"] > 0
    else:
        assert found["tests"]["passed"] > 0
        assert found["tests"]["not_run"] == 0
        assert {name: one["errors"] for name, one in found["sanitizers"].items()} == dict.fromkeys(
            ("memcheck", "racecheck", "synccheck", "initcheck"), 0
        )
        assert len(found["rates"]["rates"]) == 2
        assert found["forced"]["cases"]
        assert found["early"]["cases"]
        assert len(found["profile"]) == 3
        assert all(kernels[0]["kernel"] == "stand-in" for kernels in found["profile"].values())


def known(path: Path) -> bool:
    """Whether a result has a kernel case that is right."""
    steps = json.loads(path.read_text())["steps"] if path.exists() else []
    return any(step["name"] == "kernels" and (step.get("found") or {}).get("right") for step in steps)


def end_all(tree: Path) -> None:
    """Ends what a killed visit has left behind: processes in the copy of the tree."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(folder / "cwd")) == tree.resolve():
                os.kill(int(folder.name), signal.SIGKILL)


def test_a_short_loan_leaves_the_first_facts(there):
    """Killed in its second step, without a word before: what was known by then is there."""
    tree, lines = there
    out = tree / "short"
    line = lines[0].replace("visit-results", "short")
    process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=tree, env=clean(tree), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    try:
        while not known(out / "visit-first.json") and time.monotonic() < end:
            assert process.poll() is None, "it was over too soon"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        end_all(tree)
    found = json.loads((out / "visit-first.json").read_text())
    assert not found["complete"]
    steps = {step["name"]: step for step in found["steps"]}
    assert steps["facts"]["status"] == "passed"
    assert steps["kernels"]["status"] in ("running", "passed")
    assert steps["kernels"]["found"]["right"] > 0
    assert steps["optimizer"]["status"] == "waiting"
    assert "stopped before the end" in (out / "visit-first.md").read_text()
