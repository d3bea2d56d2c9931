"""Reading text and prompt/completion pairs from files."""

from __future__ import annotations

import json
import os

from ...errors import InputError, sentence
from ...storage.regular_file import open_regular

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text", ".tex", ".html", ".c", ".h", ".cpp", ".json", ".csv")


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


def read_pairs(path: str) -> list[tuple[str, str]]:
    """(prompt, completion) from each line of a JSONL file.

    Raises:
        InputError: for a line that is no object with these; the sentence names the line.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    pairs = [_parse_pair(line, f"--data {path}, line {number}") for number, line in lines if line.strip()]
    if not pairs:
        raise InputError(f"--data {path} is empty; lines with 'prompt' and 'completion' were expected")
    return pairs


def _parse_pair(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{where}: brackets nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: {sentence(error)}") from None
    prompt, completion = (row.get(key) if isinstance(row, dict) else None for key in ("prompt", "completion"))
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise InputError(f"{where}: expected an object with the strings 'prompt' and 'completion' (not empty)")
    # JSON can spell half a surrogate pair, which is not a character and which tokenizers refuse.
    return _without_surrogates(prompt), _without_surrogates(completion)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()
