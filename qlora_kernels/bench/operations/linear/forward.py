"""linear_forward: y = x W^T, alone and with an adapter, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_kernels

from ...case import OURS, Case, Contender, Ready, relative_error
from ...contenders import ggml_weights
from ...contenders.models import plain_lora
from ...contenders.names import (
    BNB,
    BNB_EVAL,
    DENSE,
    DENSE_F32,
    DEQUANTIZED,
    GGML,
    INT4,
    NO_ADAPTER,
    PEFT,
    PEFT_EVAL,
)
from ...contenders.weights import Lab, bitsandbytes

# A bf16 output alone has an error of 0.0017; bitsandbytes' eval-mode layer rounds its constants to bf16 too (0.003).
LIMIT = 0.01
# Rows of x rounded to int8, 32 numbers at a time: 0.006 where they are normally distributed.
LIMIT_INT8 = 0.02


def case(lab: Lab) -> Case:
    return _with_adapter(lab) if lab.point.rank else _without(lab)


def moved(lab: Lab, whose: str, itemsize: int | None = None) -> int:
    """Bytes of the weight, of x, and of y."""
    p = lab.sizes
    return lab.bytes_of(whose) + p.m * (p.n + p.k) * (itemsize or lab.dtype.itemsize)


def _without(lab: Lab) -> Case:
    setup = Setup(lab)
    contenders = [
        Contender(OURS, setup.ours),
        Contender(DENSE, setup.dense),
        *setup.others_of_a_cpu(),
        Contender(DEQUANTIZED, setup.dequantized),
        Contender(BNB, setup.bnb),
        *([] if lab.cuda else [Contender(BNB_EVAL, setup.bnb_eval)]),
        *lab.card_copies(lambda: moved(lab, "ours")),
    ]
    return Case("forward", setup.flops, contenders)


class Setup:
    """The contenders of y = x W^T, and what they share.

    Attributes:
        flops: of the product.
    """

    def __init__(self, lab: Lab) -> None:
        p = lab.sizes
        self.lab, self.x, self.flops = lab, lab.rows(p.m, p.k), 2 * p.m * p.n * p.k
        self._check = _checker(lab, self.x, adapter=False)

    def _ready(self, call: Callable[[int], Tensor], whose: str, copies: int, itemsize: int | None = None) -> Ready:
        weights = {"bnb_eval": "bnb", "dense": "ours", "dense_f32": "ours"}.get(whose, whose)
        stored = whose if whose in ("ours", "bnb", "bnb_eval", "int4", "ggml") else None
        return Ready(
            _no_grad(call),
            self._check(weights),
            LIMIT_INT8 if whose == "ggml" else LIMIT,
            moved(self.lab, whose, itemsize),
            copies,
            format_error=self._check("source") if stored and not self.lab.cuda else None,
        )

    def others_of_a_cpu(self) -> list[Contender]:
        """What a user could take instead on a CPU: in place of bf16 float32, and other formats of 4 bits."""
        if self.lab.cuda or self.lab.dtype == torch.float16:
            return []
        dense = [Contender(DENSE_F32, self.dense_f32)] if self.lab.dtype == torch.bfloat16 else []
        return [*dense, Contender(INT4, self.int4), Contender(GGML, self.ggml)]

    def ours(self) -> Ready:
        x, weights = self.x, self.lab.ours
        return self._ready(lambda i: qlora_kernels.linear(x, weights[i]), "ours", len(weights))

    def dense(self) -> Ready:
        x, weights = self.x, self.lab.dense
        return self._ready(lambda i: F.linear(x, weights[i]), "dense", len(weights))

    def dense_f32(self) -> Ready:
        x, weights = self.x.float(), self.lab.dense_f32
        return self._ready(lambda i: F.linear(x, weights[i]), "dense_f32", len(weights), 4)

    def dequantized(self) -> Ready:
        x, weights, dtype = self.x, self.lab.ours, self.lab.dtype
        return self._ready(lambda i: F.linear(x, weights[i].dequantize(dtype)), "ours", len(weights))

    def int4(self) -> Ready:
        x, weights = self.x, self.lab.int4
        # Nobody would take its product of float32, which is far slower than this with both conversions.
        call = lambda i: weights[i].product(x.bfloat16()).to(x.dtype)  # noqa: E731
        return self._ready(call, "int4", len(weights))

    def ggml(self) -> Ready:
        weights = self.lab.ggml
        product = ggml_weights.Product(weights, self.lab.shape, self.x.float(), self.lab.settings.threads)
        return self._ready(product, "ggml", len(weights), 4)

    def bnb(self) -> Ready:
        x, matmul_4bit, weights = self.x, bitsandbytes().matmul_4bit, self.lab.bnb
        call = lambda i: matmul_4bit(x, weights[i][0].t(), quant_state=weights[i][1])  # noqa: E731
        return self._ready(call, "bnb", len(weights))

    def bnb_eval(self) -> Ready:
        x, layers = self.x, self.lab.bnb_eval_layers
        _repack(layers, x)
        return self._ready(lambda i: layers[i](x), "bnb_eval", len(layers))


def _with_adapter(lab: Lab) -> Case:
    """The layers as a user calls them. PEFT's takes another path in eval mode, so it runs in both."""
    p = lab.sizes
    x = lab.rows(p.m, p.k)
    check = _checker(lab, x, adapter=True)
    adapter_bytes = p.rank * (p.n + p.k) * lab.dtype.itemsize

    def ready(call: Callable[[int], Tensor], whose: str, copies: int) -> Ready:
        total = moved(lab, whose) + adapter_bytes
        return Ready(_no_grad(call), check("bnb" if "bnb" in whose else "ours"), LIMIT, total, copies)

    def ours() -> Ready:
        layers = [layer.eval() for layer in lab.layers]
        return ready(lambda i: layers[i](x), "ours", len(layers))

    def bare() -> Ready:
        weights, exact = lab.ours, _checker(lab, x, adapter=False)("ours")
        call = _no_grad(lambda i: qlora_kernels.linear(x, weights[i]))
        return Ready(call, exact, LIMIT, moved(lab, "ours"), len(weights))

    def dense() -> Ready:
        weights = lab.dense
        adapters = lab.adapters(len(weights))
        return ready(lambda i: plain_lora(F.linear(x, weights[i]), x, *adapters[i], lab.scaling), "dense", len(weights))

    def peft() -> Ready:
        layers = lab.peft_layers(training=True)
        return ready(lambda i: layers[i](x), "bnb", len(layers))

    def peft_eval() -> Ready:
        layers = lab.peft_layers(training=False)
        _repack(layers, x)
        return ready(lambda i: layers[i](x), "bnb_eval", len(layers))

    contenders = [
        Contender(OURS, ours),
        Contender(DENSE, dense),
        Contender(PEFT, peft),
        *([Contender(NO_ADAPTER, bare)] if lab.cuda else [Contender(PEFT_EVAL, peft_eval)]),
    ]
    return Case("forward with an adapter", 2 * p.m * (p.n * p.k + p.rank * (p.n + p.k)), contenders)


def _repack(layers: Sequence[nn.Module], x: Tensor) -> None:
    """A first call, in which bitsandbytes' layer in eval mode repacks its weight."""
    with torch.no_grad():
        for layer in layers:
            layer(x[:1])


def _no_grad(call: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def quiet(i: int) -> Tensor:
        return call(i)

    return quiet


def _checker(lab: Lab, x: Tensor, adapter: bool) -> Callable[[str], Callable[[Tensor], float]]:
    """Errors on at most 16 rows from first to last, which keeps the float64 product short."""
    chosen = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 16)).round().long().to(x.device)
    references: dict[str, Tensor] = {}

    def exact(whose: str) -> Tensor:
        rows = x[chosen].double()
        y = rows @ lab.exact(whose).T
        if adapter:
            A, B = (factor.double() for factor in lab.adapter)
            y += lab.scaling * (rows @ A.T) @ B.T
        return y

    def checker(whose: str) -> Callable[[Tensor], float]:
        if whose not in references:
            references[whose] = exact(whose)
        return lambda y: relative_error(y[chosen], references[whose])

    return checker
