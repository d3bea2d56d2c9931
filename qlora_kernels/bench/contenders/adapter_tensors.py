"""What optimizers work on: the adapters of a whole Llama, their gradients, and what steps should give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..points import MODELS, Coordinates, Point

#: Gradients of the steps that are verified, as multiples of the same ones: any two of them differ.
SCALES = (1.0, -0.5, 0.75, 2.0)
#: Of a tensor's elements those that are verified: each of these, in all tensors.
STRIDE = 17


def adapter_shapes(model: str, rank: int) -> list[tuple[int, int]]:
    """A [r, K] and B [N, r] of every linear layer of a model, block by block."""
    block = list(MODELS[model].linears.values())
    return [shape for n, k in block * MODELS[model].layers for shape in ((rank, k), (n, rank))]


class AdapterTensors:
    """float32 A [r, K] and B [N, r] of the seven linear layers of each block, shared by all contenders.

    With gradients that are multiples of the same ones all moments are, too: so the parameters after any number of steps
    have a formula, which is computed in float64.
    """

    def __init__(self, point: Point, device: torch.device) -> None:
        sizes = Coordinates(point)
        shapes = adapter_shapes(sizes.model, sizes.rank)
        generator = torch.Generator().manual_seed(0)
        self.begin = [torch.randn(shape, generator=generator).mul_(0.02).to(device) for shape in shapes]
        self.gradients = [torch.randn(shape, generator=generator).mul_(1e-3).to(device) for shape in shapes]
        self.parameters = [nn.Parameter(value.clone()) for value in self.begin]
        for p in self.parameters:
            p.grad = torch.empty_like(p)
        self.count = sum(p.numel() for p in self.parameters)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        self.norm = sum((g.double().square().sum() for g in self.gradients), nothing).sqrt().item()

    def set_step(self, step: int) -> None:
        """Gradients for the step of this number, from 0; at step 0 the parameters start over."""
        with torch.no_grad():
            for p, begin, gradient in zip(self.parameters, self.begin, self.gradients):
                if step == 0:
                    p.copy_(begin)
                torch.mul(gradient, SCALES[step % len(SCALES)], out=p.grad)

    def scales(self, steps: int, max_grad_norm: float | None) -> list[float]:
        """The multiples so far, after clipping."""
        scales = [SCALES[step % len(SCALES)] for step in range(steps)]
        if max_grad_norm is None:
            return scales
        return [scale * min(1.0, max_grad_norm / (abs(scale) * self.norm + 1e-6)) for scale in scales]

    def error(self, moves: list[Callable[[Tensor], Tensor]], decay: float) -> float:
        """How far the parameters are from the truth, relative to the length of the last step, in the worst tensor.

        Args:
            moves: of each step so far: from a tensor's gradients in float64 to what the step subtracts.
            decay: what a step leaves of a parameter.
        """
        worst = torch.zeros((), dtype=torch.float64, device=self.begin[0].device)
        for p, begin, gradient in zip(self.parameters, self.begin, self.gradients):
            reached, value, g = (t.detach().flatten()[::STRIDE].double() for t in (p, begin, gradient))
            for move in moves:
                last = move(g)
                value.mul_(decay).sub_(last)
            worst = torch.maximum(worst, (reached - value).norm() / last.norm())  # NaN stays
        return worst.item()


def adamw_moves(scales: list[float], lr: float, betas: tuple[float, float], eps: float) -> list:
    """AdamW's steps on gradients that are these multiples of the same ones; see :meth:`AdapterTensors.error`."""
    moves, m, v = [], 0.0, 0.0
    for step, scale in enumerate(scales, 1):
        m = betas[0] * m + (1 - betas[0]) * scale
        v = betas[1] * v + (1 - betas[1]) * scale**2
        first, root = m / (1 - betas[0] ** step), (v / (1 - betas[1] ** step)) ** 0.5
        moves.append(lambda g, first=first, root=root: lr * first * g / (root * g.abs() + eps))
    return moves


def lion_moves(scales: list[float], lr: float, betas: tuple[float, float]) -> list:
    """Lion's."""
    moves, m = [], 0.0
    for scale in scales:
        direction = betas[0] * m + (1 - betas[0]) * scale
        m = betas[1] * m + (1 - betas[1]) * scale
        moves.append(lambda g, direction=direction: lr * (direction * g).sign())
    return moves
