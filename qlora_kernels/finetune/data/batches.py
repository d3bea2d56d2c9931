"""Batches that follow from a step's number: windows of a stream of tokens, and single examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

IGNORED = -100  # label of a position that does not count in the loss


@dataclass(frozen=True)
class Batch:
    """int64 [rows, T] each; ``labels[i, t]`` is the token after ``inputs[i, t]``, or :data:`IGNORED`."""

    inputs: torch.Tensor
    labels: torch.Tensor

    @property
    def counted(self) -> int:
        """The number of positions that count in the loss."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: str) -> Batch:
        return Batch(self.inputs.to(device), self.labels.to(device))


class Windows:
    """Windows of a stream of tokens: each epoch cuts it at a different offset and shuffles.

    ``batch(i)`` depends on (seed, i) alone, so a run that resumes at batch i sees the same batches.
    """

    def __init__(self, tokens: torch.Tensor, seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        inputs = len(tokens) - 1
        self._count = max(inputs // seq_len - 1, 1)  # one window fewer than fit, which leaves room to shift
        self._offsets = inputs - self._count * seq_len + 1
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


@dataclass(frozen=True)
class Example:
    """A sequence of tokens, and which of them count in the loss.

    Attributes:
        ids: token ids.
        spans: where the tokens that count begin and end, in order and apart; those after a prompt, or the assistant's.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> int:
        """The number of tokens before the first that counts."""
        return self.spans[0][0]

    @property
    def counted(self) -> int:
        """The number of tokens that count."""
        return sum(end - begin for begin, end in self.spans)

    def cut(self, length: int) -> Example:
        """At most ``length`` tokens around the first that counts: at least half of them after it, where there are."""
        if len(self.ids) <= length:
            return self
        begin = max(min(len(self.ids) - length, self.prompt - length // 2), 0)
        spans = ((max(first - begin, 0), min(last - begin, length)) for first, last in self.spans)
        return Example(self.ids[begin : begin + length], tuple(span for span in spans if span[0] < span[1]))


class Examples:
    """Examples, padded on the right, where a causal model does not look."""

    def __init__(self, examples: list[Example], seq_len: int, pad: int, seed: int) -> None:
        self.examples, self.seq_len, self.pad, self.seed = examples, seq_len, pad, seed
        self._epoch: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def _collate(self, rows: list[Example]) -> Batch:
        # ids[:-1] predict ids[1:]: the label of token t stands at position t - 1, and the first token has none.
        width = max(len(example.ids) for example in rows) - 1
        inputs = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for row, example in enumerate(rows):
            ids = torch.tensor(example.ids)
            inputs[row, : len(ids) - 1] = ids[:-1]
            for begin, end in example.spans:
                labels[row, max(begin - 1, 0) : end - 1] = ids[max(begin, 1) : end]
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
