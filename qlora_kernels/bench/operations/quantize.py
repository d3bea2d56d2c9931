"""quantize: a weight to NF4 with double quantization."""

from __future__ import annotations

import torch

import qlora_kernels
from qlora_kernels import default_nested_table, ops

from ..case import OURS, Case, Contender, Ready, relative_error
from ..contenders.names import BNB, KERNEL
from ..contenders.weights import Lab, bitsandbytes

# NF4 in blocks of 64 moves a normally distributed weight by 0.092, relative to its norm.
LIMIT = 0.1


def case(lab: Lab) -> Case:
    exact = lab.source.double()
    weights = lab.copied(lab.source, lab.source.nbytes, torch.clone)
    moved = lab.source.nbytes + lab.bytes_of("ours")

    def ours() -> Ready:
        return Ready(
            lambda i: qlora_kernels.quantize(weights[i]),
            lambda out: relative_error(out.dequantize(torch.float32), exact),
            LIMIT,
            moved,
            len(weights),
            waits=lab.cuda,
        )

    def kernel() -> Ready:
        """Without the look at the result, for which the host waits on a card."""
        table = default_nested_table(lab.device)

        def error(pieces: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
            weight = qlora_kernels.NF4Weight(*pieces, table, torch.Size(lab.shape))
            return relative_error(weight.dequantize(torch.float32), exact)

        return Ready(lambda i: ops.quantize_nested(weights[i], table), error, LIMIT, moved, len(weights))

    def bnb() -> Ready:
        functional = bitsandbytes("bitsandbytes.functional")
        dequantize_4bit, quantize_4bit = functional.dequantize_4bit, functional.quantize_4bit
        return Ready(
            lambda i: quantize_4bit(weights[i], quant_type="nf4", blocksize=64, compress_statistics=True),
            lambda out: relative_error(dequantize_4bit(*out), exact),
            LIMIT,
            lab.source.nbytes + lab.bytes_of("bnb"),
            len(weights),
        )

    contenders = [Contender(OURS, ours), Contender(BNB, bnb), *([Contender(KERNEL, kernel)] if lab.cuda else [])]
    contenders += lab.card_copies(lambda: moved)
    return Case(f"quantize from {lab.point.dtype}", None, contenders)
