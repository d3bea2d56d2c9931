"""A run's data: read, split without leaks, and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import InputError
from .batches import Pairs, Windows
from .read import has_pairs, read_documents, read_pairs

_HELD_OUT_CHUNKS = 4

Encode = Callable[[str, bool], list[int]]  # (text, starts a document) -> token ids


@dataclass(frozen=True)
class Data:
    """A training set, a held-out set, and facts about them for the report.

    Attributes:
        train, held_out: the sets.
        prompt: the beginning of a held-out text, to generate from.
        summary: sizes, the source, and a digest of all tokens.
    """

    train: Windows | Pairs
    held_out: Windows | Pairs
    prompt: list[int]
    summary: dict[str, object]


def split_text(text: str, fraction: float) -> tuple[list[str], list[str], int]:
    """Cuts held-out chunks, evenly spaced, out of a text, at ends of lines.

    Paragraphs of 40 characters or more that occur in a held-out chunk are removed from the training text: reference
    texts and sources repeat themselves, and a repeated paragraph would leak.

    Returns:
        The training chunks, the held-out chunks, and the number of characters removed.
    """
    size = len(text)
    width = max(int(size * fraction / _HELD_OUT_CHUNKS), 1)
    training, held_out, position = [], [], 0
    for chunk in range(_HELD_OUT_CHUNKS):
        begin = _line_end(text, int((chunk + 0.5) * size / _HELD_OUT_CHUNKS) - width // 2, position)
        end = _line_end(text, begin + width, begin)
        training.append(text[position:begin])
        held_out.append(text[begin:end])
        position = end
    training.append(text[position:])
    leaks = {p for chunk in held_out for p in _paragraphs(chunk) if len(p) >= 40}
    kept, dropped = [], 0
    for chunk in training:
        paragraphs = chunk.split("\n\n")
        own = [p for p in paragraphs if p.strip() not in leaks]
        dropped += sum(len(p) + 2 for p in paragraphs if p.strip() in leaks)
        kept.append("\n\n".join(own))
    return [c for c in kept if c.strip()], [c for c in held_out if c.strip()], dropped


def _paragraphs(text: str) -> list[str]:
    return [p.strip() for p in text.split("\n\n")]


def _line_end(text: str, position: int, least: int) -> int:
    """The start of the line after ``position`` if one begins within 400 characters, else ``position`` itself."""
    position = max(position, least)
    newline = text.find("\n", position, position + 400)
    return newline + 1 if newline >= 0 else position


def load_data(path: str | None, encode: Encode, end: int | None, seq_len: int, held_out: float, seed: int) -> Data:
    """Reads, splits and encodes.

    Args:
        path: see :func:`.read.read_documents`; a file whose name ends in .jsonl, .json, .csv or .tsv holds pairs.
        encode: text to token ids.
        end: the id that ends a document, if the tokenizer has one.
        seq_len: tokens in a sequence; longer pairs are cut.
        held_out: the fraction to hold out.
        seed: decides the order.

    Raises:
        InputError: for data that cannot be read or is too short.
    """
    if path is not None and has_pairs(path):
        return _load_pairs(path, encode, end, seq_len, held_out, seed)
    return _load_text(path, encode, end, seq_len, held_out, seed)


def _load_text(path: str | None, encode: Encode, end: int | None, seq_len: int, fraction: float, seed: int) -> Data:
    documents = read_documents(path)
    name = "the data" if path is None else f"--data {path}"
    # The split sees one stream of all documents, so a chunk may cross from one into the next.
    training, held_out, dropped = split_text("\n\n".join(documents), fraction)
    train_tokens, held_out_tokens = (_encode_chunks(chunks, encode, end) for chunks in (training, held_out))
    for title, tokens, least in (("training", train_tokens, seq_len + 1), ("held-out", held_out_tokens, 2)):
        if len(tokens) < least:
            raise InputError(
                f"{name} is too short: its {title} part has {len(tokens)} tokens, and at least {least} are needed; "
                "give more text, or a smaller --seq-len"
            )
    summary = {
        "source": path or "pydoc_data.topics",
        "kind": "text",
        "train_tokens": len(train_tokens),
        "held_out_tokens": len(held_out_tokens),
        "repeated_characters_dropped": dropped,
        "sha256": _digest(train_tokens, held_out_tokens),
    }
    prompt = held_out_tokens[: max(min(96, seq_len // 2), 1)].tolist()
    return Data(Windows(train_tokens, seq_len, seed), Windows(held_out_tokens, seq_len, seed), prompt, summary)


def _encode_chunks(chunks: list[str], encode: Encode, end: int | None) -> torch.Tensor:
    ids: list[int] = []
    for chunk in chunks:
        ids.extend(encode(chunk, True))
        if end is not None:
            ids.append(end)
    return torch.from_numpy(np.asarray(ids, dtype=np.int32))


def _load_pairs(path: str, encode: Encode, end: int | None, seq_len: int, fraction: float, seed: int) -> Data:
    examples, cut = _encode_pairs(read_pairs(path), encode, end, seq_len)
    distinct = {tuple(ids) for ids, _ in examples}
    if len(distinct) < 2:
        raise InputError(f"--data {path} has {len(distinct)} distinct examples; at least 2 are needed to hold one out")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(int(len(examples) * fraction), 1)
    held_out = [examples[i] for i in order[:count]]
    leaks = {tuple(ids) for ids, _ in held_out}
    training = [examples[i] for i in order[count:] if tuple(examples[i][0]) not in leaks]
    if not training:
        raise InputError(f"--data {path}: nothing is left to train on beside the held-out examples; give more lines")
    pad = end if end is not None else 0
    summary = {
        "source": path,
        "kind": "pairs",
        "train_examples": len(training),
        "held_out_examples": len(held_out),
        "train_tokens": sum(len(ids) - prompt for ids, prompt in training),
        "held_out_tokens": sum(len(ids) - prompt for ids, prompt in held_out),
        "examples_cut": cut,
        "sha256": _digest(*(torch.tensor(ids) for ids, _ in training + held_out)),
    }
    ids, prompt_length = held_out[0]
    data = Pairs(training, seq_len, pad, seed), Pairs(held_out, seq_len, pad, seed)
    return Data(*data, ids[: max(prompt_length, 1)], summary)


def _encode_pairs(
    pairs: list[tuple[str, str]], encode: Encode, end: int | None, seq_len: int
) -> tuple[list[tuple[list[int], int]], int]:
    """(token ids, length of the prompt) of each pair, and how many had to be cut to ``seq_len`` + 1."""
    examples, cut = [], 0
    for prompt, completion in pairs:
        head = encode(prompt, True)
        tail = encode(completion, False) + ([end] if end is not None else [])
        if len(head) + len(tail) > seq_len + 1:
            cut += 1
            # Keep the end of the prompt and the beginning of the completion: at least half is completion.
            head = head[-max(seq_len + 1 - len(tail), (seq_len + 1) // 2) :] if head else head
            tail = tail[: seq_len + 1 - len(head)]
        if len(head) + len(tail) >= 2:
            examples.append((head + tail, len(head)))
    return examples, cut


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.to(torch.int32).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()
