"""linear_step: a training step of one layer: forward, then the gradients of x, A and B."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    p = lab.sizes
    x = lab.rows(p.m, p.k).requires_grad_()
    dy = lab.rows(p.m, p.n, seed=3)
    check = _checker(lab, x.detach(), dy, adapter=bool(p.rank))

    def ready(call: Callable[[int], tuple[Tensor, ...]], whose: str, copies: int) -> Ready:
        return Ready(call, check("bnb" if whose == "bnb" else "ours"), LIMIT, _moved(lab, whose), copies)

    def plain(product: Callable[[int], Tensor], whose: str, copies: int) -> Ready:
        """A product, and the adapter in plain torch."""
        if not p.rank:
            return ready(lambda i: _step(lambda: product(i), x, dy, ()), whose, copies)
        adapters = [(A.requires_grad_(), B.requires_grad_()) for A, B in lab.adapters(copies)]

        def forward(i: int) -> Tensor:
            return plain_lora(product(i), x, *adapters[i], lab.scaling)

        return ready(lambda i: _step(lambda: forward(i), x, dy, adapters[i]), whose, copies)

    def ours() -> Ready:
        if not p.rank:
            weights = lab.ours
            return plain(lambda i: qlora_kernels.linear(x, weights[i]), "ours", len(weights))
        layers = [layer.train() for layer in lab.layers]
        adapters = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in layers]
        return ready(lambda i: _step(lambda: layers[i](x), x, dy, adapters[i]), "ours", len(layers))

    def dense() -> Ready:
        weights = lab.dense
        return plain(lambda i: F.linear(x, weights[i]), "dense", len(weights))

    def dequantized() -> Ready:
        weights = lab.ours
        return plain(lambda i: Dequantized.apply(x, weights[i]), "ours", len(weights))

    def bnb() -> Ready:
        weights, product = lab.bnb, _bnb_product(lab, x)
        return plain(product, "bnb", len(weights))

    def peft() -> Ready:
        layers = lab.peft_layers(training=True)
        adapters = [peft_adapter(layer) for layer in layers]
        return ready(lambda i: _step(lambda: layers[i](x), x, dy, adapters[i]), "bnb", len(layers))

    def bare() -> Ready:
        weights, exact = lab.ours, _checker(lab, x.detach(), dy, adapter=False)("ours")
        call = lambda i: _step(lambda: qlora_kernels.linear(x, weights[i]), x, dy, ())  # noqa: E731
        return Ready(call, exact, LIMIT, _moved(lab, "ours"), len(weights))

    contenders = [
        Contender(OURS, ours),
        Contender(DENSE, dense),
        Contender(DEQUANTIZED, dequantized),
        Contender(PEFT, peft) if p.rank else Contender(BNB, bnb),
        *([Contender(NO_ADAPTER, bare)] if p.rank and lab.cuda else []),
    ]
    # x W^T and dy W, each 2 M N K; and of the adapter forward, dx, dA and dB.
    flops = 4 * p.m * p.n * p.k + 6 * p.m * p.rank * (p.n + p.k)
    return Case("forward + backward", flops, contenders)


def _moved(lab: Lab, whose: str) -> int:
    """Bytes of the weight, once each way, and of x, y, dy and dx."""
    p = lab.sizes
    return 2 * lab.bytes_of(whose) + 2 * p.m * (p.n + p.k) * lab.dtype.itemsize


def _bnb_product(lab: Lab, x: Tensor) -> Callable[[int], Tensor]:
    matmul_4bit = bitsandbytes().matmul_4bit
    return lambda i: matmul_4bit(x, lab.bnb[i][0].t(), quant_state=lab.bnb[i][1])


def _checker(lab: Lab, x: Tensor, dy: Tensor, adapter: bool) -> Callable[[str], Callable[[tuple[Tensor, ...]], float]]:
    """The largest error of y, dx, dA and dB against the formulas in float64."""
    references: dict[str, tuple[Tensor, ...]] = {}

    def exact(whose: str) -> tuple[Tensor, ...]:
        W = lab.exact(whose)
        x64, dy64 = x.double(), dy.double()
        y, dx = x64 @ W.T, dy64 @ W
        if not adapter:
            return y, dx
        A, B = (part.double() for part in lab.adapter)
        u = lab.scaling * x64 @ A.T
        v = lab.scaling * dy64 @ B
        return y + u @ B.T, dx + v @ A, v.T @ x64, dy64.T @ u

    def checker(whose: str) -> Callable[[tuple[Tensor, ...]], float]:
        if whose not in references:
            references[whose] = exact(whose)
        return lambda result: largest_error(result, references[whose])

    return checker
