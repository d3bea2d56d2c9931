"""quantize: a float32 weight to NF4 with double quantization."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import qlora_kernels

from ..common import OURS, Case, Contender, Ready, relative_error
from ..contenders import BNB, Lab

# NF4 in blocks of 64 moves a normally distributed weight by 0.092, relative to its norm.
LIMIT = 0.1


def case(lab: Lab) -> Case:
    weights = [lab.source.clone() for _ in range(lab.settings.copies)]
    exact = lab.source.double()

    def ours() -> Ready:
        return Ready(
            lambda i: qlora_kernels.quantize(weights[i]),
            lambda out: relative_error(out.dequantize(torch.float32), exact),
            LIMIT,
            weights[0].nbytes + lab.bytes_of("ours"),
        )

    def bnb() -> Ready:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        return Ready(
            lambda i: quantize_4bit(weights[i], quant_type="nf4", blocksize=64, compress_statistics=True),
            lambda out: relative_error(dequantize_4bit(*out), exact),
            LIMIT,
            weights[0].nbytes + lab.bytes_of("bnb"),
        )

    return Case("quantize", "quantize from float32", None, None, [Contender(OURS, ours), Contender(BNB, bnb)])


def cases(lab: Lab) -> Iterator[Case]:
    yield case(lab)
