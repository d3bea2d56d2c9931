"""Where to measure: operations, the shapes of well-known models' layers, and what a run goes through of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, from its published configuration."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of a block's seven linear layers."""
        kv = self.hidden // self.heads * self.kv_heads
        h, i = self.hidden, self.intermediate
        return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (i, h), "up": (i, h), "down": (h, i)}


MODELS = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 80),
    #: For tests of the benchmarks themselves.
    "tiny": Shape(256, 704, 4, 4, 2),
}
#: The weight that most bars are for.
N, K, RANK = 4096, 4096, 16
#: N of an 8-billion-parameter Llama's MLP; the CPU's bars hold at both.
WIDE = 14336
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Point:
    """One case by its coordinates; those that an operation has no use for are None.

    Attributes:
        operation: a key of :data:`qlora_kernels.bench.operations.OPERATIONS`.
        dtype: of activations and results.
        n, k: out_features and in_features.
        m: rows of x, or tokens.
        rank: of the adapter; 0 for none.
        model: a key of MODELS, or of the sizes of GPT-2.
        batch: sequences, where m is the tokens of one.
    """

    operation: str
    dtype: str = "bfloat16"
    n: int | None = None
    k: int | None = None
    m: int | None = None
    rank: int | None = None
    model: str | None = None
    batch: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        sizes = [] if self.model is None else [self.model]
        sizes += [] if self.n is None else [f"{self.n} x {self.k}"]
        sizes += [] if self.batch is None else [f"batch = {self.batch}"]
        sizes += [] if self.m is None else [f"M = {self.m}"]
        sizes += [] if self.rank is None else [f"r = {self.rank}"]
        sizes += [] if self.dtype == "bfloat16" else [self.dtype]
        return ", ".join([self.operation, *sizes])


class Coordinates:
    """A point's coordinates for an operation that needs them.

    Raises:
        ValueError: from any of them, where the point has none.
    """

    def __init__(self, point: Point) -> None:
        self._point = point

    def _given(self, value: _T | None, name: str) -> _T:
        if value is None:
            raise ValueError(f"{self._point.operation} needs {name}")
        return value

    @property
    def n(self) -> int:
        return self._given(self._point.n, "n")

    @property
    def k(self) -> int:
        return self._given(self._point.k, "k")

    @property
    def m(self) -> int:
        return self._given(self._point.m, "m")

    @property
    def rank(self) -> int:
        return self._given(self._point.rank, "rank")

    @property
    def model(self) -> str:
        return self._given(self._point.model, "model")

    @property
    def batch(self) -> int:
        return self._given(self._point.batch, "batch")


POINT_KEYS = tuple(Point.__dataclass_fields__)


def point_of(case: dict[str, Any]) -> Point:
    """The point that a measured case is of."""
    coordinates: dict[str, Any] = {key: case.get(key) for key in POINT_KEYS}
    return Point(**coordinates)


def shapes_of(*models: str) -> list[tuple[int, int]]:
    """The different [N, K] of models' layers, in order."""
    return list(dict.fromkeys(shape for model in models for shape in MODELS[model].linears.values()))


def _limits(*dtypes: str) -> Iterator[Point]:
    for dtype in dtypes:
        yield Point("limits", dtype)


def _linear(rows: Sequence[int], ranks: Sequence[int], shapes=((N, K),), dtype: str = "bfloat16") -> Iterator[Point]:
    for n, k in shapes:
        for rank in ranks:
            for m in rows:
                yield Point("linear_forward", dtype, n, k, m, rank)


def _points(operation: str, rows: Sequence[int] = (), ranks: Sequence[int] = (), shapes=((N, K),), dtype="bfloat16"):
    for n, k in shapes:
        for rank in ranks or (None,):
            for m in rows or (None,):
                yield Point(operation, dtype, n, k, m, rank)


def mixtures(dtype: str = "bfloat16") -> Iterator[Point]:
    """A mixture's experts, by tokens."""
    for m in (1, 16, 512):
        yield Point("experts", dtype, m=m)


OPTIMIZER = ("adamw_step", "adamw_clipped_step", "adamw_8bit_step", "lion_step")


def _optimizer(names: Sequence[str] = OPTIMIZER, model: str = "llama-2-7b") -> Iterator[Point]:
    for name in names:
        yield Point(name, "float32", rank=RANK, model=model)


def gpt2(ranks: Sequence[int] | None = None, dtypes: Sequence[str] = ("bfloat16",)) -> list[Point]:
    """The batches and lengths of the LoRA paper's latency table (arXiv 2106.09685, table 1), by default at its rank."""
    return [
        Point("gpt2_forward", dtype, m=length, rank=rank, model="gpt2-medium", batch=batch)
        for dtype in dtypes
        for rank in ranks or (4,)
        for batch, length in ((32, 512), (16, 256), (1, 128))
    ]


def rank_study(ranks: Sequence[int] | None = None) -> list[Point]:
    """By default the ranks of the LoRA paper's table 6."""
    return [Point("rank_study", rank=rank) for rank in ranks or (1, 2, 4, 8, 64)]


def cpu_bars(dtype: str = "bfloat16") -> list[Point]:
    """Every point for which there is a bar on a CPU, in another dtype if one is given; the bars are for bf16."""
    shapes = ((N, K), (WIDE, K))
    return [
        *_limits(dtype),
        *_points("quantize", dtype="float32"),
        *_points("dequantize", shapes=shapes, dtype=dtype),
        *_linear((1, 4, 16, 64, 512, 2048), (0,), shapes, dtype),
        *_points("linear_busy", (1,), shapes=shapes, dtype=dtype),
        *_points("linear_step", (16, 512), (RANK,), shapes, dtype),
        *mixtures(dtype),
        *_optimizer(OPTIMIZER[:3]),
    ]


def quick(dtype: str = "bfloat16") -> list[Point]:
    """One look at each operation; decoding is forward at M = 1."""
    return [
        *_limits(dtype),
        *_points("quantize", dtype="float32"),
        *_points("dequantize", dtype=dtype),
        *_linear((1, 512), (0,), dtype=dtype),
        *_points("linear_dx", (512,), dtype=dtype),
        *_points("linear_step", (16, 512), (RANK,), dtype=dtype),
        Point("block_step", dtype, m=128, rank=RANK, model="llama-2-7b"),
        *_optimizer(("adamw_step",)),
        Point("finetune", rank=RANK),
    ]


def usual(dtype: str = "bfloat16") -> list[Point]:
    """In bf16, what the tables and plots in README and docs/ need."""
    return [
        *_limits(dtype),
        *_points("quantize", dtype="float32"),
        *_points("quantize"),
        *_points("dequantize", dtype=dtype),
        *_points("dequantize_out", dtype=dtype),
        *_linear((1, 4, 16, 64, 512, 2048), (0, RANK), dtype=dtype),
        *_linear((1, 16, 512), (0,), ((11008, 4096), (4096, 11008), (1024, 4096)), dtype),
        *_points("linear_dx", (16, 512), dtype=dtype),
        *_points("linear_step", (16, 512), (RANK,), dtype=dtype),
        *_points("linear_step", (512,), (0, 1, 4, 64, 256), dtype=dtype),
        *mixtures(dtype),
        Point("decode", dtype, m=1, rank=RANK, model="llama-2-7b"),
        Point("block_step", dtype, m=512, rank=RANK, model="llama-2-7b"),
        Point("block_step", dtype, m=64, rank=RANK, model="llama-3-70b"),
        *_optimizer(),
        Point("finetune", rank=RANK),
        *(point for point in cpu_bars(dtype) if point.n == WIDE or point.operation == "linear_busy"),
    ]


def full(dtype: str = "bfloat16") -> list[Point]:
    """Every axis: rows from 1 to 16384, the layers of three models, ranks from 0 to 256, three dtypes."""
    rows = tuple(4**i for i in range(8))  # 1 to 16384
    shapes = shapes_of("llama-2-7b", "llama-3-8b", "llama-3-70b")
    others = [shape for shape in shapes if shape != (N, K)]
    ranks = (0, 1, 4, 16, 64, 256)
    points = [
        *_limits(*DTYPES),
        *usual(dtype)[1:],
        *_linear(rows, (0, RANK), dtype=dtype),
        *_linear((1, 16, 64, 512, 4096), (0,), others, dtype),
        *_points("linear_dx", (1, 16, 512, 4096), dtype=dtype),
        *_points("linear_step", (512, 4096), ranks, dtype=dtype),
        *_points("linear_backward", (512, 4096), (RANK,), dtype=dtype),
        *_points("linear_step", (512,), (RANK,), others, dtype),
        *(p for one in DTYPES for p in _linear((1, 16, 512), (0, RANK), dtype=one)),
        *(p for one in DTYPES for p in _points("dequantize", dtype=one)),
        *_points("quantize", shapes=others),
        *_points("dequantize", shapes=others, dtype=dtype),
        *(Point("decode", dtype, m=1, rank=RANK, model=model) for model in ("llama-3-8b", "llama-3-70b")),
        Point("block_step", dtype, m=512, rank=RANK, model="llama-3-8b"),
        *gpt2(dtypes=(dtype,)),
    ]
    return list(dict.fromkeys(points))


#: Operations that only a CPU has.
CPU_OPERATIONS = ("linear_busy", "experts")
#: And those that only a card has.
CARD_OPERATIONS = ("adamw_paged_step", "adamw_budget_step")


def card(dtype: str = "bfloat16") -> list[Point]:
    """What the check on a card times: every bar's point, and what stands beside it. The bars come first."""
    weights = ((8192, 8192), (4096, 4096), (14336, 4096))
    products = ((4096, 4096), (14336, 4096))
    training = (4096, 2048)
    return [
        *_limits(dtype),
        *(p for one in DTYPES for p in _points("dequantize", shapes=weights, dtype=one)),
        *_linear((1, 16, 64, 512, 4096), (0,), products, dtype),
        *_points("linear_forward", training, (RANK,), dtype=dtype),
        *_points("linear_backward", training, (RANK,), dtype=dtype),
        *_points("linear_step", training, (RANK,), dtype=dtype),
        *_optimizer(("adamw_step", *CARD_OPERATIONS, "adamw_8bit_step", "lion_step")),
        *(p for one in ("bfloat16", "float32") for p in _points("quantize", shapes=weights, dtype=one)),
    ]


def rivals(dtype: str = "bfloat16") -> list[Point]:
    """A kernel developer's look at forward, for a few of its contenders."""
    return [*_linear((1, 4, 16, 64, 512), (0,), dtype=dtype)]


#: Each takes the dtype of activations and results; without one it is bf16, which the bars are for.
SWEEPS: dict[str, Callable[..., list[Point]]] = {
    "quick": quick,
    "usual": usual,
    "full": full,
    "card": card,
    "bars": cpu_bars,
    "rivals": rivals,
}
#: Minutes that a sweep may take, by device; None for as long as it takes.
MINUTES = {"quick": 1.9, "usual": None, "full": None, "card": 2.25, "bars": None, "rivals": 0.95}
FULL_MINUTES_CUDA = 7.5
