"""limits: what the machine does at most: reading, a large copy, scaling in place, large products, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..case import Case, Contender, Ready, relative_error
from ..contenders.names import COPY, IN_PLACE, PRODUCT, PRODUCT_F32, READ_DOT, READ_GREATEST, READ_SUM
from ..contenders.weights import Lab

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
#: N = K = M of the product.
SIZE = {"cpu": 4096, "cuda": 8192}


def case(lab: Lab) -> Case:
    """All into memory that has been touched before, in plain torch: this package takes no part."""

    def copy() -> Ready:
        source = torch.ones(COPY_BYTES[lab.device.type] // 4, device=lab.device)
        sources = lab.copied(source, source.nbytes, torch.clone)
        out = torch.zeros_like(source)
        return Ready(
            lambda i: out.copy_(sources[i]),
            lambda result: 0.0 if torch.equal(result, source) else 1.0,
            0.5,
            2 * source.nbytes,
            len(sources),
        )

    def in_place() -> Ready:
        first = torch.ones(COPY_BYTES[lab.device.type] // 4, device=lab.device)
        sources = lab.copied(first, first.nbytes, torch.clone)
        return Ready(
            lambda i: sources[i].mul_(-1.0),
            lambda result: 0.0 if torch.equal(result.abs(), torch.ones_like(result)) else 1.0,
            0.5,
            2 * first.nbytes,
            len(sources),
        )

    def product(dtype: torch.dtype) -> Ready:
        size = SIZE[lab.device.type]
        a, b = lab.rows(size, size).to(dtype), lab.rows(size, size, seed=3).to(dtype)
        out = torch.empty_like(a)
        exact = a[:16].double() @ b.double().T
        return Ready(
            lambda i: torch.mm(a, b.T, out=out),
            lambda result: relative_error(result[:16], exact),
            0.01,
            3 * a.nbytes,
        )

    contenders = [Contender(COPY, copy), Contender(IN_PLACE, in_place), Contender(PRODUCT, lambda: product(lab.dtype))]
    if not lab.cuda:
        # A processor without bf16 instructions multiplies float32 several times as fast.
        if lab.dtype != torch.float32:
            contenders.append(Contender(PRODUCT_F32, lambda: product(torch.float32)))
        contenders += _reads(lab)
    return Case("limits", 2 * SIZE[lab.device.type] ** 3, contenders)


def _reads(lab: Lab) -> list[Contender]:
    """Ways to read a large buffer and write nothing; which is fastest differs between machines, so the best counts.

    On two cores of Zen 4 all of them come within 5% of a loop that was written for nothing else, with or without
    prefetching, in one stream a thread or in four.
    """

    def ready(call: Callable[[Tensor], Tensor], truth: float) -> Ready:
        first = torch.ones(COPY_BYTES["cpu"] // 4)
        first[-1] = 3.0
        sources = lab.copied(first, first.nbytes, torch.clone)
        return Ready(
            lambda i: call(sources[i]),
            lambda result: abs(result.item() / truth - 1),
            1e-4,
            first.nbytes,
            len(sources),
        )

    count = COPY_BYTES["cpu"] // 4
    greatest = torch.tensor(3.0).view(torch.int32).item()
    return [
        Contender(READ_SUM, lambda: ready(torch.sum, count + 2)),
        # As integers, which unlike floats have no NaN to look for.
        Contender(READ_GREATEST, lambda: ready(lambda buffer: buffer.view(torch.int32).max(), greatest)),
        Contender(READ_DOT, lambda: ready(lambda buffer: torch.dot(buffer, buffer), count + 8)),
    ]
