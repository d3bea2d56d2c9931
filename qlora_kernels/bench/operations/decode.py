"""decode: one token through the seven linear layers of a block, with adapters; on a card by graph replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_kernels

from ..case import OURS, Case, Contender, Ready, largest_error
from ..contenders.models import dense_weights, peft_lora, plain_lora
from ..contenders.names import DENSE, PEFT, PEFT_EVAL
from ..contenders.weights import Lab, as_limited, bnb_bytes, bnb_linear, bnb_pieces, bnb_stored, clone_weight, decoded
from ..points import MODELS

LIMIT = 0.01


def case(lab: Lab) -> Case:
    """Each layer has an input of its own, so that nothing but the products is measured, and no error adds up."""
    setup = _Setup(lab)
    contenders = [
        Contender(OURS, setup.ours),
        Contender(DENSE, setup.dense),
        Contender(PEFT, lambda: setup.peft(training=True)),
        *([] if lab.cuda else [Contender(PEFT_EVAL, lambda: setup.peft(training=False))]),
    ]
    m, rank = lab.sizes.m, lab.sizes.rank
    flops = sum(2 * m * (n * k + rank * (n + k)) for n, k in setup.shapes)
    return Case("decode, seven layers of a block", flops, contenders)


class _Setup:
    """What the contenders share: inputs, adapters and weights of the seven layers."""

    def __init__(self, lab: Lab) -> None:
        self.lab, p = lab, lab.sizes
        self.shapes = list(MODELS[p.model].linears.values())
        self.inputs = [lab.rows(p.m, k, seed=10 + i) for i, (_, k) in enumerate(self.shapes)]
        generator = torch.Generator().manual_seed(1)

        def matrix(rows: int, columns: int, scale: float) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * scale).to(lab.device, lab.dtype)

        self.adapters = [(matrix(p.rank, k, k**-0.5), matrix(n, p.rank, 0.1)) for n, k in self.shapes]
        self.sources = dense_weights(self.shapes, lab.dtype, lab.device)
        self.quantized = [qlora_kernels.quantize(w).to(lab.dtype) for w in self.sources]

    @property
    def small_bytes(self) -> int:
        """Of adapters, inputs and outputs."""
        m, itemsize = self.lab.sizes.m, self.lab.dtype.itemsize
        rows = sum(m * (n + k) for n, k in self.shapes) * itemsize
        return sum(A.nbytes + B.nbytes for A, B in self.adapters) + rows

    def exact(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """In float32, whose error is a thousandth of bf16's: float64 weights of a whole block are too many bytes."""
        outputs = []
        for x, W, (A, B) in zip(self.inputs, weights, self.adapters, strict=True):
            x, A, B = x.float(), A.float(), B.float()
            outputs.append((x @ W.float().T + self.lab.scaling * (x @ A.T) @ B.T).double())
        return outputs

    @cached_property
    def our_outputs(self) -> list[Tensor]:
        """What this package's weights should give, and the dense ones that they stand for."""
        return self.exact([decoded(w.pieces, w.shape, torch.float32) for w in self.quantized])

    def ready(self, call: Callable[[int], list[Tensor]], wanted: list[Tensor], nbytes: int, copies: int) -> Ready:
        @torch.no_grad()
        def quiet(i: int) -> list[Tensor]:
            return call(i)

        return Ready(quiet, lambda ys: largest_error(ys, wanted), LIMIT, nbytes + self.small_bytes, copies)

    def layers_ready(self, copies: list[list[nn.Module]], wanted: list[Tensor], nbytes: int) -> Ready:
        def call(i: int) -> list[Tensor]:
            return [layer(x) for layer, x in zip(copies[i], self.inputs)]

        with torch.no_grad():
            for i in range(len(copies)):  # bitsandbytes repacks in eval mode
                call(i)
        return self.ready(call, wanted, nbytes, len(copies))

    # ---------------------------------------------------------------------------------------------- contenders

    def ours(self) -> Ready:
        nbytes = sum(w.nbytes for w in self.quantized)
        weights = self.lab.copied(self.quantized, nbytes, lambda first: [clone_weight(w) for w in first])
        return self.layers_ready([self._layers(one) for one in weights], self.our_outputs, nbytes)

    def _layers(self, weights: Sequence[qlora_kernels.NF4Weight]) -> list[nn.Module]:
        options = {"rank": self.lab.sizes.rank, "alpha": self.lab.settings.alpha, "dtype": self.lab.dtype}
        layers = []
        for weight, (A, B) in zip(weights, self.adapters, strict=True):
            layer = qlora_kernels.QLinear.from_nf4(weight, **options).eval()
            with torch.no_grad():
                layer.lora_A["default"].copy_(A)
                layer.lora_B["default"].copy_(B)
            layers.append(layer)
        return layers

    def dense(self) -> Ready:
        first = [(w.dequantize(self.lab.dtype), A, B) for w, (A, B) in zip(self.quantized, self.adapters, strict=True)]
        nbytes = sum(W.nbytes for W, _, _ in first)
        layers = self.lab.copied(first, nbytes)

        def call(i: int) -> list[Tensor]:
            return [
                plain_lora(F.linear(x, W), x, A, B, self.lab.scaling)
                for x, (W, A, B) in zip(self.inputs, layers[i], strict=True)
            ]

        return self.ready(call, self.our_outputs, nbytes, len(layers))

    def peft(self, training: bool) -> Ready:
        layers = [as_limited(bnb_linear(w)) for w in self.sources]
        stored = [bnb_stored(layer) for layer in layers]
        wanted = self.exact([decoded(bnb_pieces(*one), one[1].shape, torch.float32) for one in stored])
        nbytes = sum(bnb_bytes(*one) for one in stored)
        alpha = self.lab.settings.alpha
        first = [peft_lora(layer, *adapter, alpha).train(training) for layer, adapter in zip(layers, self.adapters)]
        return self.layers_ready(self.lab.copied(first, nbytes), wanted, nbytes)
