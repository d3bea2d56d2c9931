"""Imports and includes, read from the sources: each arrow with its file and line.

Python is read as text and never imported: an import inside a function or under TYPE_CHECKING counts as any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
_CPP = (".h", ".cpp", ".cuh", ".cu")


class Arrow(NamedTuple):
    file: str
    """Path of the file that imports or includes, from the root of the tree."""
    line: int
    source: str
    """What the file is called in the graph: a module's dotted name, or a path from csrc."""
    target: str
    """What is imported or included, by the same kind of name."""

    def __str__(self) -> str:
        verb = "includes" if self.file.endswith(_CPP) else "imports"
        return f"{self.file}:{self.line} {verb} {self.target}"


# -------------------------------------------------------------------------------------------------------- Python


def modules(root: Path, package: str) -> dict[str, Path]:
    """A package's modules by dotted name, with their paths from ``root``; a package's name stands for its __init__."""
    files = {}
    for path in sorted((root / package).rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = relative
    return files


def imports(root: Path, packages: Iterable[str]) -> list[Arrow]:
    """Every import of one of the packages' modules by another.

    ``from a import b`` is an arrow to the module a.b if there is one, to a otherwise. That importing a.b runs a's
    __init__ first is no arrow.
    """
    known = {name: path for package in packages for name, path in modules(root, package).items()}
    arrows = []
    for source, path in known.items():
        here = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
        for line, target in _imported(root / path, here, known):
            arrows.append(Arrow(path.as_posix(), line, source, target))
    return arrows


def _imported(path: Path, here: list[str], known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Lines and modules that one file of the package ``here`` imports, each name once a statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in dict.fromkeys(_module(name, known, isinstance(node, ast.ImportFrom)) for name in names):
            if target is not None:
                yield node.lineno, target


def _module(name: str, known: dict[str, Path], may_be_attribute: bool) -> str | None:
    if name in known:
        return name
    owner = name.rpartition(".")[0]
    return owner if may_be_attribute and owner in known else None


# ----------------------------------------------------------------------------------------------------------- C++


def sources(csrc: Path) -> list[str]:
    return sorted(path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.suffix in _CPP)


def includes(csrc: Path) -> list[Arrow]:
    """Every include of one of csrc's files by another, in the compilers' order of folders.

    Raises:
        ValueError: for a name in quotes that is no path from csrc.
    """
    files = set(sources(csrc))
    arrows = []
    for file in sorted(files):
        for number, line in enumerate((csrc / file).read_text(encoding="utf-8").splitlines(), 1):
            if not (match := _INCLUDE.match(line)):
                continue
            quoted, name = match.group(1) == '"', match.group(2)
            if quoted and name not in files:
                raise ValueError(f"csrc/{file}:{number}: {name} is not a path from csrc")
            target = name if quoted else next((path for path in (f"cuda/device/{name}", name) if path in files), None)
            if target is not None:
                arrows.append(Arrow(f"csrc/{file}", number, file, target))
    return arrows


def folder(file: str) -> str:
    """The folder of one of csrc's files, "." for csrc itself."""
    return PurePosixPath(file).parent.as_posix()


# ----------------------------------------------------------------------------------------------------- the graph


def circles(arrows: Iterable[Arrow]) -> list[str]:
    """Each circle that a depth-first walk closes, as its lines."""
    leaving: dict[str, list[Arrow]] = {}
    for arrow in arrows:
        leaving.setdefault(arrow.source, []).append(arrow)
    closed: list[str] = []
    done: set[str] = set()
    path: list[Arrow] = []

    def walk(name: str) -> None:
        for arrow in leaving.get(name, []):
            way = [*path, arrow]
            begin = next((i for i, earlier in enumerate(way) if earlier.source == arrow.target), None)
            if begin is not None:
                closed.append("; ".join(map(str, way[begin:])))
            elif arrow.target not in done:
                path.append(arrow)
                walk(arrow.target)
                path.pop()
        done.add(name)

    for name in sorted(leaving):
        if name not in done:
            walk(name)
    return closed
