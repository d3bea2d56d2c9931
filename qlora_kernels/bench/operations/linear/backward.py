"""linear_backward: the gradients of x, A and B from dy, without forward and without autograd."""

from __future__ import annotations

import torch

from qlora_kernels import ops

from ...case import OURS, Case, Contender, Ready, largest_error
from ...contenders.names import NO_ADAPTER
from ...contenders.weights import Lab
from .forward import moved

# As of a training step: gradients pass through two products that are rounded to bf16.
LIMIT = 0.02


def case(lab: Lab) -> Case:
    """What the adapter costs in backward: without autograd, which on a card would switch to the stream of forward."""
    p = lab.sizes
    x, dy = lab.rows(p.m, p.k), lab.rows(p.m, p.n, seed=3)
    A, B = lab.adapter
    u = (lab.scaling * x.double() @ A.double().T).to(lab.dtype)

    def ours() -> Ready:
        weights = lab.ours
        W, d = lab.exact("ours"), dy.double()
        v = lab.scaling * d @ B.double()
        exact = (d @ W + v @ A.double(), v.T @ x.double(), d.T @ u.double())

        def call(i: int) -> tuple[torch.Tensor, ...]:
            rest = (x, u, A, B, lab.scaling, 0.0, None)
            return ops.linear_backward(dy, *weights[i].pieces, p.k, *rest, True, True, True)

        # x, u and the adapter are read too, and its gradients written.
        total = moved(lab, "ours") + (p.m * (p.k + p.rank) + 2 * p.rank * (p.n + p.k)) * lab.dtype.itemsize
        return Ready(call, lambda result: largest_error(result, exact), LIMIT, total, len(weights))

    def bare() -> Ready:
        weights = lab.ours
        exact = (dy.double() @ lab.exact("ours"),)

        def call(i: int) -> tuple[torch.Tensor, ...]:
            unused = (None, None, None, None, 1.0, 0.0, None)  # x, u, A, B; scaling, dropout, seed
            return ops.linear_backward(dy, *weights[i].pieces, p.k, *unused, True, False, False)[:1]

        return Ready(call, lambda result: largest_error(result, exact), LIMIT, moved(lab, "ours"), len(weights))

    # dy W; v = dy B; v A, v^T x and dy^T u.
    flops = 2 * p.m * p.n * p.k + 4 * p.m * p.rank * (p.n + p.k)
    return Case("backward with an adapter", flops, [Contender(OURS, ours), Contender(NO_ADAPTER, bare)])
