"""linear_dx: dx = dy W, the gradient of the layer's input alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import qlora_kernels

from ..common import OURS, Case, Contender, Ready, relative_error
from ..contenders import BNB, DENSE, DEQUANTIZED, Lab
from .linear_forward import moved

LIMIT = 0.01


def case(lab: Lab) -> Case:
    """Those that have no call of their own for it go through autograd, whose graph is kept and used again."""
    p = lab.point
    x, dy = lab.rows(p.m, p.k).requires_grad_(), lab.rows(p.m, p.n, seed=3)
    chosen = torch.linspace(0, p.m - 1, min(p.m, 16)).round().long().to(dy.device)

    def check(whose: str) -> Callable[[Tensor], float]:
        exact = dy[chosen].double() @ lab.exact(whose)
        return lambda dx: relative_error(dx[chosen], exact)

    def backward(forward: Callable[[int], Tensor], whose: str, copies: int) -> Ready:
        # One result for every copy of the weight; its memory is not what is measured.
        results = [forward(i) for i in range(copies)]

        def call(i: int) -> Tensor:
            return torch.autograd.grad(results[i], x, dy, retain_graph=True)[0]

        return Ready(call, check(whose), LIMIT, moved(lab, whose), copies)

    def ours() -> Ready:
        weights = lab.ours
        return backward(lambda i: qlora_kernels.linear(x, weights[i]), "ours", len(weights))

    def dense() -> Ready:
        weights = lab.dense
        return Ready(lambda i: dy @ weights[i], check("ours"), LIMIT, moved(lab, "dense"), len(weights))

    def dequantized() -> Ready:
        weights = lab.ours
        call = lambda i: dy @ weights[i].dequantize(lab.dtype)  # noqa: E731
        return Ready(call, check("ours"), LIMIT, moved(lab, "ours"), len(weights))

    def bnb() -> Ready:
        from bitsandbytes import matmul_4bit

        weights = lab.bnb
        return backward(lambda i: matmul_4bit(x, weights[i][0].t(), quant_state=weights[i][1]), "bnb", len(weights))

    contenders = [
        Contender(OURS, ours),
        Contender(DENSE, dense),
        Contender(DEQUANTIZED, dequantized),
        Contender(BNB, bnb),
    ]
    return Case("gradient of x", 2 * p.m * p.n * p.k, contenders)
