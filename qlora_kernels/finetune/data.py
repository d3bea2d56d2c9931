"""Text and prompt/completion data: reading, splitting without leaks, batches that follow from a step's number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError, sentence

IGNORED = -100  # label of a position that does not count in the loss
_HELD_OUT_CHUNKS = 4
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text", ".tex", ".html", ".c", ".h", ".cpp", ".json", ".csv")

Encode = Callable[[str, bool], list[int]]  # (text, starts a document) -> token ids


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
    """A text file as UTF-8, with or without a byte order mark; bytes that are not are replaced."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"--data {path} cannot be read: {error.strerror}") from None


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
    elif os.path.exists(path):
        documents = [read_text(path)]
    else:
        raise InputError(f"--data {path}: no such file or folder")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"--data {path} is empty; text was expected")
    return documents


def read_pairs(path: str) -> list[tuple[str, str]]:
    """(prompt, completion) from each line of a JSONL file.

    Raises:
        InputError: for a line that is not such an object; the sentence names the line.
    """
    pairs = []
    for number, line in enumerate(read_text(path).split("\n") if os.path.exists(path) else _missing(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"--data {path}, line {number}: not JSON ({error.msg})") from None
        except RecursionError:
            raise InputError(f"--data {path}, line {number}: too many brackets in each other") from None
        except ValueError as error:  # a number of thousands of digits
            raise InputError(f"--data {path}, line {number}: {sentence(error)}") from None
        texts = [row.get(key) if isinstance(row, dict) else None for key in ("prompt", "completion")]
        if not all(isinstance(text, str) for text in texts) or not texts[1]:
            raise InputError(
                f"--data {path}, line {number}: expected an object with the strings 'prompt' and 'completion' "
                "(not empty)"
            )
        # JSON can spell half a surrogate pair, which is no character and which tokenizers refuse.
        texts = [text.encode("utf-8", errors="replace").decode() for text in texts]
        pairs.append((texts[0], texts[1]))
    if not pairs:
        raise InputError(f"--data {path} is empty; lines with 'prompt' and 'completion' were expected")
    return pairs


def _missing(path: str) -> list[str]:
    raise InputError(f"--data {path}: no such file or folder")


@dataclass(frozen=True)
class Batch:
    """int64 [rows, T] each; ``labels[i, t]`` is the token after ``inputs[i, t]``, or :data:`IGNORED`."""

    inputs: torch.Tensor
    labels: torch.Tensor

    @property
    def counted(self) -> int:
        """How many positions count in the loss."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: str) -> Batch:
        return Batch(self.inputs.to(device), self.labels.to(device))


class Windows:
    """Windows of a stream of tokens: each epoch cuts it at another offset and shuffles.

    ``batch(i)`` is a function of (seed, i) alone, so a run that resumes at batch i sees what it would have seen.
    """

    def __init__(self, tokens: torch.Tensor, seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        spare = len(tokens) - 1
        self._count = max(spare // seq_len - 1, 1)  # one window less than fit: the room to shift
        self._offsets = spare - self._count * seq_len + 1
        self._epoch: tuple[int, int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self._count

    def _window(self, index: int) -> torch.Tensor:
        epoch, position = divmod(index, self._count)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = int(torch.randint(self._offsets, (1,), generator=generator))
            self._epoch = (epoch, offset, torch.randperm(self._count, generator=generator))
        begin = self._epoch[1] + int(self._epoch[2][position]) * self.seq_len
        return self.tokens[begin : begin + self.seq_len + 1]

    def batch(self, index: int, size: int) -> Batch:
        rows = torch.stack([self._window(i).long() for i in range(index * size, (index + 1) * size)])
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def sequential(self, size: int, limit: int) -> Iterator[Batch]:
        """The stream in order, without overlap, up to ``limit`` tokens; the last window may be short."""
        count = min(len(self.tokens) - 1, max(limit, 1))
        full = count // self.seq_len
        for begin in range(0, full, size):
            end = min(begin + size, full)
            inputs = self.tokens[begin * self.seq_len : end * self.seq_len].long()
            labels = self.tokens[begin * self.seq_len + 1 : end * self.seq_len + 1].long()
            yield Batch(inputs.view(end - begin, -1), labels.view(end - begin, -1))
        if count % self.seq_len:
            rest = self.tokens[full * self.seq_len : count + 1].long().unsqueeze(0)
            yield Batch(rest[:, :-1], rest[:, 1:])


class Pairs:
    """Prompt/completion examples, padded on the right (which a causal model does not see), loss on completions."""

    def __init__(self, examples: list[tuple[list[int], int]], seq_len: int, pad: int, seed: int) -> None:
        self.examples, self.seq_len, self.pad, self.seed = examples, seq_len, pad, seed
        self._epoch: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def _collate(self, rows: list[tuple[list[int], int]]) -> Batch:
        # ids[:-1] predict ids[1:]; position t predicts token t + 1, so the completion's loss starts at prompt - 1.
        width = max(len(ids) for ids, _ in rows) - 1
        inputs = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for row, (ids, prompt) in enumerate(rows):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels[row, max(prompt - 1, 0) : len(ids) - 1] = torch.tensor(ids[max(prompt, 1) :])
        return Batch(inputs, labels)

    def batch(self, index: int, size: int) -> Batch:
        rows = []
        for i in range(index * size, (index + 1) * size):
            epoch, position = divmod(i, len(self.examples))
            if self._epoch is None or self._epoch[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch = (epoch, torch.randperm(len(self.examples), generator=generator))
            rows.append(self.examples[int(self._epoch[1][position])])
        return self._collate(rows)

    def sequential(self, size: int, limit: int) -> Iterator[Batch]:
        seen = 0
        for begin in range(0, len(self.examples), size):
            if seen >= limit:
                return
            batch = self._collate(self.examples[begin : begin + size])
            seen += batch.counted
            yield batch


@dataclass(frozen=True)
class Data:
    """A training set, a held-out set, and what to say about them."""

    train: Windows | Pairs
    held_out: Windows | Pairs
    prompt: list[int]  # the beginning of a held-out text, to generate from
    summary: dict[str, object]


def split_text(text: str, fraction: float) -> tuple[list[str], list[str], int]:
    """Cuts held-out chunks, evenly spaced, out of a text, at ends of lines.

    A paragraph of 40 characters or more that stands in a held-out chunk is taken out of the training text wherever
    it occurs again: reference texts and sources repeat themselves, and a repeated paragraph would leak.

    Returns:
        The training chunks, the held-out chunks, and the number of characters taken out.
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
    known = {p for chunk in held_out for p in _paragraphs(chunk) if len(p) >= 40}
    kept, dropped = [], 0
    for chunk in training:
        paragraphs = chunk.split("\n\n")
        fresh = [p for p in paragraphs if p.strip() not in known]
        dropped += sum(len(p) + 2 for p in paragraphs if p.strip() in known)
        kept.append("\n\n".join(fresh))
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
        path: see :func:`read_documents`; a name ending in .jsonl holds pairs.
        encode: text to token ids.
        end: the id that ends a document, if the tokenizer has one.
        seq_len: tokens in a sequence; longer pairs are cut.
        held_out: fraction.
        seed: of the order.

    Raises:
        InputError: for data that cannot be read or is too short.
    """
    if path is not None and path.lower().endswith(".jsonl"):
        return _load_pairs(path, encode, end, seq_len, held_out, seed)
    documents = read_documents(path)
    name = "the data" if path is None else f"--data {path}"
    # One stream in which documents follow each other: the split sees it whole, so chunks cross documents.
    training, held, dropped = split_text("\n\n".join(documents), held_out)

    def stream(chunks: list[str]) -> torch.Tensor:
        ids: list[int] = []
        for chunk in chunks:
            ids.extend(encode(chunk, True))
            if end is not None:
                ids.append(end)
        return torch.from_numpy(np.asarray(ids, dtype=np.int32))

    train_tokens, held_tokens = stream(training), stream(held)
    for what, tokens, least in (("training", train_tokens, seq_len + 1), ("held-out", held_tokens, 2)):
        if len(tokens) < least:
            raise InputError(
                f"{name} is too short: its {what} part has {len(tokens)} tokens, and at least {least} are needed; "
                "give more text, or a smaller --seq-len"
            )
    summary = {
        "source": path or "pydoc_data.topics",
        "kind": "text",
        "train_tokens": len(train_tokens),
        "held_out_tokens": len(held_tokens),
        "repeated_characters_dropped": dropped,
        "sha256": _digest(train_tokens, held_tokens),
    }
    prompt = held_tokens[: max(min(96, seq_len // 2), 1)].tolist()
    return Data(Windows(train_tokens, seq_len, seed), Windows(held_tokens, seq_len, seed), prompt, summary)


def _load_pairs(path: str, encode: Encode, end: int | None, seq_len: int, fraction: float, seed: int) -> Data:
    pairs = read_pairs(path)
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
    distinct = {tuple(ids) for ids, _ in examples}
    if len(distinct) < 2:
        raise InputError(f"--data {path} has {len(distinct)} distinct examples; at least 2 are needed to hold one out")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(int(len(examples) * fraction), 1)
    held_out = [examples[i] for i in order[:count]]
    known = {tuple(ids) for ids, _ in held_out}
    training = [examples[i] for i in order[count:] if tuple(examples[i][0]) not in known]
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


def _digest(*parts: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.to(torch.int32).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()
