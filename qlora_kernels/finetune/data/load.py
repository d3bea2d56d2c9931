"""A run's data: read, split without leaks, and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from .batches import Example, Examples, Windows
from .chat import Chat
from .messages import Conversation
from .read import Place, language_reference
from .records import Instruction, Records, read_records

HELD_OUT = 0.1  # the fraction to hold out, when there is nothing else to evaluate on and none is given
_HELD_OUT_CHUNKS = 4

Encode = Callable[[str, bool], list[int]]  # (text, starts a document) -> token ids


@dataclass(frozen=True)
class Data:
    """A training set, a held-out set, and facts about them for the report.

    Attributes:
        train, held_out: the sets.
        prompt: the beginning of a held-out text, to generate from.
        fraction: how much of the data was held out; None when the held-out set is other data.
        summary: sizes, the source, and a digest of all tokens.
    """

    train: Windows | Examples
    held_out: Windows | Examples
    prompt: list[int]
    fraction: float | None
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


def load_data(
    path: str | None,
    encode: Encode,
    end: int | None,
    seq_len: int,
    held_out: float | None,
    seed: int,
    eval_path: str | None = None,
    chat: Callable[[], Chat | None] = lambda: None,
) -> Data:
    """Reads, splits and encodes.

    Args:
        path: see :func:`.records.read_records`; None for the language reference that ships with Python.
        encode: text to token ids.
        end: the id that ends a document, if the tokenizer has one.
        seq_len: tokens in a sequence; longer examples are cut.
        held_out: the fraction to hold out; None for the data set's own split for evaluation, or a tenth.
        seed: decides the order.
        eval_path: what to evaluate on instead; as ``path``.
        chat: makes the chat template, which conversations need.

    Raises:
        InputError: for data that cannot be read or is too short.
    """
    evaluation = None
    if path is None:
        training = Records(Place("", "the data"), "text", language_reference())
    else:
        training, evaluation = read_records(Place(path))
    if eval_path is not None:
        evaluation, _ = read_records(Place(eval_path, "--eval-data"), evaluation=True)
    elif held_out is not None:  # the user's word counts more than the data set's
        evaluation = None
    encoder = _Encoder(encode, end, seq_len, seed, chat)
    if evaluation is not None:
        return encoder.two_sets(training, evaluation)
    fraction = HELD_OUT if held_out is None else held_out
    return encoder.texts(training, fraction) if _is_text(training) else encoder.examples(training, fraction)


def _is_text(records: Records) -> bool:
    return records.kind in ("text", "documents")


class _Encoder:
    """Makes :class:`Data` from records."""

    def __init__(
        self, encode: Encode, end: int | None, seq_len: int, seed: int, chat: Callable[[], Chat | None]
    ) -> None:
        self.encode, self.end, self.seq_len, self.seed = encode, end, seq_len, seed
        self._make_chat = chat
        self._chat: Chat | None = None
        self._tried = False
        self.cut = 0

    @property
    def chat(self) -> Chat | None:
        """Made when it is first asked for: the rows say whether it is needed."""
        if not self._tried:
            self._chat, self._tried = self._make_chat(), True
        return self._chat

    def texts(self, records: Records, fraction: float) -> Data:
        """Holds out whole documents where rows are documents, and else chunks of the text."""
        documents, dropped = records.rows, 0
        if records.kind == "documents" and len(set(documents)) > 1:
            training, held_out = self._apart(documents, fraction, lambda document: document)
        else:
            # The split sees one stream of all documents, so a chunk may cross from one into the next.
            training, held_out, dropped = split_text("\n\n".join(documents), fraction)
        tokens = self._tokens(training), self._tokens(held_out)
        return self._of_tokens(records, *tokens, fraction, {"repeated_characters_dropped": dropped})

    def examples(self, records: Records, fraction: float) -> Data:
        """Holds out examples, none of which stays in the training set."""
        examples = self._examples(records)
        distinct = {tuple(example.ids) for example in examples}
        if len(distinct) < 2:
            raise InputError(
                f"{records.place} has {len(distinct)} distinct examples; at least 2 are needed to hold one out"
            )
        training, held_out = self._apart(examples, fraction, lambda example: tuple(example.ids))
        if not training:
            raise InputError(
                f"{records.place}: nothing is left to train on beside the held-out examples; give more lines"
            )
        return self._data(records, self._set(training), self._set(held_out), fraction, {})

    def two_sets(self, training: Records, evaluation: Records) -> Data:
        """Trains on one set and evaluates on the other, each as it is."""
        sets = []
        for title, records, least in (("training", training, self.seq_len + 1), ("evaluation", evaluation, 2)):
            if _is_text(records):
                tokens = self._tokens(records.rows)
                _require_tokens(tokens, f"{records.place} is too short: as {title} text it", least)
                sets.append(Windows(tokens, self.seq_len, self.seed))
            else:
                sets.append(self._set(self._examples(records)))
        facts: dict[str, object] = {"eval_source": evaluation.place.path, "eval_kind": evaluation.kind}
        if all(isinstance(one, Examples) for one in sets):
            known = {tuple(example.ids) for example in sets[0].examples}
            facts["held_out_in_training"] = sum(tuple(example.ids) in known for example in sets[1].examples)
        return self._data(training, sets[0], sets[1], None, facts)

    def _apart(self, items: list[Any], fraction: float, key: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
        """Some items, at random, and the others without those equal to one of them."""
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = max(int(len(items) * fraction), 1)
        held_out = [items[i] for i in order[:count]]
        leaks = {key(item) for item in held_out}
        return [items[i] for i in order[count:] if key(items[i]) not in leaks], held_out

    def _tokens(self, documents: list[str]) -> torch.Tensor:
        ids: list[int] = []
        for document in documents:
            ids.extend(self.encode(document, True))
            if self.end is not None:
                ids.append(self.end)
        return torch.from_numpy(np.asarray(ids, dtype=np.int32))

    def _of_tokens(
        self,
        records: Records,
        training: torch.Tensor,
        held_out: torch.Tensor,
        fraction: float,
        facts: dict[str, object],
    ) -> Data:
        _require_tokens(training, f"{records.place} is too short: its training part", self.seq_len + 1)
        _require_tokens(held_out, f"{records.place} is too short: its held-out part", 2)
        windows = [Windows(tokens, self.seq_len, self.seed) for tokens in (training, held_out)]
        return self._data(records, windows[0], windows[1], fraction, facts)

    def _examples(self, records: Records) -> list[Example]:
        examples = []
        for row in records.rows:
            example = self._example(row, records)
            if len(example.ids) > self.seq_len + 1:
                self.cut += 1
                example = example.cut(self.seq_len + 1)
            if any(end > max(begin, 1) for begin, end in example.spans):  # the first token is predicted by nothing
                examples.append(example)
        if not examples:
            raise InputError(f"{records.place} has no example with a token to learn")
        return examples

    def _example(self, row: Any, records: Records) -> Example:
        if isinstance(row, Instruction):
            row = row.pair if self.chat is None else row.chat
        if isinstance(row, Conversation):
            if self.chat is None:
                raise InputError(
                    f"{records.place} holds conversations, and the model's tokenizer has no chat template; give one "
                    "with --chat-template FILE, such as the chat_template.jinja of the model's chat version"
                )
            return self.chat.example(row)
        prompt, completion = row
        head = self.encode(prompt, True)
        ids = head + self.encode(completion, False) + ([self.end] if self.end is not None else [])
        return Example(ids, ((len(head), len(ids)),))

    def _set(self, examples: list[Example]) -> Examples:
        return Examples(examples, self.seq_len, self.end if self.end is not None else 0, self.seed)

    def _data(
        self,
        records: Records,
        training: Windows | Examples,
        held_out: Windows | Examples,
        fraction: float | None,
        facts: dict[str, object],
    ) -> Data:
        sizes: dict[str, object] = {}
        for name, one in (("train", training), ("held_out", held_out)):
            if isinstance(one, Windows):
                sizes[f"{name}_tokens"] = len(one.tokens)
            else:
                sizes[f"{name}_examples"] = len(one.examples)
                sizes[f"{name}_tokens"] = sum(example.counted for example in one.examples)
        if isinstance(training, Examples) or isinstance(held_out, Examples):
            sizes["examples_cut"] = self.cut
        if self._chat is not None:
            sizes["chat_template"] = {"source": self._chat.name, "sha256": self._chat.digest}
        summary = {
            "source": records.place.path or "pydoc_data.topics",
            "kind": records.kind,
            **sizes,
            **facts,
            "sha256": _digest(training, held_out),
        }
        return Data(training, held_out, _prompt(held_out), fraction, summary)


def _require_tokens(tokens: torch.Tensor, what: str, least: int) -> None:
    if len(tokens) < least:
        raise InputError(
            f"{what} has {len(tokens)} tokens, and at least {least} are needed; give more text, or a smaller --seq-len"
        )


def _prompt(held_out: Windows | Examples) -> list[int]:
    if isinstance(held_out, Examples):
        first = held_out.examples[0]
        return first.ids[: max(first.prompt, 1)]
    return held_out.tokens[: max(min(96, held_out.seq_len // 2), 1)].tolist()


def _digest(*sets: Windows | Examples) -> str:
    """Of all tokens, and of which of them count."""
    digest = hashlib.sha256()

    def update(values: Any) -> None:
        digest.update(np.asarray(values, dtype=np.int32).tobytes())
        digest.update(b"|")

    for one in sets:
        if isinstance(one, Windows):
            update(one.tokens)
        else:
            for example in one.examples:
                update(example.ids)
                update(example.spans)
        digest.update(b"#")
    return digest.hexdigest()
