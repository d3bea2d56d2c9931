"""experts: a mixture's experts, 64 of them and 8 for each token, without gradients: one operation, and loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kernels import QExperts, QLinear, quantize_stack
from qlora_kernels.layers.experts import QExpertsModule

from ..case import OURS, Case, Contender, Ready, relative_error
from ..contenders.names import BNB, LOOP
from ..contenders.weights import Lab, as_limited, bnb_linear, bnb_pieces, bnb_stored, decoded

EXPERTS, TOP = 64, 8
#: Of a point without sizes: Qwen3-30B-A3B's, from its published configuration.
INTERMEDIATE, HIDDEN = 768, 2048
#: Two products in bf16, what is between them, and a sum.
LIMIT = 0.03

#: Of each expert: the layer of gate and up together, and that of down.
Layers = Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]


class _Gated(nn.Module):
    """What transformers notes in its modules of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.has_post_expert_norm = EXPERTS, True, False, False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return _gated(gate_up)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _loop(layers: Layers, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """As transformers does it without an operation for all experts: those that have tokens, one after another."""
    y = torch.zeros_like(x)
    mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for (expert,) in mask.sum((1, 2)).nonzero().tolist():
        place, token = torch.where(mask[expert])
        gate_up, down = layers[expert]
        out = down(_gated(gate_up(x[token]))) * shares[token, place, None]
        y.index_add_(0, token, out.to(y.dtype))
    return y


def case(lab: Lab) -> Case:
    setup = _Setup(lab)
    contenders = [Contender(OURS, setup.ours), Contender(LOOP, setup.loop), Contender(BNB, setup.bnb)]
    flops = 2 * lab.sizes.m * TOP * 3 * setup.intermediate * setup.hidden
    return Case("a mixture's experts", flops, contenders)


class _Setup:
    """What the contenders share."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.intermediate = INTERMEDIATE if lab.point.n is None else lab.point.n
        self.hidden = HIDDEN if lab.point.k is None else lab.point.k
        self.x = lab.rows(lab.sizes.m, self.hidden)
        shares, self.chosen = lab.rows(lab.sizes.m, EXPERTS, seed=3).float().softmax(-1).topk(TOP)
        self.shares = shares.to(lab.dtype)

    @cached_property
    def _source(self) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2 I, H] and down [E, H, I], normally distributed."""
        generator, device, dtype = torch.Generator().manual_seed(0), self.lab.device, self.lab.dtype
        shapes = ((EXPERTS, 2 * self.intermediate, self.hidden), (EXPERTS, self.hidden, self.intermediate))
        gate_up, down = (torch.randn(s, generator=generator).mul_(0.02).to(device, dtype) for s in shapes)
        return gate_up, down

    @cached_property
    def _stacks(self) -> tuple[QExperts, QExperts]:
        gate_up, down = (QExperts(quantize_stack(source)) for source in self._source)
        return gate_up, down

    def _ready(self, call: Callable[[], Tensor], dense: Callable[[int], tuple[Tensor, Tensor]]) -> Ready:
        """dense: an expert's weights as they were stored, in float64."""

        def error(y: Tensor) -> float:
            used = {int(e): dense(int(e)) for e in self.chosen.unique()}
            weights: Any = {e: tuple(_product(w) for w in pair) for e, pair in used.items()}
            wide = _loop(weights, self.x.double(), self.chosen, self.shares.double())
            return relative_error(y, wide)

        def run(_: int) -> Tensor:
            with torch.no_grad():
                return call()

        stored = sum(stack.weight.nbytes for stack in self._stacks)
        used = len(self.chosen.unique())
        moved = stored * used // EXPERTS + 2 * self.x.nbytes
        return Ready(run, error, LIMIT, moved, checks=1)

    def _ours(self, expert: int) -> tuple[Tensor, Tensor]:
        gate_up, down = (stack.weight.expert(expert).dequantize(torch.float32).double() for stack in self._stacks)
        return gate_up, down

    def ours(self) -> Ready:
        gate_up, down = self._stacks
        module = QExpertsModule(_Gated(), {"gate_up_proj": gate_up, "down_proj": down}).eval()
        return self._ready(lambda: module(self.x, self.chosen, self.shares), self._ours)

    def loop(self) -> Ready:
        pairs = [[QLinear.from_nf4(s.weight.expert(e), rank=0) for s in self._stacks] for e in range(EXPERTS)]
        layers: Any = pairs
        return self._ready(lambda: _loop(layers, self.x, self.chosen, self.shares), self._ours)

    def bnb(self) -> Ready:
        gate_up, down = self._source
        pairs: Any = [[as_limited(bnb_linear(s[e])) for s in (gate_up, down)] for e in range(EXPERTS)]

        def dense(expert: int) -> tuple[Tensor, Tensor]:
            stored = (bnb_pieces(*bnb_stored(layer)) for layer in pairs[expert])
            shapes = (gate_up.shape[1:], down.shape[1:])
            first, second = (decoded(p, s, torch.float32).double() for p, s in zip(stored, shapes, strict=True))
            return first, second

        return self._ready(lambda: _loop(pairs, self.x, self.chosen, self.shares), dense)


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ weight.T
