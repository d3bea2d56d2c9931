"""limits: what the machine does at most: a large copy, and a large product in plain torch."""

from __future__ import annotations

import torch

from ..common import Case, Contender, Ready, relative_error
from ..contenders import COPY, PRODUCT, Lab

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
#: N = K = M of the product.
SIZE = {"cpu": 4096, "cuda": 8192}


def case(lab: Lab) -> Case:
    """Both into memory that has been touched before. Nobody's kernels: this package takes no part."""

    def copy() -> Ready:
        source = torch.ones(COPY_BYTES[lab.device.type] // 4, device=lab.device)
        sources = lab.copied(source, source.nbytes, torch.clone)
        out = torch.zeros_like(source)
        return Ready(
            lambda i: out.copy_(sources[i]),
            lambda found: 0.0 if torch.equal(found, source) else 1.0,
            0.5,
            2 * source.nbytes,
            len(sources),
        )

    def product() -> Ready:
        size = SIZE[lab.device.type]
        a, b = lab.rows(size, size), lab.rows(size, size, seed=3)
        out = torch.empty_like(a)
        exact = a[:16].double() @ b.double().T
        return Ready(
            lambda i: torch.mm(a, b.T, out=out),
            lambda found: relative_error(found[:16], exact),
            0.01,
            3 * a.nbytes,
        )

    return Case("limits", 2 * SIZE[lab.device.type] ** 3, [Contender(COPY, copy), Contender(PRODUCT, product)])
