"""A case: the files of one folder, in memory and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: In a stored case: which files are not plain ones, and which of the seed's are missing.
SPECIAL = "special.json"


@dataclass(frozen=True)
class Special:
    """Something else than a plain file: "fifo", "folder", "absent", or the target of a link."""

    what: str


Files = dict[str, bytes | Special]


def write(files: Files, folder: Path) -> None:
    """Makes the folder. Names that lead out of it are the caller's fault."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.what == "fifo":
            os.mkfifo(path)
        elif content.what == "folder":
            path.mkdir()
        elif content.what != "absent":
            path.symlink_to(content.what)


def store(files: Files, seed: Files, folder: Path) -> None:
    """Writes what differs from the seed, in a form that git keeps."""
    folder.mkdir(parents=True)
    special = {name: "absent" for name in seed if name not in files}
    for name, content in files.items():
        if content == seed.get(name):
            continue
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            special[name] = content.what
    if special:
        (folder / SPECIAL).write_text(json.dumps(special, indent=2, sort_keys=True) + "\n")


def stored(folder: Path, seed: Mapping[str, bytes | Special]) -> Files:
    """The case that :func:`store` wrote."""
    files = dict(seed)
    for path in sorted(folder.iterdir()):
        if path.name == SPECIAL:
            files |= {name: Special(what) for name, what in json.loads(path.read_text()).items()}
        else:
            files[path.name] = path.read_bytes()
    return files
