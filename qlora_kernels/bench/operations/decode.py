"""decode: one token through the seven linear layers of a block, with adapters; on a card by graph replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_kernels

from ..case import OURS, Case, Contender, Ready, largest_error
from ..contenders.models import dense_weights, peft_lora, plain_lora
from ..contenders.names import DENSE, PEFT, PEFT_EVAL
from ..contenders.weights import Lab, bnb_bytes, bnb_linear, bnb_pieces, clone_weight, decoded
from ..points import MODELS

LIMIT = 0.01


def case(lab: Lab) -> Case:
    """Each layer has an input of its own, so that nothing but the products is measured, and no error adds up."""
    p = lab.point
    shapes = list(MODELS[p.model].linears.values())
    inputs = [lab.rows(p.m, k, seed=10 + i) for i, (_, k) in enumerate(shapes)]
    generator = torch.Generator().manual_seed(1)
    adapters = [
        tuple(
            (torch.randn(shape, generator=generator) * scale).to(lab.device, lab.dtype)
            for shape, scale in (((p.rank, k), k**-0.5), ((n, p.rank), 0.1))
        )
        for n, k in shapes
    ]
    sources = dense_weights(shapes, lab.dtype, lab.device)
    ours_first = [qlora_kernels.quantize(w).to(lab.dtype) for w in sources]
    small = sum(A.nbytes + B.nbytes for A, B in adapters) + sum(p.m * (n + k) for n, k in shapes) * lab.dtype.itemsize

    def exact(weights: Sequence[Tensor]) -> list[Tensor]:
        """In float32, whose error is a thousandth of bf16's: float64 weights of a whole block are too many bytes."""
        found = []
        for x, W, (A, B) in zip(inputs, weights, adapters, strict=True):
            x, A, B = x.float(), A.float(), B.float()
            found.append((x @ W.float().T + lab.scaling * (x @ A.T) @ B.T).double())
        return found

    def ready(call: Callable[[int], list[Tensor]], wanted: list[Tensor], nbytes: int, copies: int) -> Ready:
        @torch.no_grad()
        def quiet(i: int) -> list[Tensor]:
            return call(i)

        return Ready(quiet, lambda ys: largest_error(ys, wanted), LIMIT, nbytes + small, copies)

    def of_layers(copies: list[list[nn.Module]], wanted: list[Tensor], nbytes: int) -> Ready:
        def call(i: int) -> list[Tensor]:
            return [layer(x) for layer, x in zip(copies[i], inputs)]

        with torch.no_grad():
            for i in range(len(copies)):  # bitsandbytes repacks in eval mode
                call(i)
        return ready(call, wanted, nbytes, len(copies))

    wanted_of_ours: list[list[Tensor]] = []

    def ours_wanted() -> list[Tensor]:
        if not wanted_of_ours:
            wanted_of_ours.append(exact([decoded(w.pieces, *w.shape, torch.float32) for w in ours_first]))
        return wanted_of_ours[0]

    def ours() -> Ready:
        nbytes = sum(w.nbytes for w in ours_first)

        def layers(weights: Sequence[qlora_kernels.NF4Weight]) -> list[nn.Module]:
            made = []
            for weight, (A, B) in zip(weights, adapters, strict=True):
                layer = qlora_kernels.QLinear.from_nf4(
                    weight, rank=p.rank, alpha=lab.settings.alpha, dtype=lab.dtype
                ).eval()
                with torch.no_grad():
                    layer.lora_A["default"].copy_(A)
                    layer.lora_B["default"].copy_(B)
                made.append(layer)
            return made

        weights = lab.copied(ours_first, nbytes, lambda first: [clone_weight(w) for w in first])
        return of_layers([layers(one) for one in weights], ours_wanted(), nbytes)

    def dense() -> Ready:
        first = [(w.dequantize(lab.dtype), A, B) for w, (A, B) in zip(ours_first, adapters, strict=True)]
        nbytes = sum(W.nbytes for W, _, _ in first)
        layers = lab.copied(first, nbytes)

        def call(i: int) -> list[Tensor]:
            return [
                plain_lora(F.linear(x, W), x, A, B, lab.scaling) for x, (W, A, B) in zip(inputs, layers[i], strict=True)
            ]

        return ready(call, ours_wanted(), nbytes, len(layers))

    def peft(training: bool) -> Callable[[], Ready]:
        def prepare() -> Ready:
            layers = [bnb_linear(w) for w in sources]
            stored = [(layer.weight.data, layer.weight.quant_state) for layer in layers]
            wanted = exact([decoded(bnb_pieces(*one), *one[1].shape, torch.float32) for one in stored])
            nbytes = sum(bnb_bytes(*one) for one in stored)
            first = [
                peft_lora(layer, *adapter, lab.settings.alpha).train(training)
                for layer, adapter in zip(layers, adapters)
            ]
            return of_layers(lab.copied(first, nbytes), wanted, nbytes)

        return prepare

    contenders = [
        Contender(OURS, ours),
        Contender(DENSE, dense),
        Contender(PEFT, peft(training=True)),
        *([] if lab.cuda else [Contender(PEFT_EVAL, peft(training=False))]),
    ]
    flops = sum(2 * p.m * (n * k + p.rank * (n + k)) for n, k in shapes)
    return Case("decode, seven layers of a block", flops, contenders)
