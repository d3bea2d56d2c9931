"""linear_step: a training step of one layer: forward, then the gradients of x, A and B."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_kernels

from ...case import OURS, Case, Contender, Ready, largest_error
from ...contenders.models import peft_adapter, plain_lora
from ...contenders.names import BNB, DENSE, DEQUANTIZED, NO_ADAPTER, PEFT
from ...contenders.weights import Lab, bitsandbytes

# Gradients pass through two products that are rounded to bf16.
LIMIT = 0.02


class Dequantized(torch.autograd.Function):
    """x W^T with W decoded again in each direction, as a layer without fused kernels does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: qlora_kernels.NF4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.weight.dequantize(dy.dtype), None


def _step(forward: Callable[[], Tensor], x: Tensor, dy: Tensor, adapter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y, and the gradients of x and of the adapter."""
    y = forward()
    return y.detach(), *torch.autograd.grad(y, (x, *adapter), dy)


def case(lab: Lab) -> Case:
    """With rank 0, without the adapter: what that costs is the difference."""
    setup, p = _Setup(lab), lab.sizes
    contenders = [
        Contender(OURS, setup.ours),
        Contender(DENSE, setup.dense),
        Contender(DEQUANTIZED, setup.dequantized),
        Contender(PEFT, setup.peft) if p.rank else Contender(BNB, setup.bnb),
        *([Contender(NO_ADAPTER, setup.bare)] if p.rank and lab.cuda else []),
    ]
    # x W^T and dy W, each 2 M N K; and of the adapter forward, dx, dA and dB.
    flops = 4 * p.m * p.n * p.k + 6 * p.m * p.rank * (p.n + p.k)
    return Case("forward + backward", flops, contenders)


class _Setup:
    """What the contenders share: x, dy, and how a step is checked."""

    def __init__(self, lab: Lab) -> None:
        self.lab, p = lab, lab.sizes
        self.x = lab.rows(p.m, p.k).requires_grad_()
        self.dy = lab.rows(p.m, p.n, seed=3)
        self.check = _checker(lab, self.x.detach(), self.dy, adapter=bool(p.rank))

    def ready(self, call: Callable[[int], tuple[Tensor, ...]], whose: str, copies: int) -> Ready:
        check = self.check("bnb" if whose == "bnb" else "ours")
        return Ready(call, check, LIMIT, _moved(self.lab, whose), copies)

    def layers_ready(self, layers: Sequence[nn.Module], adapters: list[tuple[Tensor, ...]], whose: str) -> Ready:
        """Layers that apply their adapters themselves."""
        x, dy = self.x, self.dy
        return self.ready(lambda i: _step(lambda: layers[i](x), x, dy, adapters[i]), whose, len(layers))

    def product_ready(self, product: Callable[[int], Tensor], whose: str, copies: int) -> Ready:
        """A product, and the adapter in plain torch."""
        x, dy = self.x, self.dy
        if not self.lab.sizes.rank:
            return self.ready(lambda i: _step(lambda: product(i), x, dy, ()), whose, copies)
        adapters = [(A.requires_grad_(), B.requires_grad_()) for A, B in self.lab.adapters(copies)]
        scaling = self.lab.scaling

        def forward(i: int) -> Tensor:
            return plain_lora(product(i), x, *adapters[i], scaling)

        return self.ready(lambda i: _step(lambda: forward(i), x, dy, adapters[i]), whose, copies)

    # ---------------------------------------------------------------------------------------------- contenders

    def ours(self) -> Ready:
        if not self.lab.sizes.rank:
            x, weights = self.x, self.lab.ours
            return self.product_ready(lambda i: qlora_kernels.linear(x, weights[i]), "ours", len(weights))
        layers = [layer.train() for layer in self.lab.layers]
        adapters = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in layers]
        return self.layers_ready(layers, adapters, "ours")

    def dense(self) -> Ready:
        x, weights = self.x, self.lab.dense
        return self.product_ready(lambda i: F.linear(x, weights[i]), "dense", len(weights))

    def dequantized(self) -> Ready:
        x, weights = self.x, self.lab.ours
        return self.product_ready(lambda i: Dequantized.apply(x, weights[i]), "ours", len(weights))

    def bnb(self) -> Ready:
        x, weights, matmul_4bit = self.x, self.lab.bnb, bitsandbytes().matmul_4bit
        product = lambda i: matmul_4bit(x, weights[i][0].t(), quant_state=weights[i][1])  # noqa: E731
        return self.product_ready(product, "bnb", len(weights))

    def peft(self) -> Ready:
        layers = self.lab.peft_layers(training=True)
        return self.layers_ready(layers, [peft_adapter(layer) for layer in layers], "bnb")

    def bare(self) -> Ready:
        """This package without the adapter."""
        x, dy, weights = self.x, self.dy, self.lab.ours
        check = _checker(self.lab, x.detach(), dy, adapter=False)("ours")
        call = lambda i: _step(lambda: qlora_kernels.linear(x, weights[i]), x, dy, ())  # noqa: E731
        return Ready(call, check, LIMIT, _moved(self.lab, "ours"), len(weights))


def _moved(lab: Lab, whose: str) -> int:
    """Bytes of the weight, once each way, and of x, y, dy and dx."""
    p = lab.sizes
    return 2 * lab.bytes_of(whose) + 2 * p.m * (p.n + p.k) * lab.dtype.itemsize


def _checker(lab: Lab, x: Tensor, dy: Tensor, adapter: bool) -> Callable[[str], Callable[[tuple[Tensor, ...]], float]]:
    """The largest error of y, dx, dA and dB against the formulas in float64."""
    references: dict[str, tuple[Tensor, ...]] = {}

    def exact(whose: str) -> tuple[Tensor, ...]:
        W = lab.exact(whose)
        x64, dy64 = x.double(), dy.double()
        y, dx = x64 @ W.T, dy64 @ W
        if not adapter:
            return y, dx
        A, B = (factor.double() for factor in lab.adapter)
        u = lab.scaling * x64 @ A.T
        v = lab.scaling * dy64 @ B
        return y + u @ B.T, dx + v @ A, v.T @ x64, dy64.T @ u

    def checker(whose: str) -> Callable[[tuple[Tensor, ...]], float]:
        if whose not in references:
            references[whose] = exact(whose)
        return lambda result: largest_error(result, references[whose])

    return checker
