"""What the rows of a source mean: their columns say whether they are conversations, pairs, instructions or texts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, listed
from .folder import evaluation_split, splits_of, training_split
from .messages import Conversation, conversation, text
from .read import COLUMNS, KINDS, Place, Row, has_rows, kind_of, read_documents, read_rows

Pair = tuple[str, str]  # prompt and completion


@dataclass(frozen=True)
class Instruction:
    """An instruction with its answer: a conversation of two messages, or a pair where there is no chat template."""

    chat: Conversation
    pair: Pair


@dataclass(frozen=True)
class Records:
    """What was read.

    Attributes:
        place: where.
        kind: "text" (whole files), "documents", "pairs", "messages" or "instructions".
        rows: strings, for the first two; :data:`Pair`; :class:`Conversation`; or :class:`Instruction`.
    """

    place: Place
    kind: str
    rows: list[Any]


def read_records(place: Place, evaluation: bool = False) -> tuple[Records, Records | None]:
    """The records of a file or a folder, and those of its own split for evaluation, if it has one.

    Args:
        place: a text file; a file of rows, by the end of its name; a folder of text files; or a data set's folder.
        evaluation: read a folder only for evaluation: its split for that, or else "train" or the only one.

    Raises:
        InputError: for data that cannot be read.
    """
    if os.path.isdir(place.path):
        splits = splits_of(place)
        if splits is None:
            return Records(place, "text", read_documents(place)), None
        held_out = evaluation_split(splits)
        if evaluation:
            return _records(place, (held_out or training_split(place, splits)).rows()), None
        chosen = training_split(place, splits)
        training = _records(place, chosen.rows())
        return training, None if held_out in (None, chosen) else _records(place, held_out.rows())
    if has_rows(place.path):
        return _records(place, read_rows(place)), None
    return Records(place, "text", read_documents(place)), None


def _records(place: Place, rows: Iterable[Row]) -> Records:
    """All rows are of the kind of the first one."""
    kind, found = None, []
    for value, where in rows:
        if kind is None:
            kind = _kind(value, where)
        found.append(_READERS[kind](value, where))
    if kind == "documents":
        found = [document for document in found if document.strip()]
    if kind is None or not found:
        raise InputError(f"{place} is empty; rows with {COLUMNS} were expected")
    return Records(place, kind, found)


def _kind(value: Any, where: str) -> str:
    kind = kind_of(value) if isinstance(value, dict) else None
    if kind is None:
        has = f", found the keys {listed(map(str, value))}" if isinstance(value, dict) and value else ""
        raise InputError(f"{where}: expected an object with {COLUMNS}{has}")
    return kind


def _get(row: Any, where: str, *names: str) -> list[Any]:
    if not isinstance(row, dict) or not all(row.get(name) is not None for name in names):
        raise InputError(f"{where}: expected an object with {' and '.join(map(repr, names))}, as in the rows before it")
    return [row[name] for name in names]


def _messages(row: Any, where: str) -> Conversation:
    names = [name for (name,) in KINDS["messages"] if isinstance(row, dict) and row.get(name) is not None]
    (value,) = _get(row, where, *(names[:1] or ["messages"]))
    return conversation(value, row, where)


def _pair(row: Any, where: str) -> Pair | Conversation:
    prompt, completion = (row.get(key) if isinstance(row, dict) else None for key in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's pairs of messages
        return conversation(prompt, row, where, completion)
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise InputError(f"{where}: expected an object with the strings 'prompt' and 'completion' (not empty)")
    return text(prompt), text(completion)


def _instruction(row: Any, where: str) -> Instruction:
    instruction, output = _get(row, where, "instruction", "output")
    given = row.get("input") or ""
    if not all(isinstance(value, str) for value in (instruction, output, given)) or not output:
        raise InputError(f"{where}: 'instruction', 'input' and 'output' (not empty) should be strings")
    instruction, given, output = text(instruction), text(given), text(output)
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction},
        {"role": "assistant", "content": output},
    ]
    prompt = f"### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return Instruction(conversation(messages, row, where), (f"{prompt}### Response:\n", output))


def _document(row: Any, where: str) -> str:
    value = row.get("text") if isinstance(row, dict) else None
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: 'text' should be a string")
    if not isinstance(row, dict) or "text" not in row:
        raise InputError(f"{where}: expected an object with the string 'text', as in the rows before it")
    return text(value or "")


_READERS = {"messages": _messages, "pairs": _pair, "instructions": _instruction, "documents": _document}
