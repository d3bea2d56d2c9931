"""dequantize: NF4 with double quantization to a new bf16 tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .common import CLOCK, OURS, Case, Contender, Ready, relative_error, run_under_pytest
from .contenders import BNB, COPY, Lab

# bf16 rounds by 0.0017 on average.
LIMIT = 0.003


def case(lab: Lab) -> Case:
    """Every contender makes a new tensor, as users' calls do; the plain copy shows what that alone costs."""
    written = 2 * lab.settings.n * lab.settings.k

    def ours() -> Ready:
        weights = lab.ours
        return Ready(
            lambda i: weights[i].dequantize(torch.bfloat16),
            lambda out: relative_error(out, lab.exact("ours")),
            LIMIT,
            written + lab.bytes_of("ours"),
        )

    def bnb() -> Ready:
        from bitsandbytes.functional import dequantize_4bit

        weights = lab.bnb
        return Ready(
            lambda i: dequantize_4bit(weights[i][0], weights[i][1]),
            lambda out: relative_error(out, lab.exact("bnb")),
            LIMIT,
            written + lab.bytes_of("bnb"),
        )

    def copy() -> Ready:
        weights = lab.dense
        return Ready(
            lambda i: weights[i].clone(),
            lambda out: relative_error(out, lab.exact("ours")),
            LIMIT,
            2 * written,
        )

    contenders = [Contender(OURS, ours), Contender(BNB, bnb), Contender(COPY, copy)]
    return Case("dequantize", "dequantize to bf16", None, None, contenders)


def cases(lab: Lab) -> Iterator[Case]:
    yield case(lab)


@pytest.mark.benchmark(group="quantize and dequantize", timer=CLOCK)
def test_dequantize(benchmark, lab, results):
    results.append(run_under_pytest(benchmark, case(lab), lab.settings))
