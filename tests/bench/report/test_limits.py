"""The limits of a run: the best rates that anything reached in it."""

from __future__ import annotations

import pytest
from bench_runs.cases import contender, limits_case

from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import COPY, DENSE, DENSE_F32, PRODUCT_F32, READ_DOT, READ_SUM
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import table
from qlora_kernels.bench.report.ratios import limits_of


def forward(*contenders: dict, flops: float = 2e9, dtype: str = "bfloat16", operation: str = "linear_forward") -> dict:
    point = Point(operation, dtype, 4096, 4096, 16, 0)
    case = {**point.as_dict(), "title": "forward", "flops": flops, "rounds": 1, "other_processes": 0.0}
    return {**case, "contenders": list(contenders)}


def run(*cases: dict, cache_bytes: int = 0) -> dict:
    return {"cases": list(cases), "settings": {"cache_bytes": cache_bytes}}


def reads(**gb_per_s: float) -> dict:
    """A case of limits: a copy at 10 GB/s, a product at 1 TFLOP/s, and these reads."""
    names = {"total": READ_SUM, "dot": READ_DOT}
    more = [contender(names[key], 1.0, bytes=rate * 1e6) for key, rate in gb_per_s.items()]
    case = limits_case(10.0, 1.0)
    return {**case, "contenders": [*case["contenders"], *more]}


def test_the_fastest_way_of_reading_counts():
    limits = limits_of(run(reads(total=20.0, dot=30.0)))
    assert limits.read_per_s == pytest.approx(30e9)
    assert limits.bytes_per_s == pytest.approx(30e9)
    assert limits_of(run(limits_case(10.0))).read_per_s is None


def test_a_product_is_held_to_reading_and_other_work_to_whatever_moved_most():
    result = run(reads(total=8.0))  # the copy moves 10 GB/s
    limits = limits_of(result)
    ours = contender(OURS, 2.0, bytes=8_000_000)
    assert limits.share(forward(ours, flops=1.0), ours) == pytest.approx(0.5)
    assert limits.share(forward(ours, flops=1.0, operation="dequantize"), ours) == pytest.approx(0.4)


def test_whatever_multiplied_fastest_is_the_limit():
    """Where bf16 is slow, float32 is it, in which the same could be computed; or this package."""
    slow = forward(contender(DENSE, 10.0), contender(DENSE_F32, 1.0))
    assert limits_of(run(limits_case(), slow)).flops["bfloat16"] == pytest.approx(2e12)
    assert limits_of(run(limits_case(), forward(contender(OURS, 0.5)))).flops["bfloat16"] == pytest.approx(4e12)
    limits = limits_of(run(limits_case(), forward(contender(OURS, 0.25), dtype="float32")))
    assert limits.flops["bfloat16"] == limits.flops["float32"] == pytest.approx(8e12)
    # What rounds to 16 bits is no limit of float32; nor does a copy multiply.
    assert "float32" not in limits_of(run(limits_case(), forward(contender(OURS, 0.5), contender(COPY, 1e-3)))).flops
    assert limits_of(run(limits_case(), forward(contender(COPY, 1e-3)))).flops["bfloat16"] == pytest.approx(1e12)


def test_what_fits_the_cache_says_nothing_of_memory():
    small = forward(contender(OURS, 1.0, bytes=90_000_000, copies=3))
    assert limits_of(run(reads(total=20.0), small)).read_per_s == pytest.approx(90e9)
    with_cache = run(reads(total=20.0), small, cache_bytes=300_000_000)
    assert limits_of(with_cache).read_per_s is None  # the read is of less than this cache, too
    assert limits_of(with_cache).bytes_per_s is None


def test_failures_and_a_run_without_limits():
    failed = forward({"name": OURS, "failed": "why"})
    assert limits_of(run(limits_case(), failed)).flops == {"bfloat16": pytest.approx(1e12)}
    assert limits_of(run(forward(contender(OURS, 1.0)))) == limits_of(run())


def test_slow_bfloat16_is_told():
    case = limits_case()
    slow = {**case, "contenders": [*case["contenders"], contender(PRODUCT_F32, 0.2)]}
    assert "bfloat16 product takes 5.0 times as long as its float32 one" in table.limit_lines(run(slow))[1]
    chosen = {**run(case), "machine": {"slow_bfloat16": "this processor is old"}}
    assert table.limit_lines(chosen)[1].startswith("Measuring in float32, which is faster here than bfloat16: this pr")
    fast = {**case, "contenders": [*case["contenders"], contender(PRODUCT_F32, 3.0)]}
    assert len(table.limit_lines(run(fast))) == 1
