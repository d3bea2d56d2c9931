"""The CUDA kernels beside bitsandbytes and a copy of as many bytes: python -m bench.card.quantize --out FILE

Prediction, not a measurement: what a call must move, over the 4.3 TB/s that a copy reaches on an H200.

| dequantize   | to bf16 or fp16        | to fp32                |
|--------------|------------------------|------------------------|
| 4096 x 4096  | 42.2 MB, 9.8 us        | 75.8 MB, 17.6 us       |
| 8192 x 8192  | 168.8 MB, 39.3 us      | 303.1 MB, 70.5 us      |

At the bar of 90% of a copy's bandwidth, 8192 x 8192 to bf16 takes 43.6 us.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import qlora_kernels
from bench.card.kernels import bits, cpu_kernels
from qlora_kernels import NF4Weight, default_nested_table, ops
from qlora_kernels.bench.case import OURS, WrongResult, reason, relative_error
from qlora_kernels.bench.contenders.names import BNB, CHECKED, EQUAL_COPY
from qlora_kernels.bench.timing.cuda_timing import Card, Timed, copies_for, measure
from qlora_kernels.storage.formats import save_json

SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096))
DEQUANTIZE_TO = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZE_FROM = (torch.bfloat16, torch.float32)
#: What the copy that gives the bandwidth reads; a tenth of a percent of it is launching.
ROOF_BYTES = 2**30
# bitsandbytes' result against this package's, of the same stored data. It should be none; a bf16 rounds by 0.002.
SAME_DATA = 0.01
# NF4 in blocks of 64 moves a normally distributed weight by 0.092, relative to its norm.
QUANTIZED = 0.1


class Bench:
    """Weights on a device, and the contenders over them.

    Args:
        card: the timing device.
        device: where tensors lie.
    """

    def __init__(self, card: Card, device: str = "cuda") -> None:
        self.card, self.device = card, device

    def source(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Random weights, normally distributed; the same ones every time."""
        generator = torch.Generator(self.device).manual_seed(shape[0] + shape[1])
        return torch.randn(shape, generator=generator, device=self.device).mul_(0.02).to(dtype)

    def copies(self, bytes_each: int) -> int:
        return copies_for(bytes_each, self.card.l2_bytes)

    # ---------------------------------------------------------------------------------------------- contenders

    def copy(self, total: int) -> Timed:
        """A copy on the device that reads and writes ``total`` bytes, together."""
        generator = torch.Generator(self.device).manual_seed(0)
        source = torch.randint(0, 256, (total // 2,), dtype=torch.uint8, device=self.device, generator=generator)
        sources = [source.clone() for _ in range(self.copies(total))]
        return Timed(EQUAL_COPY, lambda i: sources[i].clone(), len(sources), 2 * source.nbytes)

    def our_dequantize(self, shape: tuple[int, int], dtype: torch.dtype) -> Timed:
        first = qlora_kernels.quantize(self.source(shape, torch.bfloat16))
        moved = first.nbytes + first.numel() * dtype.itemsize
        weights = [_clone(first) for _ in range(self.copies(moved))]
        with cpu_kernels():
            expected = bits(first.to("cpu").dequantize(dtype))
        for weight in weights:
            _same_bits(weight.dequantize(dtype), expected, "dequantize")
        return Timed(OURS, lambda i: weights[i].dequantize(dtype), len(weights), moved)

    def bnb_dequantize(self, shape: tuple[int, int], dtype: torch.dtype) -> Timed:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        source = self.source(shape, torch.bfloat16).to(dtype)
        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
        packed, state = quantize_4bit(source, **options)
        second = state.state2
        moved = packed.nbytes + state.absmax.nbytes + second.absmax.nbytes + source.nbytes
        weights = [(packed, state), *(quantize_4bit(source, **options) for _ in range(self.copies(moved) - 1))]
        pieces = (packed.flatten(), state.absmax, second.absmax, state.offset.reshape(1).float(), second.code.float())
        expected = NF4Weight(*pieces, source.shape).dequantize(dtype)
        for weight in weights:
            _near(dequantize_4bit(*weight), expected, SAME_DATA)
        return Timed(BNB, lambda i: dequantize_4bit(*weights[i]), len(weights), moved)

    def our_quantize(self, shape: tuple[int, int], dtype: torch.dtype) -> Timed:
        source = self.source(shape, dtype)
        with cpu_kernels():
            weight = qlora_kernels.quantize(source.cpu())
        moved = source.nbytes + weight.nbytes
        sources = [source.clone() for _ in range(self.copies(moved))]
        table = default_nested_table(source.device)
        for one in sources:
            for found, expected in zip(ops.quantize_nested(one, table), weight.pieces):
                _same_bits(found, bits(expected), "quantize")
        return Timed(OURS, lambda i: ops.quantize_nested(sources[i], table), len(sources), moved)

    def checked_quantize(self, shape: tuple[int, int], dtype: torch.dtype) -> Timed:
        source = self.source(shape, dtype)
        moved = source.nbytes + qlora_kernels.quantize(source).nbytes
        sources = [source.clone() for _ in range(self.copies(moved))]
        return Timed(CHECKED, lambda i: qlora_kernels.quantize(sources[i]), len(sources), moved, waits=True)

    def bnb_quantize(self, shape: tuple[int, int], dtype: torch.dtype) -> Timed:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        source = self.source(shape, dtype)
        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
        packed, state = quantize_4bit(source, **options)
        moved = source.nbytes + packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        sources = [source.clone() for _ in range(self.copies(moved))]
        _near(dequantize_4bit(packed, state), source, QUANTIZED)
        return Timed(BNB, lambda i: quantize_4bit(sources[i], **options), len(sources), moved)

    # --------------------------------------------------------------------------------------------------- cases

    def cases(self, shapes: Sequence[tuple[int, int]] = SHAPES) -> Iterator[tuple[dict[str, Any], list]]:
        """What is measured, and (name, what makes the contender) for each who takes part; the bars' cases first."""
        for dtype in DEQUANTIZE_TO:
            for shape in shapes:
                yield (
                    _about("dequantize", shape, dtype),
                    [
                        (OURS, functools.partial(self.our_dequantize, shape, dtype)),
                        (EQUAL_COPY, None),
                        (BNB, functools.partial(self.bnb_dequantize, shape, dtype)),
                    ],
                )
        for dtype in QUANTIZE_FROM:
            for shape in shapes:
                yield (
                    _about("quantize", shape, dtype),
                    [
                        (OURS, functools.partial(self.our_quantize, shape, dtype)),
                        (EQUAL_COPY, None),
                        (CHECKED, functools.partial(self.checked_quantize, shape, dtype)),
                        (BNB, functools.partial(self.bnb_quantize, shape, dtype)),
                    ],
                )

    def run_case(self, about: dict[str, Any], makers: list, seconds: float) -> dict[str, Any]:
        """Prepares, verifies and times a case. Who fails is named with the reason; without this package, no case."""
        ready: list[Timed] = []
        failed: dict[str, str] = {}
        for name, make in makers:
            try:
                # The copy moves as many bytes as the first contender, which is this package.
                ready.append(make() if make is not None else self.copy(ready[0].bytes))
            except Exception as problem:
                if name == OURS:
                    return {**about, "failed": reason(problem), "contenders": []}
                failed[name] = reason(problem)
        measured = {one["name"]: one for one in measure(self.card, ready, seconds)}
        rows = [measured.get(name) or {"name": name, "failed": failed[name]} for name, _ in makers]
        ours = next(row for row in rows if row["name"] == OURS)
        if "failed" in ours:
            return {**about, "failed": ours["failed"], "contenders": []}
        return {**about, "contenders": rows}


def _about(operation: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    return {"operation": operation, "n": shape[0], "k": shape[1], "dtype": str(dtype).removeprefix("torch.")}


def _clone(weight: NF4Weight) -> NF4Weight:
    packed, absmax, nested_absmax, offset, table = (piece.clone() for piece in weight.pieces)
    return replace(
        weight, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=offset, nested_table=table
    )


def _same_bits(found: Tensor, expected: Tensor, operation: str) -> None:
    if not torch.equal(bits(found), expected):
        raise WrongResult(f"wrong result: {operation} differs from the CPU's")


def _near(found: Tensor, expected: Tensor, limit: float) -> None:
    error = relative_error(found, expected.double())
    if not error <= limit:
        raise WrongResult(f"wrong result: error {error:.2e}, allowed {limit:.0e}")


def run(bench: Bench, seconds: float, save: Callable[[dict], None], shapes=SHAPES, roof_bytes=ROOF_BYTES) -> dict:
    """Measures everything.

    Args:
        bench: the device.
        seconds: for all of it, about; what is slow to prepare leaves less for the others.
        save: called with the result after every case.
        shapes, roof_bytes: sizes.

    Returns:
        ``roof`` (the copy of ROOF_BYTES), ``cases``, ``l2_bytes``, ``complete``.
    """
    end = time.perf_counter() + seconds
    result: dict[str, Any] = {"complete": False, "l2_bytes": bench.card.l2_bytes, "roof": None, "cases": []}
    copy = replace(bench.copy(2 * roof_bytes), name="copy")
    result["roof"] = measure(bench.card, [copy], min(3.0, seconds / 10))[0]
    if "failed" in result["roof"]:
        raise RuntimeError(f"the copy that others are held against: {result['roof']['failed']}")
    del copy
    save(result)
    todo = list(bench.cases(shapes))
    for i, (about, makers) in enumerate(todo):
        print(f"{about['operation']} {about['n']} x {about['k']}, {about['dtype']}", flush=True)
        # Half of a case's share is for its preparation.
        share = max(end - time.perf_counter(), 0.0) / (len(todo) - i) / 2
        result["cases"].append(bench.run_case(about, makers, share))
        save(result)
    result["complete"] = True
    save(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", required=True, help="where the result goes, as JSON")
    parser.add_argument("--seconds", type=float, default=75.0, help="for all of it, about (default %(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to measure", file=sys.stderr)
        return 2
    result = run(Bench(Card()), arguments.seconds, lambda result: save_json(result, arguments.out))
    failures = [case for case in result["cases"] if "failed" in case]
    for case in failures:
        print(f"{case['operation']} {case['n']} x {case['k']}, {case['dtype']}: {case['failed']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
