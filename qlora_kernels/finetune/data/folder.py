"""Folders with a data set: as ``datasets`` saves one to disk, and as the Hugging Face hub stores one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import InputError, listed
from ...storage.formats import load_json
from .read import ROW_SUFFIXES, TEXT_SUFFIXES, Place, Row, read_rows, suffix

# Names of splits as the hub knows them, between characters that are neither letters nor digits.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_EVALUATION = ("validation", "test")  # the first of these that a data set has
_ALONE_ENOUGH = (".jsonl", ".ndjson", ".parquet")  # no text files: one of these makes a folder a data set
_TEXTS = tuple(suffix for suffix in TEXT_SUFFIXES if suffix not in ROW_SUFFIXES)
_ABOUT = re.compile(r"(readme|license|licence|citation|dataset_infos?|\.)", re.IGNORECASE)


@dataclass(frozen=True)
class Split:
    """The files of a part of a data set.

    Attributes:
        place: the data set's folder.
        files: of one kind, in the order of their names.
    """

    place: Place
    files: tuple[str, ...]

    def rows(self) -> Iterator[Row]:
        """Each row, and where it stands."""
        for file in self.files:
            yield from read_rows(self.place.at(file))


def splits_of(place: Place) -> dict[str, Split] | None:
    """The splits of a data set by name; None for a folder that is none.

    Raises:
        InputError: for a folder that holds several data sets, or the same one in several forms, or is damaged.
    """
    folder = place.path
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = _plain_names(_json(place, "dataset_dict.json").get("splits"), place, "dataset_dict.json: splits")
        return {name: _saved(place, os.path.join(folder, name)) for name in names}
    if os.path.isfile(os.path.join(folder, "state.json")):
        return {"train": _saved(place, folder)}
    return _stored(place)


def training_split(place: Place, splits: dict[str, Split]) -> Split:
    """The split to train on: "train", or the only one, whatever its name.

    Raises:
        InputError: naming the splits, when it is not clear which.
    """
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise InputError(f"{place} has no split 'train', only {listed(splits)}; name one of its files or folders")


def evaluation_split(splits: dict[str, Split]) -> Split | None:
    """The split to evaluate on: "validation", or else "test"; None when there is neither."""
    return next((splits[name] for name in _EVALUATION if name in splits), None)


def _json(place: Place, name: str):
    try:
        return load_json(os.path.join(place.path, name))
    except (OSError, ValueError) as error:
        raise InputError(f"{place.flag}: {error}") from None


def _plain_names(names: object, place: Place, what: str) -> list[str]:
    """Names of files or folders, which do not lead out of the folder."""
    if isinstance(names, list) and names:
        plain = [name for name in names if isinstance(name, str) and _is_plain(name)]
        if len(plain) == len(names):
            return plain
    raise InputError(f"{place}: {what} should be a list of plain names")


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def _saved(place: Place, folder: str) -> Split:
    """A folder that ``Dataset.save_to_disk`` wrote: state.json names its Arrow files."""
    state = _json(place.at(folder), "state.json")
    files = state.get("_data_files")
    listed_names = (
        [f.get("filename") if isinstance(f, dict) else None for f in files] if isinstance(files, list) else files
    )
    names = _plain_names(listed_names, place.at(folder), "state.json: _data_files")
    if state.get("_indices_files"):  # a selection of rows, which only old versions left beside them
        raise InputError(f"{place.at(folder)}: save the data set again, with flatten_indices() before save_to_disk")
    # Arrow's files always, whatever the name: a reader is not chosen by a name from a file.
    odd = [name for name in names if suffix(name) != ".arrow"]
    if odd:
        raise InputError(f"{place.at(folder)}: state.json names {odd[0]}, which is no .arrow file")
    return Split(place, tuple(os.path.join(folder, name) for name in names))


def _stored(place: Place) -> dict[str, Split] | None:
    """A folder of files in rows, whose names, or folders, say which split they belong to."""
    rows, texts = [], []
    for name in _files(place.path):
        base = os.path.basename(name)
        if _ABOUT.match(base):
            continue
        if suffix(name) in _ALONE_ENOUGH or (suffix(name) in ROW_SUFFIXES and _split(name) is not None):
            rows.append(name)
        elif suffix(name) in _TEXTS:
            texts.append(name)
    named = [name for name in rows if suffix(name) in _ALONE_ENOUGH and _split(name) is not None]
    if texts and named:
        raise InputError(f"{place} holds a data set ({named[0]}) and text files ({texts[0]}); name one of them")
    if not rows or texts:
        return None
    configurations = {_configuration(name) for name in rows}
    if len(configurations) > 1:
        names = sorted(c or "." for c in configurations)
        raise InputError(f"{place} holds several data sets, {listed(names)}; name the folder of one of them")
    suffixes = sorted({suffix(name) for name in rows})
    if len(suffixes) > 1:
        raise InputError(f"{place} has files of several kinds, {listed(suffixes)}; name one of them, or a folder")
    splits: dict[str, list[str]] = {}
    for name in rows:
        splits.setdefault(_split(name) or "train", []).append(os.path.join(place.path, name))
    return {split: Split(place, tuple(files)) for split, files in splits.items()}


def _files(folder: str) -> list[str]:
    """The paths of a folder's files, relative to it, without hidden folders."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.relpath(os.path.join(root, name), folder) for name in names]
    return sorted(found)


def _split(name: str) -> str | None:
    """The split that a file's name, or else a folder's above it, speaks of."""
    for part in reversed(os.path.splitext(name)[0].split(os.sep)):
        for word in re.split(r"[^0-9A-Za-z]+", part):
            if word.lower() in _SPLITS:
                return _SPLITS[word.lower()]
    return None


def _configuration(name: str) -> str:
    """The folder of a file, without parts that name a split or say that data is in it."""
    parts = os.path.dirname(name).split(os.sep)
    return os.sep.join(part for part in parts if part and part != "data" and _split(part + ".x") is None)
