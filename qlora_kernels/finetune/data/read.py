"""Reading text, and rows with named columns, from files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, listed, sentence
from ...storage.regular_file import open_regular
from .columnar import read_arrow, read_parquet

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text", ".tex", ".html", ".c", ".h", ".cpp", ".json", ".csv")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COLUMNS = "'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'"
_AS_TEXT = "to train on the file as text, give it a name that ends in .txt"

Row = tuple[Any, str]  # a row's value, and where it stands, for messages


@dataclass(frozen=True)
class Place:
    """A file or a folder, and the option that named it. As a string, the beginning of a message."""

    path: str
    flag: str = "--data"

    def __str__(self) -> str:
        return f"{self.flag} {self.path}".rstrip()

    def at(self, path: str) -> Place:
        """Another path, named by the same option."""
        return Place(path, self.flag)


def suffix(path: str) -> str:
    """The end of a file's name, in lower case: ".jsonl"."""
    return os.path.splitext(path)[1].lower()


def language_reference() -> list[str]:
    """The documents of Python's language reference, as ``help('assert')`` shows them.

    Raises:
        InputError: when this Python came without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "this Python came without the language reference (pydoc_data.topics); name a text with --data"
        ) from None
    documents = []
    for name in sorted(topics):
        value = topics[name]
        documents.append(value if isinstance(value, str) else "\n".join(map(str, value)))
    return documents


def read_text(place: Place) -> str:
    """A text file in UTF-8, with or without a byte order mark; invalid bytes are replaced.

    Raises:
        InputError: when it cannot be read.
    """
    if not os.path.exists(place.path):
        raise InputError(f"{place}: no such file or folder")
    try:
        with open_regular(place.path) as file:
            return file.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a pipe, say
        raise InputError(f"{place.flag}: {error}; name a file or a folder") from None


def read_documents(place: Place) -> list[str]:
    """The documents of a text file, or of a folder's text files in sorted order.

    Raises:
        InputError: when there is nothing to read.
    """
    if os.path.isdir(place.path):
        files = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(place.path)
            for name in names
            if name.lower().endswith(TEXT_SUFFIXES)
        )
        if not files:
            raise InputError(
                f"{place} is a folder without text files (looked for {' '.join(TEXT_SUFFIXES)}), and no data set "
                f"(looked for {' '.join(ROW_SUFFIXES)})"
            )
        documents = [read_text(place.at(name)) for name in files]
    else:
        documents = [read_text(place)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{place} is empty; text was expected")
    return documents


def has_rows(path: str) -> bool:
    """Whether a path is of a kind that holds rows, by its name."""
    return suffix(path) in (*ROW_SUFFIXES, ".arrow") and not os.path.isdir(path)


def read_rows(place: Place) -> Iterator[Row]:
    """Each row of a file, and where it stands.

    A row is a line of a JSONL file, an element of the array in a JSON file, a record of a CSV or TSV file whose first
    line names the columns, or a row of a Parquet file, or of an Arrow file in a folder that ``datasets`` saved.

    Raises:
        InputError: for a file that is none.
    """
    readers = {".json": _array, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".arrow": _arrow}
    return readers.get(suffix(place.path), _lines)(place)


def parsed(text: str, where: str) -> Any:
    """JSON.

    Raises:
        InputError: for text that is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{where}: brackets nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: {sentence(error)}") from None


def _lines(place: Place) -> Iterator[Row]:
    for number, line in enumerate(read_text(place).split("\n"), 1):
        if line.strip():
            where = f"{place}, line {number}"
            yield parsed(line, where), where


def _array(place: Place) -> Iterator[Row]:
    text = read_text(place)
    rows = parsed(text, str(place)) if text.strip() else []
    if not isinstance(rows, list):
        raise InputError(f"{place}: a JSON array of objects with {COLUMNS} was expected; {_AS_TEXT}")
    for number, row in enumerate(rows, 1):
        yield row, f"{place}, element {number}"


def _table(place: Place) -> Iterator[Row]:
    text = read_text(place)
    before = csv.field_size_limit(max(len(text), 1))  # 128 KiB unless told: less than a long completion
    try:
        delimiter = "\t" if suffix(place.path) == ".tsv" else ","
        records = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        columns = list(records.fieldnames or []) if text.strip() else ["text"]
        if kind_of(columns) is None:
            raise InputError(
                f"{place}: its first line should name the columns, {COLUMNS} among them, and has {listed(columns)}; "
                f"{_AS_TEXT}"
            )
        for row in records:
            yield row, f"{place}, line {records.line_num}"
    except csv.Error as error:
        raise InputError(f"{place}: {error}") from None
    finally:
        csv.field_size_limit(before)


def _parquet(place: Place) -> Iterator[Row]:
    if not os.path.exists(place.path):
        raise InputError(f"{place}: no such file or folder")
    for number, row in enumerate(read_parquet(place.path, str(place)), 1):
        yield row, f"{place}, row {number}"


def _arrow(place: Place) -> Iterator[Row]:
    for number, row in enumerate(read_arrow(place.path, str(place)), 1):
        yield row, f"{place}, row {number}"


#: Which columns make which kind of rows; the first kind that has all of them counts.
KINDS = {
    "messages": (("messages",), ("conversations",), ("conversation",)),
    "pairs": (("prompt", "completion"),),
    "instructions": (("instruction", "output"),),
    "documents": (("text",),),
}


def kind_of(columns: Any) -> str | None:
    """The kind of rows with these columns, a key of :data:`KINDS`; None for a kind that is not known."""
    return next((kind for kind, sets in KINDS.items() if any(set(names) <= set(columns) for names in sets)), None)
