"""Reading text and prompt/completion pairs from files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from typing import Any

from ...errors import InputError, listed, sentence
from ...storage.regular_file import open_regular

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text", ".tex", ".html", ".c", ".h", ".cpp", ".json", ".csv")
_PAIR_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_AS_TEXT = "to train on the file as text, give it a name that ends in .txt"


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


def read_text(path: str) -> str:
    """A text file in UTF-8, with or without a byte order mark; invalid bytes are replaced.

    Raises:
        InputError: when it cannot be read.
    """
    if not os.path.exists(path):
        raise InputError(f"--data {path}: no such file or folder")
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise InputError(f"--data {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a pipe, say
        raise InputError(f"--data: {error}; name a file or a folder") from None


def read_documents(path: str | None) -> list[str]:
    """The documents of a file, of a folder's text files in sorted order, or the language reference.

    Raises:
        InputError: when there is nothing to read.
    """
    if path is None:
        return language_reference()
    if os.path.isdir(path):
        files = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(_TEXT_SUFFIXES)
        )
        if not files:
            raise InputError(f"--data {path} is a folder without text files (looked for {' '.join(_TEXT_SUFFIXES)})")
        documents = [read_text(name) for name in files]
    else:
        documents = [read_text(path)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"--data {path} is empty; text was expected")
    return documents


def has_pairs(path: str) -> bool:
    """Whether a path is of a kind that holds pairs, by its name."""
    return os.path.splitext(path)[1].lower() in _PAIR_SUFFIXES and not os.path.isdir(path)


def read_pairs(path: str) -> list[tuple[str, str]]:
    """(prompt, completion) from each row of a file.

    A row is a line of a JSONL file, an element of the array in a JSON file, or a record of a CSV or TSV file whose
    first line names the columns.

    Raises:
        InputError: for a row without these; the sentence says which.
    """
    suffix = os.path.splitext(path)[1].lower()
    rows = {".json": _array, ".csv": _table, ".tsv": _table}.get(suffix, _lines)
    pairs = [_pair(row, where) for row, where in rows(path)]
    if not pairs:
        raise InputError(f"--data {path} is empty; rows with 'prompt' and 'completion' were expected")
    return pairs


def _lines(path: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"--data {path}, line {number}"
            yield _parsed(line, where), where


def _array(path: str) -> Iterator[tuple[Any, str]]:
    text = read_text(path)
    rows = _parsed(text, f"--data {path}") if text.strip() else []
    if not isinstance(rows, list):
        raise InputError(
            f"--data {path}: a JSON array of objects with 'prompt' and 'completion' was expected; {_AS_TEXT}"
        )
    for number, row in enumerate(rows, 1):
        yield row, f"--data {path}, element {number}"


def _table(path: str) -> Iterator[tuple[Any, str]]:
    text = read_text(path)
    before = csv.field_size_limit(max(len(text), 1))  # 128 KiB unless told: less than a long completion
    try:
        delimiter = "\t" if path.lower().endswith(".tsv") else ","
        records = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        columns = list(records.fieldnames or []) if text.strip() else ["prompt", "completion"]
        missing = [name for name in ("prompt", "completion") if name not in columns]
        if missing:
            raise InputError(
                f"--data {path}: its first line should name the columns, {' and '.join(map(repr, missing))} among "
                f"them, and has {listed(columns)}; {_AS_TEXT}"
            )
        for row in records:
            yield row, f"--data {path}, line {records.line_num}"
    except csv.Error as error:
        raise InputError(f"--data {path}: {error}") from None
    finally:
        csv.field_size_limit(before)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{where}: brackets nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: {sentence(error)}") from None


def _pair(row: Any, where: str) -> tuple[str, str]:
    prompt, completion = (row.get(key) if isinstance(row, dict) else None for key in ("prompt", "completion"))
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise InputError(f"{where}: expected an object with the strings 'prompt' and 'completion' (not empty)")
    # JSON can spell half a surrogate pair, which is not a character and which tokenizers refuse.
    return _without_surrogates(prompt), _without_surrogates(completion)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()
