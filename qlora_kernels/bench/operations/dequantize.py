"""dequantize: NF4 with double quantization to bf16, into a new tensor and into one that is there already."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common import OURS, Case, Contender, Ready, relative_error
from ..contenders import BNB, COPY, Lab

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


def case_out(lab: Lab) -> Case:
    """The same into a given tensor, one for each copy of the weight: memory that has been touched before."""
    written = 2 * lab.settings.n * lab.settings.k

    def given() -> list[torch.Tensor]:
        return [torch.zeros(lab.settings.n, lab.settings.k, dtype=torch.bfloat16) for _ in range(lab.settings.copies)]

    def ours() -> Ready:
        weights, out = lab.ours, given()
        return Ready(
            lambda i: weights[i].dequantize(torch.bfloat16, out=out[i]),
            lambda result: relative_error(result, lab.exact("ours")),
            LIMIT,
            written + lab.bytes_of("ours"),
        )

    def bnb() -> Ready:
        from bitsandbytes.functional import dequantize_4bit

        weights, out = lab.bnb, given()

        def call(i: int) -> torch.Tensor:
            try:
                dequantize_4bit(weights[i][0], weights[i][1], out=out[i])
            except NotImplementedError:  # torch's reason fills a paragraph
                raise NotImplementedError("no out= on the CPU") from None
            return out[i]

        return Ready(
            call,
            lambda result: relative_error(result, lab.exact("bnb")),
            LIMIT,
            written + lab.bytes_of("bnb"),
        )

    def copy() -> Ready:
        weights, out = lab.dense, given()
        return Ready(
            lambda i: out[i].copy_(weights[i]),
            lambda result: relative_error(result, lab.exact("ours")),
            LIMIT,
            2 * written,
        )

    contenders = [Contender(OURS, ours), Contender(BNB, bnb), Contender(COPY, copy)]
    return Case("dequantize_out", "dequantize to bf16 into a given tensor", None, None, contenders)


def cases(lab: Lab) -> Iterator[Case]:
    yield case(lab)
    yield case_out(lab)
