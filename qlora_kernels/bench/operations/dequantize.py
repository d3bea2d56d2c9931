"""dequantize: NF4 with double quantization, into a new tensor and into one that is there already."""

from __future__ import annotations

import torch

from ..case import OURS, Case, Contender, Ready, relative_error
from ..contenders.names import BNB, COPY
from ..contenders.weights import Lab, bitsandbytes

# bf16 rounds by 0.0017 on average.
LIMIT = 0.003


def case(lab: Lab) -> Case:
    """Every contender makes a new tensor, as users' calls do; the plain copy shows what that alone costs."""
    written = lab.bytes_of("dense")

    def ours() -> Ready:
        weights = lab.ours
        return Ready(
            lambda i: weights[i].dequantize(lab.dtype),
            lambda out: relative_error(out, lab.exact("ours")),
            LIMIT,
            written + lab.bytes_of("ours"),
            len(weights),
        )

    def bnb() -> Ready:
        dequantize_4bit = bitsandbytes("bitsandbytes.functional").dequantize_4bit
        weights = lab.bnb
        return Ready(
            lambda i: dequantize_4bit(weights[i][0], weights[i][1]),
            lambda out: relative_error(out, lab.exact("bnb")),
            LIMIT,
            written + lab.bytes_of("bnb"),
            len(weights),
        )

    def copy() -> Ready:
        weights = lab.dense
        return Ready(
            lambda i: weights[i].clone(),
            lambda out: relative_error(out, lab.exact("ours")),
            LIMIT,
            2 * written,
            len(weights),
        )

    contenders = [Contender(OURS, ours), Contender(BNB, bnb), Contender(COPY, copy)]
    contenders += lab.card_copies(lambda: written + lab.bytes_of("ours"))
    return Case(f"dequantize to {lab.point.dtype}", None, contenders)


def case_out(lab: Lab) -> Case:
    """The same into a given tensor, one for each copy of the weight: memory that has been touched before."""
    written = lab.bytes_of("dense")

    def given(count: int) -> list[torch.Tensor]:
        return [torch.zeros(lab.shape, dtype=lab.dtype, device=lab.device) for _ in range(count)]

    def ours() -> Ready:
        weights, out = lab.ours, given(len(lab.dense))
        return Ready(
            lambda i: weights[i].dequantize(lab.dtype, out=out[i % len(out)]),
            lambda result: relative_error(result, lab.exact("ours")),
            LIMIT,
            written + lab.bytes_of("ours"),
            len(weights),
        )

    def bnb() -> Ready:
        dequantize_4bit = bitsandbytes("bitsandbytes.functional").dequantize_4bit
        weights, out = lab.bnb, given(len(lab.dense))

        def call(i: int) -> torch.Tensor:
            try:
                dequantize_4bit(weights[i][0], weights[i][1], out=out[i % len(out)])
            except NotImplementedError:  # torch's reason fills a paragraph
                raise NotImplementedError("no out= on the CPU") from None
            return out[i % len(out)]

        return Ready(
            call,
            lambda result: relative_error(result, lab.exact("bnb")),
            LIMIT,
            written + lab.bytes_of("bnb"),
            len(weights),
        )

    def copy() -> Ready:
        weights = lab.dense
        out = given(len(weights))
        return Ready(
            lambda i: out[i].copy_(weights[i]),
            lambda result: relative_error(result, lab.exact("ours")),
            LIMIT,
            2 * written,
            len(weights),
        )

    contenders = [Contender(OURS, ours), Contender(BNB, bnb), Contender(COPY, copy)]
    return Case(f"dequantize to {lab.point.dtype} into a given tensor", None, contenders)
