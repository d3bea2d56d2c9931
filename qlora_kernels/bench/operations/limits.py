"""limits: what the machine does at most: a large copy, scaling in place, and a large product, in plain torch."""

from __future__ import annotations

import torch

from ..case import Case, Contender, Ready, relative_error
from ..contenders.names import COPY, IN_PLACE, PRODUCT
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

    def product() -> Ready:
        size = SIZE[lab.device.type]
        a, b = lab.rows(size, size), lab.rows(size, size, seed=3)
        out = torch.empty_like(a)
        exact = a[:16].double() @ b.double().T
        return Ready(
            lambda i: torch.mm(a, b.T, out=out),
            lambda result: relative_error(result[:16], exact),
            0.01,
            3 * a.nbytes,
        )

    contenders = [Contender(COPY, copy), Contender(IN_PLACE, in_place), Contender(PRODUCT, product)]
    return Case("limits", 2 * SIZE[lab.device.type] ** 3, contenders)
