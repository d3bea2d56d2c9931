"""block_step: a training step of one Llama block: forward, backward, and the adapters' optimizer."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

import qlora_kernels
from qlora_kernels import PagedAdamW, QLinear, quantize_model

from ..case import OURS, Case, Contender, Ready, WrongResult, largest_error
from ..contenders.models import Block, PlainLora, peft_adapter, peft_lora
from ..contenders.names import DENSE, PEFT
from ..contenders.weights import BnbState, Lab, bitsandbytes, bnb_bytes, bnb_linear, bnb_pieces, bnb_stored, decoded
from ..points import MODELS

# Seven products and an attention, each rounded to bf16, there and back.
LIMIT = 0.05
# A step of the optimizer: parameters are rounded to bf16, and some of these optimizers let weights decay.
STEP_LIMIT = 0.1
#: So small that a step changes nothing; and the rate of the step that is verified.
LR, VERIFIED_LR = 1e-7, 1e-2


@dataclass
class Trained:
    """A block that is trained.

    Attributes:
        block: with adapters.
        adapters: A and B of each linear layer.
        optimizer: over the adapters.
    """

    block: nn.Module
    adapters: list[Tensor]
    optimizer: torch.optim.Optimizer

    def gradients(self, x: Tensor, dy: Tensor) -> Tensor:
        """Forward and backward; returns y."""
        x.grad = None
        y = self.block(x)
        y.backward(dy)
        return y.detach()

    def step(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bitsandbytes: on a CPU its paged optimizers are not
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Of the moments, which are there after the first step."""
        states = (t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor))
        return sum(t.nbytes for t in states if t.numel() > 1)

    def verify(self, x: Tensor, dy: Tensor, wanted: Sequence[Tensor]) -> None:
        """Holds the adapters' gradients, and what the optimizer makes of them, against the truth.

        The first step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) goes lr * g / (|g| + eps) down.

        Raises:
            WrongResult: with the error.
        """
        self.gradients(x, dy)
        gradients = [_gradient(a).double() for a in self.adapters]
        error = largest_error(gradients, wanted)
        if not error <= LIMIT:
            raise WrongResult(f"wrong result: error {error:.2e} of the adapters' gradients, allowed {LIMIT:.0e}")
        before = [a.detach().clone() for a in self.adapters]
        for group in self.optimizer.param_groups:
            group["lr"] = VERIFIED_LR
        self.step()
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        moves = [b.double() - a.detach().double() for a, b in zip(self.adapters, before, strict=True)]
        error = largest_error(moves, [VERIFIED_LR * g / (g.abs() + 1e-8) for g in gradients])
        if not error <= STEP_LIMIT:
            raise WrongResult(f"wrong result: error {error:.2e} of the optimizer's step, allowed {STEP_LIMIT:.0e}")
        with torch.no_grad():
            for a, value in zip(self.adapters, before, strict=True):
                a.copy_(value)


def case(lab: Lab) -> Case:
    """All train the same adapters on the same input; they differ in how W is stored and multiplied with."""
    setup = _Setup(lab)
    contenders = [Contender(OURS, setup.ours), Contender(DENSE, setup.dense), Contender(PEFT, setup.peft)]
    # Each product there and back, the adapter's three times; the attention's own products are few.
    m, rank, linears = lab.sizes.m, lab.sizes.rank, MODELS[lab.sizes.model].linears.values()
    flops = sum(4 * m * n * k + 6 * m * rank * (n + k) for n, k in linears)
    return Case("training step of a block", flops, contenders)


class _Setup:
    """What the contenders share: input, adapters, and the truth over each kind of stored weights."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.sizes = lab, lab.sizes
        hidden = MODELS[self.sizes.model].hidden
        self.x = lab.rows(self.sizes.m, hidden)[None].requires_grad_()
        self.dy = lab.rows(self.sizes.m, hidden, seed=3)[None]
        self._truths: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def block(self, weights: dict[str, Tensor] | None = None) -> Block:
        return Block(self.sizes.model, self.lab.dtype, self.lab.device, weights)

    def adapter_of(self, name: str, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """A and B of a layer, the same for everyone."""
        n, k = linear.weight.shape
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        A = torch.randn(self.sizes.rank, k, generator=generator) / k**0.5
        B = torch.randn(n, self.sizes.rank, generator=generator) * 0.1
        return A.to(self.lab.device, self.lab.dtype), B.to(self.lab.device, self.lab.dtype)

    @cached_property
    def our_weights(self) -> dict[str, Tensor]:
        """What this package's weights stand for: the dense block's, too, whether or not this package takes part."""
        weights = {}
        for name, linear in self.block().linears().items():
            weight = qlora_kernels.quantize(linear.weight.data)
            weights[name] = decoded(weight.pieces, weight.shape, self.lab.dtype)
        return weights

    def truth(self, whose: str, weights: Callable[[], dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """(y, dx), and the gradients of each A and B, over what is stored. In float32: float64 takes too many bytes."""
        if whose not in self._truths:
            wide = {name: weight.float() for name, weight in weights().items()}
            block = Block(self.sizes.model, torch.float32, self.lab.device, wide)
            layers = []
            for name, linear in block.linears().items():
                A, B = (matrix.float() for matrix in self.adapter_of(name, linear))
                layers.append(PlainLora(linear.weight.data, A, B, self.lab.scaling))
                block.set_submodule(name, layers[-1])
            x = self.x.detach().float().requires_grad_()
            y = block(x)
            adapters = [matrix for layer in layers for matrix in (layer.A, layer.B)]
            dx, *gradients = torch.autograd.grad(y, (x, *adapters), self.dy.float())
            self._truths[whose] = [y.detach().double(), dx.double()], [g.double() for g in gradients]
        return self._truths[whose]

    def ready(
        self,
        block: Block,
        adapters_of: Callable[[Block], list[Tensor]],
        optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer],
        weight_bytes: int,
        wanted: tuple[list[Tensor], list[Tensor]],
    ) -> Ready:
        """Copies take turns where one would stay in the cache, as a model's blocks do."""
        settings = self.lab.settings
        count = 1 if weight_bytes > settings.cache_bytes else settings.copies(weight_bytes)
        blocks = [block.train(), *(copy.deepcopy(block).train() for _ in range(count - 1))]
        trained = [Trained(b, adapters_of(b), optimizer_of(adapters_of(b))) for b in blocks]
        for one in trained:
            one.verify(self.x, self.dy, wanted[1])

        def call(i: int) -> list[Tensor]:
            y = trained[i].gradients(self.x, self.dy)
            trained[i].step()
            return [y, _gradient(self.x)]

        size = sum(a.nbytes for a in trained[0].adapters)
        states = trained[0].state_bytes()
        parts = {"weights": weight_bytes, "adapters": size, "gradients": size, "optimizer states": states}
        # Weights once each way; an adapter's step reads and writes it, reads its gradient, and the moments both ways.
        total = 2 * weight_bytes + 3 * size + 2 * states
        return Ready(call, lambda results: largest_error(results, wanted[0]), LIMIT, total, count, parts=parts)

    # ---------------------------------------------------------------------------------------------- contenders

    def ours(self) -> Ready:
        block = self.block()
        names = block.linears()
        quantize_model(block, rank=self.sizes.rank, alpha=self.lab.settings.alpha, progress=False)

        def adapters_of(block: Block) -> list[Tensor]:
            layers = [_quantized(block, name) for name in names]
            return [matrix["default"] for layer in layers for matrix in (layer.lora_A, layer.lora_B)]

        values = [matrix for name, linear in names.items() for matrix in self.adapter_of(name, linear)]
        with torch.no_grad():
            for parameter, value in zip(adapters_of(block), values, strict=True):
                parameter.copy_(value)
        nbytes = sum(_quantized(block, name).weight.nbytes for name in names)
        wanted = self.truth("ours", lambda: self.our_weights)
        return self.ready(block, adapters_of, lambda q: PagedAdamW(q, lr=LR), nbytes, wanted)

    def dense(self) -> Ready:
        weights = self.our_weights
        block = self.block(weights)
        for name, linear in block.linears().items():
            block.set_submodule(name, peft_lora(linear, *self.adapter_of(name, linear), self.lab.settings.alpha))
        options = {"lr": LR, "fused": True, "capturable": self.lab.device.type == "cuda"}
        nbytes = sum(w.nbytes for w in weights.values())
        wanted = self.truth("ours", lambda: weights)
        return self.ready(block, _peft_adapters, lambda q: torch.optim.AdamW(q, **options), nbytes, wanted)

    def peft(self) -> Ready:
        optim = bitsandbytes("bitsandbytes.optim")
        block = self.block()
        stored: dict[str, tuple[Tensor, BnbState]] = {}
        for name, linear in block.linears().items():
            layer = bnb_linear(linear.weight.data)
            stored[name] = bnb_stored(layer)
            block.set_submodule(name, peft_lora(layer, *self.adapter_of(name, linear), self.lab.settings.alpha))
        nbytes = sum(bnb_bytes(*one) for one in stored.values())

        def bnb_weights() -> dict[str, Tensor]:
            return {name: decoded(bnb_pieces(*one), one[1].shape, self.lab.dtype) for name, one in stored.items()}

        def optimizer_of(adapters: list[Tensor]) -> torch.optim.Optimizer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return optim.PagedAdamW32bit(adapters, lr=LR)

        return self.ready(block, _peft_adapters, optimizer_of, nbytes, self.truth("bnb", bnb_weights))


def _gradient(tensor: Tensor) -> Tensor:
    """Of a tensor that a backward pass has reached."""
    assert tensor.grad is not None
    return tensor.grad


def _quantized(block: Block, name: str) -> QLinear:
    """A linear layer of a block after :func:`qlora_kernels.quantize_model`."""
    return cast(QLinear, block.get_submodule(name))


def _peft_adapters(block: Block) -> list[Tensor]:
    layers = [module for module in block.modules() if hasattr(module, "lora_A")]
    return [matrix for layer in layers for matrix in peft_adapter(layer)]
