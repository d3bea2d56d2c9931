"""What is brought to a rented card, made on an ordinary machine: compiled modules, a peer, a list of all that.

Compiling takes minutes on a few cores, and those on the card are for measuring. Each module is found there through an
environment variable that the list names.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import setup_cuda
from bench import emulator
from bench.card.facts import COMPILED, sources_digest
from qlora_kernels.bench.timing.machine import ROOT, describe_commit
from qlora_kernels.native import architectures
from qlora_kernels.storage.formats import save_json
from qlora_kernels.version import BASE

MANIFEST, SCHEMA = "manifest.json", 1
#: Of the working tree and this folder together.
MOST_BYTES = 64 << 20
#: The longest command line that is sent.
MOST_CHARACTERS = 2000
PEER = "bitsandbytes"
#: Of the peer's libraries, all that a card with CUDA 13 needs.
PEER_LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
#: What each module is found by there.
VARIABLES = {
    "_C": "QLORA_KERNELS_EXTENSION_MODULE",
    "_emulated": "QLORA_KERNELS_EMULATOR_MODULE",
    "_conformance": "QLORA_KERNELS_CONFORMANCE_MODULE",
}


class Problem(Exception):
    """Why nothing could be prepared, in a sentence."""


def python_of(version: str) -> str:
    """An interpreter of a version such as "3.12", with its headers; or the one that is named.

    Raises:
        Problem: when there is none.
    """
    named = version if not version.replace(".", "").isdigit() else ""
    homes = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python3"))
    candidates = [named] if named else [sys.executable, f"python{version}", *map(str, homes)]
    ask = "import sys, sysconfig; print('.'.join(map(str, sys.version_info[:2])), sysconfig.get_path('include'))"
    for candidate in candidates:
        try:
            done = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found, _, headers = done.stdout.strip().partition(" ")
        if done.returncode == 0 and (named or found == version) and Path(headers, "Python.h").is_file():
            return candidate
    what = named or f"Python {version}"
    raise Problem(
        f"there is no {what} with its headers here to build for; name an interpreter with --python, as --python "
        f"{sys.executable} for the version that runs this"
    )


def soabi(python: str) -> str:
    """What the names of an interpreter's extension modules end with."""
    command = [python, "-c", "import sysconfig; print(sysconfig.get_config_var('SOABI'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# ------------------------------------------------------------------------------------------------- what is compiled


def extension(python: str, archs: Sequence[str]) -> Path:
    """The extension for another Python; with no architectures its CPU part alone.

    Raises:
        Problem, RuntimeError: when it cannot be built.
    """
    version = BASE
    if archs:
        try:
            version += architectures.local_version(setup_cuda.Compiler.find().release, archs)
        except ValueError as problem:
            raise Problem(f"the extension needs nvcc: {problem}") from None
    folder = ROOT / "build" / f"extension-{'.'.join(archs) or 'cpu'}-{soabi(python)}"
    return emulator.build(folder, "_C", python=python, QLK_CUDA_ARCHS=";".join(archs), QLK_VERSION=version)


def compiled(python: str, archs: Sequence[str], given: Path | None) -> dict[str, Path]:
    """The modules by name: the extension (or the one that was given), the emulator, the conformance kernels."""
    name = soabi(python)
    made = {"_C": given or extension(python, archs)}
    if name == sysconfig.get_config_var("SOABI"):
        made["_emulated"] = Path(emulator.module().__file__ or "")  # the one that the tests take
    else:
        made["_emulated"] = emulator.build(ROOT / "build" / f"emulator-on-{name}", python=python, QLK_EMULATOR="ON")
    if archs:
        folder = ROOT / "build" / f"conformance-{'.'.join(archs)}-{name}"
        made["_conformance"] = emulator.build(
            folder, "_conformance", python=python, QLK_CONFORMANCE="ON", QLK_CUDA_ARCHS=";".join(archs)
        )
    return made


def stripped(source: Path, target: Path) -> None:
    """A copy without what is only for debuggers."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    strip = shutil.which("strip")
    if strip is None:
        raise Problem("there is no strip: install binutils, as the emulator is 20 MB with what debuggers read")
    subprocess.run([strip, "--strip-unneeded", str(target)], check=True)


# --------------------------------------------------------------------------------------------------------- the peer


def peer(folder: Path, wheel: Path | None) -> str:
    """Unpacks what a card needs of bitsandbytes' wheel; downloads it where none is given. Returns why there is none, or
    an empty string."""
    with tempfile.TemporaryDirectory() as scratch:
        if wheel is None:
            pinned = _pinned()
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, pinned]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.TimeoutExpired) as problem:
                return f"{PEER} is not brought: {problem}"
            wheel = next(Path(scratch).glob("*.whl"), None)
            if wheel is None:
                return f"{PEER} is not brought: {' '.join(done.stderr.split())[-300:] or 'pip gave no wheel'}"
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                missing = [one for one in PEER_LIBRARIES if not any(name.endswith(f"/{one}") for name in names)]
                if missing:
                    return f"{PEER} is not brought: {wheel.name} has no {', '.join(missing)}"
                archive.extractall(
                    folder, [n for n in names if not n.endswith(".so") or n.rpartition("/")[2] in PEER_LIBRARIES]
                )
        except (OSError, zipfile.BadZipFile) as problem:
            return f"{PEER} is not brought: {problem}"
    return ""


def _pinned() -> str:
    """The version that pyproject.toml compares with."""
    text = (ROOT / "pyproject.toml").read_text()
    return next(word for word in text.replace('"', " ").replace(",", " ").split() if word.startswith(f"{PEER}=="))


# ------------------------------------------------------------------------------------------------------ all of it


def prepare(
    folder: Path,
    python: str,
    archs: Sequence[str],
    given: Path | None = None,
    wheel: Path | None = None,
    with_peer: bool = True,
    stand_in: bool = False,
) -> dict[str, Any]:
    """Makes the folder, whole or not at all, and returns its list.

    Args:
        folder: what is brought; an earlier one is replaced.
        python: the interpreter to build for.
        archs: the card's architectures; none for a rehearsal.
        given: an extension to bring instead of building one.
        wheel: bitsandbytes' wheel, instead of a download.
        with_peer: whether to bring it at all.
        stand_in: whether this is for a rehearsal without a card.

    Raises:
        Problem: when something is missing, or it is too large.
    """
    try:
        modules = compiled(python, archs, given)
    except RuntimeError as problem:
        raise Problem(f"it does not build: {problem}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        environment, left_out = {}, []
        for name, source in modules.items():
            target = Path("modules", source.name)
            stripped(source, made / target)
            environment[VARIABLES[name]] = str(target)
        if "_conformance" not in modules:
            left_out.append("the conformance kernels are not brought: they are for a card")
        if with_peer and (why := peer(made / PEER, wheel)):
            left_out.append(why)
        elif with_peer:
            environment["PYTHONPATH"] = PEER
        about = {"python": soabi(python), "archs": list(archs), "stand_in": stand_in}
        manifest = manifest_of(made, {**about, "environment": environment, "left_out": left_out})
        check_size(made, tree_bytes())
        save_json(manifest, made / MANIFEST)
        made.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def manifest_of(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The list of what is brought: when and from what it was made, and every file with its size and checksum."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **describe_commit(),
        "sources": sources_digest(COMPILED),
        "version": BASE,
        **about,
        "files": {name: _facts_of(path) for name, path in files_of(folder)},
    }


def files_of(folder: Path) -> list[tuple[str, Path]]:
    """What is brought, with names below the folder; the list itself is none of it."""
    found = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(name, path) for name, path in found if name != MANIFEST]


def _facts_of(path: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


def tree_bytes() -> int:
    """What the working tree takes: tracked files, and untracked ones that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def check_size(folder: Path, tree: int) -> None:
    """
    Raises:
        Problem: when it is too large to be brought beside the tree.
    """
    size = sum(path.stat().st_size for _, path in files_of(folder))
    if size + tree > MOST_BYTES:
        raise Problem(
            f"what is brought takes {size / 2**20:.1f} MiB and the tree {tree / 2**20:.1f} MiB, and at most "
            f"{MOST_BYTES >> 20} MiB are taken together"
        )


# ----------------------------------------------------------------------------------------------------- on the card


def other_sources(manifest: dict[str, Any]) -> list[str]:
    """A sentence where the tree is not the one that was compiled."""
    if manifest["sources"] == sources_digest(COMPILED):
        return []
    return ["the modules were compiled from other sources than those that are here: prepare again"]


def problems_of(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Files that are not what they were, with what is wrong."""
    found = {}
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found[name] = f"{name} is missing"
        elif _facts_of(path) != facts:
            found[name] = f"{name} is damaged"
    return found


def environment_of(folder: Path, manifest: dict[str, Any], damaged: Sequence[str]) -> dict[str, str]:
    """The variables by which what is brought is found; none for what is damaged."""
    environment = {
        name: str(folder.resolve() / path)
        for name, path in manifest["environment"].items()
        if not any(one == path or one.startswith(f"{path}/") for one in damaged)
    }
    if manifest.get("commit"):
        environment["QLORA_KERNELS_COMMIT"] = manifest["commit"]
    return environment
