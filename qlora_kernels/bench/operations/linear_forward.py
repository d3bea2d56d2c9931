"""linear_forward: y = x W^T, alone and with an adapter, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import qlora_kernels

from ..common import OURS, Case, Contender, Ready, relative_error
from ..contenders import BNB, BNB_EVAL, DENSE, PEFT, PEFT_EVAL, Lab

ROWS = (1, 4, 16, 64, 512, 2048)

# A bf16 output alone has an error of 0.0017; bitsandbytes' eval-mode layer rounds its constants to bf16 too (0.003).
LIMIT = 0.01


def case(lab: Lab, m: int) -> Case:
    """Without an adapter."""
    s = lab.settings
    x = lab.rows(m, s.k)
    check = _checker(lab, x, adapter=False)

    def ours() -> Ready:
        weights = lab.ours
        return Ready(
            _no_grad(lambda i: qlora_kernels.linear(x, weights[i])), check("ours"), LIMIT, lab.bytes_of("ours")
        )

    def dense() -> Ready:
        weights = lab.dense
        return Ready(_no_grad(lambda i: F.linear(x, weights[i])), check("ours"), LIMIT, lab.bytes_of("dense"))

    def bnb() -> Ready:
        from bitsandbytes import matmul_4bit

        weights = lab.bnb
        call = _no_grad(lambda i: matmul_4bit(x, weights[i][0].t(), quant_state=weights[i][1]))
        return Ready(call, check("bnb"), LIMIT, lab.bytes_of("bnb"))

    def bnb_eval() -> Ready:
        layers = lab.bnb_eval_layers
        call = _no_grad(lambda i: layers[i](x))
        call(0)  # repacks
        return Ready(call, check("bnb"), LIMIT, lab.bytes_of("bnb_eval"))

    contenders = [Contender(OURS, ours), Contender(DENSE, dense), Contender(BNB, bnb), Contender(BNB_EVAL, bnb_eval)]
    return Case("linear_forward", "forward", m, 2 * m * s.n * s.k, contenders)


def case_with_adapter(lab: Lab, m: int) -> Case:
    """With an adapter: the layers as a user calls them. PEFT's takes another path in eval mode, so it runs in both."""
    s = lab.settings
    x = lab.rows(m, s.k)
    check = _checker(lab, x, adapter=True)

    def ours() -> Ready:
        layers = [layer.eval() for layer in lab.layers]
        return Ready(_no_grad(lambda i: layers[i](x)), check("ours"), LIMIT, lab.bytes_of("ours"))

    def dense() -> Ready:
        (A, B), weights = lab.adapter, lab.dense
        call = _no_grad(lambda i: F.linear(x, weights[i]) + lab.scaling * F.linear(F.linear(x, A), B))
        return Ready(call, check("ours"), LIMIT, lab.bytes_of("dense"))

    def peft() -> Ready:
        models = lab.peft_models(training=True)
        return Ready(_no_grad(lambda i: models[i](x)), check("bnb"), LIMIT, lab.bytes_of("bnb"))

    def peft_eval() -> Ready:
        models = lab.peft_models(training=False)
        call = _no_grad(lambda i: models[i](x))
        call(0)  # repacks
        return Ready(call, check("bnb"), LIMIT, lab.bytes_of("bnb_eval"))

    contenders = [
        Contender(OURS, ours),
        Contender(DENSE, dense),
        Contender(PEFT, peft),
        Contender(PEFT_EVAL, peft_eval),
    ]
    flops = 2 * m * (s.n * s.k + s.rank * (s.n + s.k))
    return Case("linear_forward_adapter", f"forward, r = {s.rank}", m, flops, contenders)


def cases(lab: Lab, rows: tuple[int, ...] = ROWS) -> Iterator[Case]:
    for m in rows:
        yield case(lab, m)
    for m in rows:
        yield case_with_adapter(lab, m)


def _no_grad(call: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def quiet(i: int) -> Tensor:
        return call(i)

    return quiet


def _checker(lab: Lab, x: Tensor, adapter: bool) -> Callable[[str], Callable[[Tensor], float]]:
    """Errors on at most 16 rows from first to last, which keeps the float64 product short."""
    chosen = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 16)).round().long()
    references: dict[str, Tensor] = {}

    def exact(whose: str) -> Tensor:
        rows = x[chosen].double()
        y = rows @ lab.exact(whose).T
        if adapter:
            A, B = (part.double() for part in lab.adapter)
            y += lab.scaling * (rows @ A.T) @ B.T
        return y

    def checker(whose: str) -> Callable[[Tensor], float]:
        if whose not in references:
            references[whose] = exact(whose)
        return lambda y: relative_error(y[chosen], references[whose])

    return checker
