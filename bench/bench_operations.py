"""Every case under pytest-benchmark: ``pytest bench/ --benchmark-only``."""

from __future__ import annotations

import pytest

from qlora_kernels.bench.common import CLOCK, run_under_pytest
from qlora_kernels.bench.operations import dequantize, linear_forward, linear_step, optimizer, quantize


@pytest.mark.benchmark(group="quantize and dequantize", timer=CLOCK)
def test_quantize(benchmark, lab, results):
    results.append(run_under_pytest(benchmark, quantize.case(lab), lab.settings))


@pytest.mark.benchmark(group="quantize and dequantize", timer=CLOCK)
def test_dequantize(benchmark, lab, results):
    results.append(run_under_pytest(benchmark, dequantize.case(lab), lab.settings))


@pytest.mark.benchmark(group="quantize and dequantize", timer=CLOCK)
def test_dequantize_out(benchmark, lab, results):
    results.append(run_under_pytest(benchmark, dequantize.case_out(lab), lab.settings))


@pytest.mark.parametrize("m", linear_forward.ROWS)
@pytest.mark.benchmark(group="forward", timer=CLOCK)
def test_linear_forward(benchmark, lab, results, m):
    results.append(run_under_pytest(benchmark, linear_forward.case(lab, m), lab.settings))


@pytest.mark.parametrize("m", linear_forward.ROWS)
@pytest.mark.benchmark(group="forward with an adapter", timer=CLOCK)
def test_linear_forward_adapter(benchmark, lab, results, m):
    results.append(run_under_pytest(benchmark, linear_forward.case_with_adapter(lab, m), lab.settings))


@pytest.mark.parametrize("m", linear_step.ROWS)
@pytest.mark.benchmark(group="forward + backward", timer=CLOCK)
def test_linear_step(benchmark, lab, results, m):
    results.append(run_under_pytest(benchmark, linear_step.case(lab, m), lab.settings))


@pytest.mark.parametrize("case", optimizer.CASES, ids=[case.__name__ for case in optimizer.CASES])
@pytest.mark.benchmark(group="optimizer", timer=CLOCK)
def test_optimizer(benchmark, lab, optimizer_results, case):
    optimizer_results.append(run_under_pytest(benchmark, case(lab), lab.settings))
