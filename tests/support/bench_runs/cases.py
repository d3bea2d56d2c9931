"""Small cases of the benchmarks, and results as if measured, for the tests that share them."""

from __future__ import annotations

import argparse

import torch

from qlora_kernels.bench import options
from qlora_kernels.bench.case import OURS, Case, Contender, Ready, Settings
from qlora_kernels.bench.contenders.names import BNB, COPY, PRODUCT
from qlora_kernels.bench.operations import begin
from qlora_kernels.bench.points import OPTIMIZER, Point
from qlora_kernels.bench.timing.measure import Measurement

TINY = Settings(threads=1, cache_bytes=1 << 18, seconds=0.0, min_rounds=2)
WEIGHT = {"n": 128, "k": 192}
POINTS = (
    Point("quantize", **WEIGHT),
    Point("quantize", "float32", **WEIGHT),
    Point("dequantize", **WEIGHT),
    Point("dequantize", "float16", **WEIGHT),
    Point("dequantize_out", **WEIGHT),
    Point("linear_forward", m=1, rank=0, **WEIGHT),
    Point("linear_forward", m=16, rank=0, **WEIGHT),
    Point("linear_forward", "float32", m=3, rank=0, **WEIGHT),
    Point("linear_forward", m=3, rank=4, **WEIGHT),
    Point("linear_busy", m=1, **WEIGHT),
    Point("linear_dx", m=20, **WEIGHT),
    Point("linear_step", m=20, rank=0, **WEIGHT),
    Point("linear_step", m=20, rank=1, **WEIGHT),
    Point("linear_step", m=20, rank=4, **WEIGHT),
    Point("experts", m=3, **WEIGHT),
    Point("decode", m=1, rank=4, model="tiny"),
    Point("block_step", m=16, rank=4, model="tiny"),
    *(Point(name, "float32", rank=4, model="tiny") for name in OPTIMIZER),
    Point("linear_backward", m=20, rank=4, **WEIGHT),
    Point("gpt2_forward", m=6, rank=4, model="tiny", batch=3),
)


def small_point(operation: str, **wanted) -> Point:
    """The first of these points with an operation, and with attributes that are asked for."""
    return next(
        point
        for point in POINTS
        if point.operation == operation and all(getattr(point, name) == value for name, value in wanted.items())
    )


POINT = small_point("linear_forward", m=1)


def measured(point: Point, settings: Settings = TINY) -> dict:
    """A case, in this process."""
    measurement = begin(settings, point)
    for _ in range(measurement.rounds):
        measurement.round()
    return measurement.result()


def limits_case(gb_per_s: float = 10.0, tflop_per_s: float = 1.0) -> dict:
    """A measured case of limits, as if on a machine of the given speeds."""
    rows = ((COPY, gb_per_s * 1e6, 1.0), (PRODUCT, 1, 1.0))
    return {
        **Point("limits").as_dict(),
        "title": "limits",
        "flops": tflop_per_s * 1e9,
        "rounds": 1,
        "other_processes": 0.0,
        "contenders": [contender(name, median, bytes=nbytes) for name, nbytes, median in rows],
    }


def contender(name: str, median: float, spread: float = 0.01, **more) -> dict:
    """A measured contender, with quantiles around its median."""
    return {
        "name": name,
        "samples": 9,
        "median_ms": median,
        "q20_ms": median * (1 - spread),
        "q80_ms": median * (1 + spread),
        "error": 0.0,
        "bytes": 8,
        "copies": 1,
        "peak_allocated": 0,
        **more,
    }


def fake(prepare_other, name: str = BNB) -> Case:
    """A case in which this package doubles a number, against one other contender."""
    ours = Ready(lambda i: torch.tensor(2.0), lambda y: abs(y.item() - 2), 0.1, bytes=8, copies=4)
    return Case("forward", 2, [Contender(OURS, lambda: ours), Contender(name, prepare_other)])


def measured_case(case: Case, **more) -> dict:
    measurement = Measurement(case, TINY, POINT, **more)
    for _ in range(measurement.rounds):
        measurement.round()
    return measurement.result()


def parsed(*arguments: str) -> argparse.Namespace:
    """The flags of ``qlora-kernels bench``."""
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(arguments)
