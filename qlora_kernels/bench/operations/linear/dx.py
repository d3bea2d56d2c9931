"""linear_dx: dx = dy W, the gradient of the layer's input alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kernels import ops

from ...case import OURS, Case, Contender, Ready, relative_error
from ...contenders.names import BNB, DENSE, DEQUANTIZED
from ...contenders.weights import Lab, bitsandbytes
from .forward import moved

LIMIT = 0.01


def case(lab: Lab) -> Case:
    """What each one's backward calls, without the autograd around it, which is the same for all."""
    p = lab.sizes
    dy = lab.rows(p.m, p.n, seed=3)
    chosen = torch.linspace(0, p.m - 1, min(p.m, 16)).round().long().to(dy.device)

    def check(whose: str) -> Callable[[Tensor], float]:
        exact = dy[chosen].double() @ lab.exact(whose)
        return lambda dx: relative_error(dx[chosen], exact)

    def ours() -> Ready:
        weights = lab.ours

        def call(i: int) -> Tensor:
            unused = (None, None, None, None, 1.0, 0.0, None)  # x, u, A, B; scaling, dropout, seed
            return ops.linear_backward(dy, *weights[i].pieces, p.k, *unused, True, False, False)[0]

        return Ready(call, check("ours"), LIMIT, moved(lab, "ours"), len(weights))

    def dense() -> Ready:
        weights = lab.dense
        return Ready(lambda i: dy @ weights[i], check("ours"), LIMIT, moved(lab, "dense"), len(weights))

    def dequantized() -> Ready:
        weights = lab.ours
        call = lambda i: dy @ weights[i].dequantize(lab.dtype)  # noqa: E731
        return Ready(call, check("ours"), LIMIT, moved(lab, "ours"), len(weights))

    def bnb() -> Ready:
        dequantize_4bit = bitsandbytes("bitsandbytes.functional").dequantize_4bit
        weights = lab.bnb
        call = lambda i: dy @ dequantize_4bit(*weights[i]).to(dy.dtype)  # noqa: E731
        return Ready(call, check("bnb"), LIMIT, moved(lab, "bnb"), len(weights))

    contenders = [
        Contender(OURS, ours),
        Contender(DENSE, dense),
        Contender(DEQUANTIZED, dequantized),
        Contender(BNB, bnb),
    ]
    return Case("gradient of x", 2 * p.m * p.n * p.k, contenders)
