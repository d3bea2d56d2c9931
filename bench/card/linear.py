"""The layer's products on a card beside torch's dense product, bitsandbytes, and dequantizing first:

    python -m bench.card.linear --out FILE

Weights [N, K] and rows M of an 8-billion-parameter Llama's layers, bfloat16, cold L2 cache, times on the device by CUDA
graph. What bench/compiled/predict.py predicts stands beside what was measured.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import qlora_kernels
from bench.card.quantize import Bench, _clone
from bench.card.report import _number, times_ours
from bench.card.report import table as aligned
from bench.compiled import predict
from qlora_kernels import NF4Weight, linear
from qlora_kernels.bench.case import OURS, WrongResult, relative_error
from qlora_kernels.bench.contenders.names import BNB, DENSE, EQUAL_COPY
from qlora_kernels.bench.report.ratios import find_contender
from qlora_kernels.bench.timing.cuda_timing import Card, Timed
from qlora_kernels.ops import LoraTerm
from qlora_kernels.ops import linear as fused
from qlora_kernels.storage.formats import save_json

DEQUANTIZED = "dequantize, then dense"
NO_ADAPTER = "qlora_kernels, no adapter"
SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 16, 64, 512, 4096)
#: M, N, K of forward and backward with an adapter of RANK.
TRAINING = ((2048, 4096, 4096), (4096, 4096, 4096))
RANK, SCALING = 16, 2.0
#: Relative error of a result in bfloat16 against float64 over the same weights: its rounding is 0.0017.
ALLOWED = 0.01
#: A call's time on the host should be at most this.
HOST, HOST_US = "15 us on the host", 15.0
#: (operation, M, N, K), contender, so many times as long as this package; of EQUAL_COPY the share of its bandwidth; of
#: HOST, HOST_US over the host's time.
BARS: tuple[tuple[tuple[str, int, int, int], str, float], ...] = (
    (("forward", 1, 4096, 4096), EQUAL_COPY, 0.55),
    (("forward", 1, 4096, 4096), DENSE, 2.2),
    (("forward", 1, 4096, 4096), BNB, 1.8),
    (("forward", 1, 14336, 4096), EQUAL_COPY, 0.80),
    (("forward", 1, 14336, 4096), DENSE, 3.0),
    (("forward", 16, 4096, 4096), DENSE, 2.0),
    (("forward", 16, 4096, 4096), BNB, 4.0),
    (("forward", 64, 4096, 4096), DENSE, 1.6),
    (("forward", 64, 4096, 4096), BNB, 4.0),
    (("forward", 16, 14336, 4096), DENSE, 3.0),
    (("forward", 64, 14336, 4096), DENSE, 2.1),
    (("forward", 512, 4096, 4096), DENSE, 0.70),
    (("forward", 512, 4096, 4096), BNB, 1.1),
    (("forward", 512, 14336, 4096), DENSE, 0.70),
    (("forward", 512, 14336, 4096), BNB, 1.1),
    (("forward", 4096, 4096, 4096), DENSE, 0.70),
    (("forward", 4096, 14336, 4096), DENSE, 0.70),
    (("training step", 2048, 4096, 4096), DEQUANTIZED, 1.2),
    (("training step", 4096, 4096, 4096), DEQUANTIZED, 1.2),
    # The adapter's share: forward at most 2%, backward 10%. Without it backward is one product, dx, as forward is: of
    # a step that makes 6%.
    (("forward, adapter", 4096, 4096, 4096), NO_ADAPTER, 1 / 1.02),
    (("backward, adapter", 4096, 4096, 4096), NO_ADAPTER, 1 / 1.10),
    (("training step", 4096, 4096, 4096), NO_ADAPTER, 1 / 1.06),
    (("forward", 1, 4096, 4096), HOST, 1.0),
    (("forward, adapter", 4096, 4096, 4096), HOST, 1.0),
)


class _Dequantized(torch.autograd.Function):
    """x W^T with W decoded anew in either direction, as a layer without fused kernels does it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: NF4Weight) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.weight.dequantize(dy.dtype), None


class LinearBench(Bench):
    """Weights, rows and adapters on a device, and the contenders over them."""

    @functools.lru_cache(maxsize=1)  # noqa: B019  of one shape at a time: the bench lives as long as the process
    def weights(self, n: int, k: int) -> tuple[NF4Weight, ...]:
        first = qlora_kernels.quantize(self.source((n, k), torch.bfloat16))
        return first, *(_clone(first) for _ in range(self.copies(first.nbytes) - 1))

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def dense(self, n: int, k: int) -> tuple[Tensor, ...]:
        """What the weight stands for; as many copies as exceed the cache."""
        first = self.weights(n, k)[0].dequantize(torch.bfloat16)
        return first, *(first.clone() for _ in range(self.copies(first.nbytes) - 1))

    def rows(self, m: int, columns: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(m, columns, generator=generator, device=self.device).bfloat16()

    def adapter(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        return self.rows(RANK, k, 3) / k**0.5, self.rows(n, RANK, 4) / 10

    def moved(self, m: int, n: int, k: int) -> int:
        return self.weights(n, k)[0].nbytes + 2 * m * k + 2 * m * n

    def copy_of(self, m: int, n: int, k: int) -> Timed:
        return self.copy(self.moved(m, n, k))

    # ------------------------------------------------------------------------------------------------- forward

    def ready(self, name: str, m: int, n: int, k: int, calls: Sequence[Callable[[], Any]], exact: Callable) -> Timed:
        """A contender with a call for each copy of its weight, after a look at every result."""
        all_wanted = exact()
        for call in calls:
            found = call()
            for one, wanted in zip(found if isinstance(found, tuple) else (found,), all_wanted, strict=True):
                error = relative_error(one, wanted)
                if not error <= ALLOWED:
                    raise WrongResult(f"wrong result: error {error:.2e}, allowed {ALLOWED:.0e}")
        return Timed(name, lambda i: calls[i](), len(calls), self.moved(m, n, k))

    def exact_forward(self, m: int, n: int, k: int, adapter: bool) -> tuple[Tensor]:
        x, dense = self.rows(m, k, 2).double(), self.dense(n, k)[0].double()
        y = x @ dense.T
        if adapter:
            A, B = self.adapter(n, k)
            y += SCALING * (x @ A.double().T) @ B.double().T
        return (y,)

    def our_forward(self, name: str, m: int, n: int, k: int, adapter: bool) -> Timed:
        x = self.rows(m, k, 2)
        A, B = self.adapter(n, k) if adapter else (None, None)
        scaling = SCALING if adapter else 1.0

        def call(weight: NF4Weight) -> Tensor:
            with torch.no_grad():
                return linear(x, weight, None, A, B, scaling=scaling)

        calls = [functools.partial(call, weight) for weight in self.weights(n, k)]
        return self.ready(name, m, n, k, calls, lambda: self.exact_forward(m, n, k, adapter))

    def dense_forward(self, m: int, n: int, k: int) -> Timed:
        x = self.rows(m, k, 2)
        calls = [functools.partial(functional.linear, x, weight) for weight in self.dense(n, k)]
        return self.ready(DENSE, m, n, k, calls, lambda: self.exact_forward(m, n, k, False))

    def dequantized_forward(self, m: int, n: int, k: int) -> Timed:
        x = self.rows(m, k, 2)

        def call(weight: NF4Weight) -> Tensor:
            return functional.linear(x, weight.dequantize(torch.bfloat16))

        calls = [functools.partial(call, weight) for weight in self.weights(n, k)]
        return self.ready(DEQUANTIZED, m, n, k, calls, lambda: self.exact_forward(m, n, k, False))

    def bnb_forward(self, m: int, n: int, k: int) -> Timed:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        x, source = self.rows(m, k, 2), self.source((n, k), torch.bfloat16)
        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
        stored = [quantize_4bit(source, **options) for _ in range(len(self.weights(n, k)))]
        exact = (x.double() @ dequantize_4bit(*stored[0]).double().T,)

        def call(packed: Tensor, state: Any) -> Tensor:
            with torch.no_grad():
                return matmul_4bit(x, packed.t(), quant_state=state)

        calls = [functools.partial(call, *one) for one in stored]
        return self.ready(BNB, m, n, k, calls, lambda: exact)

    # ------------------------------------------------------------------------------------------------ training

    def step(self, name: str, m: int, n: int, k: int, layer: Callable[..., Tensor], adapter: bool = True) -> Timed:
        """Forward, and the gradients of x and of the adapter."""
        x = self.rows(m, k, 2).requires_grad_()
        dy = self.rows(m, n, 5)
        leaves = (x, *(one.requires_grad_() for one in self.adapter(n, k))) if adapter else (x,)

        def call(weight: NF4Weight) -> tuple[Tensor, ...]:
            y = layer(x, weight, *leaves[1:])
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        def exact() -> tuple[Tensor, ...]:
            dense, wide, d = self.dense(n, k)[0].double(), x.detach().double(), dy.double()
            if not adapter:
                return wide @ dense.T, d @ dense
            A, B = (one.detach().double() for one in leaves[1:])
            u, v = SCALING * wide @ A.T, SCALING * d @ B
            return wide @ dense.T + u @ B.T, d @ dense + v @ A, v.T @ wide, d.T @ u

        calls = [functools.partial(call, weight) for weight in self.weights(n, k)]
        return self.ready(name, m, n, k, calls, exact)

    def our_step(self, m: int, n: int, k: int) -> Timed:
        return self.step(OURS, m, n, k, lambda x, w, A, B: linear(x, w, None, A, B, scaling=SCALING))

    def backward(self, name: str, m: int, n: int, k: int, adapter: bool) -> Timed:
        """The gradients alone: of x, and of the adapter. Below autograd, which would go to the stream of forward."""
        x, dy = self.rows(m, k, 2), self.rows(m, n, 5)
        A, B = self.adapter(n, k) if adapter else (None, None)
        u = (SCALING * x.double() @ A.double().T).bfloat16() if adapter else None

        def call(weight: NF4Weight) -> tuple[Tensor, ...]:
            lora = LoraTerm(A, B, SCALING) if adapter else None
            found = fused.backward(dy, weight.operand(), x if adapter else None, u, lora, (True, adapter, adapter))
            return found if adapter else found[:1]

        def exact() -> tuple[Tensor, ...]:
            dense, d = self.dense(n, k)[0].double(), dy.double()
            if not adapter:
                return (d @ dense,)
            v = SCALING * d @ B.double()
            return d @ dense + v @ A.double(), v.T @ x.double(), d.T @ u.double()

        calls = [functools.partial(call, weight) for weight in self.weights(n, k)]
        return self.ready(name, m, n, k, calls, exact)

    def bare_step(self, m: int, n: int, k: int) -> Timed:
        return self.step(NO_ADAPTER, m, n, k, lambda x, w: linear(x, w), adapter=False)

    def dequantized_step(self, m: int, n: int, k: int) -> Timed:
        def layer(x: Tensor, weight: NF4Weight, A: Tensor, B: Tensor) -> Tensor:
            return _Dequantized.apply(x, weight) + SCALING * functional.linear(functional.linear(x, A), B)

        return self.step(DEQUANTIZED, m, n, k, layer)

    # --------------------------------------------------------------------------------------------------- cases

    def cases(
        self, shapes: Sequence[tuple[int, int]] = SHAPES, rows: Sequence[int] = ROWS, training=TRAINING
    ) -> Iterator[tuple[dict[str, Any], list]]:
        """What is measured, and (name, what makes the contender) for each who takes part."""
        for n, k in shapes:
            for m in rows:
                sizes = (m, n, k)
                yield (
                    _about("forward", *sizes),
                    [
                        (OURS, functools.partial(self.our_forward, OURS, *sizes, False)),
                        (EQUAL_COPY, functools.partial(self.copy_of, *sizes)),
                        (DENSE, functools.partial(self.dense_forward, *sizes)),
                        (DEQUANTIZED, functools.partial(self.dequantized_forward, *sizes)),
                        (BNB, functools.partial(self.bnb_forward, *sizes)),
                    ],
                )
        for sizes in training:
            yield (
                _about("forward, adapter", *sizes),
                [
                    (OURS, functools.partial(self.our_forward, OURS, *sizes, True)),
                    (NO_ADAPTER, functools.partial(self.our_forward, NO_ADAPTER, *sizes, False)),
                ],
            )
            yield (
                _about("backward, adapter", *sizes),
                [
                    (OURS, functools.partial(self.backward, OURS, *sizes, True)),
                    (NO_ADAPTER, functools.partial(self.backward, NO_ADAPTER, *sizes, False)),
                ],
            )
            yield (
                _about("training step", *sizes),
                [
                    (OURS, functools.partial(self.our_step, *sizes)),
                    (NO_ADAPTER, functools.partial(self.bare_step, *sizes)),
                    (DEQUANTIZED, functools.partial(self.dequantized_step, *sizes)),
                ],
            )


def _about(operation: str, m: int, n: int, k: int) -> dict[str, Any]:
    return {"operation": operation, "m": m, "n": n, "k": k, "dtype": "bfloat16"}


def run(bench: LinearBench, seconds: float, save: Callable[[dict], None], cases: Sequence | None = None) -> dict:
    """Measures everything.

    Args:
        bench: the device.
        seconds: for all of it, about.
        save: called with the result after every case.
        cases: of :meth:`LinearBench.cases`.

    Returns:
        ``cases``, ``l2_bytes``, ``complete``.
    """
    end = time.perf_counter() + seconds
    result: dict[str, Any] = {"complete": False, "l2_bytes": bench.card.l2_bytes, "cases": []}
    todo = list(bench.cases() if cases is None else cases)
    for i, (about, makers) in enumerate(todo):
        print("{operation} {m} x {n} x {k}".format(**about), flush=True)
        # Half of a case's share is for its preparation.
        share = max(end - time.perf_counter(), 0.0) / (len(todo) - i) / 2
        result["cases"].append(bench.run_case(about, makers, share))
        save(result)
    result["complete"] = True
    save(result)
    return result


def judged(result: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(what, bar, reached) for each bar, the worst first; None where nothing was measured, which stands before all."""
    cases = {tuple(case[key] for key in ("operation", "m", "n", "k")): case for case in result["cases"]}
    found = []
    for key, contender, bar in BARS:
        case = cases.get(key)
        reached = None if case is None else _under_host(case) if contender == HOST else times_ours(case, contender)
        operation, m, n, k = key
        found.append((f"{operation} M = {m}, {n} x {k}: {contender}", bar, reached))
    return sorted(found, key=lambda one: 0.0 if one[2] is None else one[2] / one[1])


def _under_host(case: dict[str, Any]) -> float | None:
    """HOST_US over the time until this package's call returns."""
    ours = find_contender(case, OURS)
    return None if ours is None or "failed" in ours else HOST_US / ours["host_us"]["median"]


def _predicted(case: dict[str, Any], card: predict.Card | None) -> float | None:
    if card is None or case["operation"] != "forward" or case["k"] % 64:
        return None
    return predict.predict(card, case["m"], case["n"], case["k"])["us"]


def markdown(result: dict[str, Any], card: predict.Card | None = None) -> str:
    """Bars and times, as Markdown that also reads well on a terminal.

    Args:
        result: of :func:`run`.
        card: whose predictions stand beside the times; None for none.
    """
    rows = [
        [what, "not measured" if got is None else "met" if got >= bar else "missed", _number(got, ".2f"), f"{bar:.2f}"]
        for what, bar, got in judged(result)
    ]
    lines = ["## Bars", "", *aligned(("contender's time over ours", "", "reached", "bar"), rows, left=2)]
    others = (EQUAL_COPY, DENSE, DEQUANTIZED, BNB, NO_ADAPTER)
    rows = []
    for case in result["cases"]:
        title = [case["operation"], str(case["m"]), f"{case['n']} x {case['k']}"]
        ours = find_contender(case, OURS)
        if ours is None or "failed" in ours:
            rows.append([*title, case.get("failed", "failed"), *[""] * (2 + len(others))])
            continue
        rows.append(
            [
                *title,
                f"{ours['us']:.1f}",
                _number(_predicted(case, card), ".1f"),
                f"{ours['host_us']['median']:.1f}",
                *(_number(times_ours(case, name), ".2f") for name in others),
            ]
        )
    head = ("", "M", "N x K", "us", "predicted us", "host us", *(f"{name} / ours" for name in others))
    lines += ["", "## Times", "", *aligned(head, rows, left=1)]
    failures = sorted(
        {f"- {c['name']}: {c['failed']}" for case in result["cases"] for c in case["contenders"] if "failed" in c}
    )
    return "\n".join([*lines, "", *failures, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", required=True, help="where the result goes, as JSON")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all of it, about (default %(default)s)")
    parser.add_argument("--card", choices=predict.CARDS, help="whose predictions to print beside the times")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to measure", file=sys.stderr)
        return 2
    result = run(LinearBench(Card()), arguments.seconds, lambda result: save_json(result, arguments.out))
    print(markdown(result, predict.CARDS.get(arguments.card)))
    return 1 if any("failed" in case for case in result["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
