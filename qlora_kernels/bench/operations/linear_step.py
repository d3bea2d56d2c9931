"""A training step of one layer: forward, then the gradients of x, A and B."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import OURS, Case, Contender, Ready, relative_error
from ..contenders import DENSE, PEFT, Lab

ROWS = (16, 512)

# Gradients pass through two products that are rounded to bf16.
LIMIT = 0.02


def case(lab: Lab, m: int) -> Case:
    s = lab.settings
    x = lab.rows(m, s.k).requires_grad_()
    dy = lab.rows(m, s.n, seed=3)
    check = _checker(lab, x.detach(), dy)

    def step(forward: Callable[[], Tensor], A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, (x, A, B), dy)

    def ours() -> Ready:
        layers = [layer.train() for layer in lab.layers]
        adapters = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in layers]
        call = lambda i: step(lambda: layers[i](x), *adapters[i])  # noqa: E731
        return Ready(call, check("ours"), LIMIT, 2 * lab.bytes_of("ours"))

    def dense() -> Ready:
        weights = lab.dense
        A, B = (part.clone().requires_grad_() for part in lab.adapter)

        def forward(i: int) -> Tensor:
            return F.linear(x, weights[i]) + lab.scaling * F.linear(F.linear(x, A), B)

        return Ready(lambda i: step(lambda: forward(i), A, B), check("ours"), LIMIT, 2 * lab.bytes_of("dense"))

    def peft() -> Ready:
        models = lab.peft_models(training=True)
        layers = [model.base_model.model.linear for model in models]
        adapters = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
        call = lambda i: step(lambda: models[i](x), *adapters[i])  # noqa: E731
        return Ready(call, check("bnb"), LIMIT, 2 * lab.bytes_of("bnb"))

    contenders = [Contender(OURS, ours), Contender(DENSE, dense), Contender(PEFT, peft)]
    # x W^T and dy W, each 2 M N K; and of the adapter forward, dx, dA and dB.
    flops = 4 * m * s.n * s.k + 6 * m * s.rank * (s.n + s.k)
    return Case("linear_backward", f"forward + backward, r = {s.rank}", m, flops, contenders)


def cases(lab: Lab, rows: tuple[int, ...] = ROWS) -> Iterator[Case]:
    for m in rows:
        yield case(lab, m)


def _checker(lab: Lab, x: Tensor, dy: Tensor) -> Callable[[str], Callable[[tuple[Tensor, ...]], float]]:
    """The largest error of y, dx, dA and dB against the formulas in float64."""
    references: dict[str, tuple[Tensor, ...]] = {}

    def exact(whose: str) -> tuple[Tensor, ...]:
        W = lab.exact(whose)
        A, B = (part.double() for part in lab.adapter)
        x64, dy64 = x.double(), dy.double()
        u = lab.scaling * x64 @ A.T
        v = lab.scaling * dy64 @ B
        return x64 @ W.T + u @ B.T, dy64 @ W + v @ A, v.T @ x64, dy64.T @ u

    def checker(whose: str) -> Callable[[tuple[Tensor, ...]], float]:
        if whose not in references:
            references[whose] = exact(whose)
        return lambda found: max(map(relative_error, found, references[whose]))

    return checker
