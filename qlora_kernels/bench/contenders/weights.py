"""The weights that all contenders work on, in each one's own form, made once and on demand."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import qlora_kernels

from ... import NF4Weight
from ...ops import Pieces
from ...ops.backends import reference
from ..case import Contender, Ready, Settings
from ..points import Coordinates, Point
from ..timing.machine import beyond, isa_in_use
from . import ggml_weights, int4_weights
from .adapter_tensors import AdapterTensors
from .int4_weights import Int4Weight
from .models import peft_lora
from .names import EQUAL_COPY

_AT_A_TIME = 1 << 22  # a multiple of a block's 64


class BnbState(Protocol):
    """What is used of bitsandbytes' QuantState, which describes a weight with double quantization."""

    shape: torch.Size
    absmax: Tensor
    code: Tensor
    offset: Tensor
    state2: BnbState


def bitsandbytes(module: str = "bitsandbytes") -> Any:
    """A module of bitsandbytes, which has no annotations to rely on and need not be installed.

    Raises:
        ModuleNotFoundError: where it is not.
    """
    return importlib.import_module(module)


class Lab:
    """Weights [n, k], inputs and adapters of a point, on the settings' device.

    All copies of a weight hold the same numbers in different memory, so one reference serves them all. A contender is
    held against float64 over *its own* dequantized weights: quantization itself is another case's business.

    Attributes:
        settings, point: as given.
        sizes: the point's coordinates, for an operation that needs them.
        device, dtype: of weights and inputs.
    """

    def __init__(self, settings: Settings, point: Point) -> None:
        self.settings, self.point, self.sizes = settings, point, Coordinates(point)
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, point.dtype)
        self._exact: dict[str, Tensor] = {}

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def free_bytes(self) -> float:
        """Bytes of the card that are free; of other devices, no limit."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else float("inf")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.sizes.n, self.sizes.k

    # ------------------------------------------------------------------------------------------------- weights

    @cached_property
    def source(self) -> Tensor:
        """The weight before quantization, in the point's dtype: normally distributed, as trained weights nearly are."""
        source = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        return source.to(self.device, self.dtype)

    def copied(self, first: Any, nbytes: int, clone: Any = None) -> list[Any]:
        """The first and as many clones as exceed the cache together."""
        clone = copy.deepcopy if clone is None else clone
        return [first, *(clone(first) for _ in range(self.settings.copies(nbytes) - 1))]

    @cached_property
    def ours(self) -> list[NF4Weight]:
        first = qlora_kernels.quantize(self.source).to(self.dtype)
        weights = self.copied(first, first.nbytes, clone_weight)
        row = self.rows(1, first.shape[1])
        for weight in weights:  # on a CPU, a weight's first use moves it to huge pages
            qlora_kernels.linear(row, weight)
        return weights

    @cached_property
    def dense(self) -> list[Tensor]:
        """What this package's weight dequantizes to, in the point's dtype."""
        first = self.ours[0].dequantize(self.dtype)
        return self.copied(first, first.nbytes, torch.clone)

    @cached_property
    def dense_f32(self) -> list[Tensor]:
        """The same in float32."""
        first = self.ours[0].dequantize(torch.float32)
        return self.copied(first, first.nbytes, torch.clone)

    @cached_property
    def int4(self) -> list[Int4Weight]:
        """torch's own 4-bit format."""
        first, self._exact["int4"] = int4_weights.quantized(self.source)
        return self.copied(first, first.nbytes, Int4Weight.clone)

    @cached_property
    def ggml(self) -> list[Tensor]:
        """ggml's Q4_0."""
        ggml_weights.check_set(isa_in_use())
        first = ggml_weights.quantized(self.source)
        self._exact["ggml"] = ggml_weights.decoded(first, self.shape)
        return self.copied(first, first.nbytes, torch.clone)

    @cached_property
    def bnb(self) -> list[tuple[Tensor, BnbState]]:
        """(packed, state) from bitsandbytes: NF4, block 64, double quantization."""
        quantize_4bit = bitsandbytes("bitsandbytes.functional").quantize_4bit
        first = quantize_4bit(self.source, quant_type="nf4", blocksize=64, compress_statistics=True)
        return self.copied(first, bnb_bytes(*first))

    def bnb_layer(self) -> nn.Linear:
        """bitsandbytes' own layer."""
        return bnb_linear(self.source)

    @cached_property
    def bnb_eval_layers(self) -> list[nn.Linear]:
        """In eval mode, and without gradients, the layer repacks its weight for a kernel of its own."""
        return self.copied(as_limited(self.bnb_layer().eval()), bnb_bytes(*self.bnb[0]))

    def peft_layers(self, training: bool) -> list[nn.Module]:
        """PEFT's LoRA layers over bitsandbytes' layers, adapters in the point's dtype with random A and B."""
        first = self._peft_layer().train(training)
        return self.copied(first, bnb_bytes(*self.bnb[0]))

    def _peft_layer(self) -> nn.Module:
        return peft_lora(as_limited(self.bnb_layer()), *self.adapter, self.settings.alpha)

    @cached_property
    def layers(self) -> list[qlora_kernels.QLinear]:
        """This package's layer, with the same adapter."""
        return [self._layer(weight) for weight in self.ours]

    def _layer(self, weight: NF4Weight) -> qlora_kernels.QLinear:
        rank = self.sizes.rank
        layer = qlora_kernels.QLinear.from_nf4(weight, rank=rank, alpha=self.settings.alpha, dtype=self.dtype)
        A, B = self.adapter
        with torch.no_grad():
            layer.lora_A["default"].copy_(A)
            layer.lora_B["default"].copy_(B)
        return layer

    @cached_property
    def adapter_tensors(self) -> AdapterTensors:
        """What optimizers work on."""
        return AdapterTensors(self.point, self.device)

    # -------------------------------------------------------------------------------------------------- inputs

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A [r, k] and B [n, r]; B is not zero, or its share of the result would go unseen."""
        n, k = self.shape
        generator = torch.Generator().manual_seed(1)
        A = torch.randn(self.sizes.rank, k, generator=generator) / k**0.5
        B = torch.randn(n, self.sizes.rank, generator=generator) * 0.1
        return A.to(self.device, self.dtype), B.to(self.device, self.dtype)

    def adapters(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of the adapter, for as many copies of the weight."""
        A, B = self.adapter
        return [(A.clone(), B.clone()) for _ in range(count)]

    @property
    def scaling(self) -> float:
        return self.settings.alpha / self.sizes.rank

    def rows(self, m: int, columns: int, seed: int = 2) -> Tensor:
        """Random [m, columns]."""
        rows = torch.randn(m, columns, generator=torch.Generator().manual_seed(seed))
        return rows.to(self.device, self.dtype)

    # -------------------------------------------------------------------------------------------------- others

    def card_copies(self, moved: Callable[[], int]) -> list[Contender]:
        """On a card, a copy of as many bytes as this package's call moves, half read and half written; elsewhere none.

        A card's copies come as close to its memory rate as anything does, at small sizes too. It is a kernel, which
        inverts the bits: torch hands a plain copy to the driver, and in a graph that is no kernel but a node for
        copies, with gaps of its own.
        """

        def prepare() -> Ready:
            first = torch.arange(moved() // 8, device=self.device, dtype=torch.int32)
            sources = self.copied(first, 2 * first.nbytes, torch.clone)
            return Ready(
                lambda i: sources[i].bitwise_not(),
                lambda copied: 0.0 if torch.equal(copied.bitwise_not(), first) else 1.0,
                0.5,
                2 * first.nbytes,
                len(sources),
            )

        return [Contender(EQUAL_COPY, prepare)] if self.cuda else []

    # ---------------------------------------------------------------------------------------------- references

    def exact(self, whose: str) -> Tensor:
        """The float64 weight that a contender's stored data stand for, decoded in plain torch."""
        if whose == "source":  # before quantization
            return self.source.double()
        if whose in ("int4", "ggml"):
            getattr(self, whose)  # made with the weight
        if whose not in self._exact:
            pieces = self.ours[0].pieces if whose == "ours" else bnb_pieces(*self.bnb[0])
            self._exact[whose] = decoded(pieces, self.shape, torch.float32).double()
        return self._exact[whose]

    def bytes_of(self, whose: str) -> int:
        """Bytes of one stored weight."""
        if whose == "ours":
            return self.ours[0].nbytes
        if whose == "dense":
            return self.sizes.n * self.sizes.k * self.dtype.itemsize
        if whose == "dense_f32":
            return self.sizes.n * self.sizes.k * 4
        if whose in ("int4", "ggml"):
            return getattr(self, whose)[0].nbytes
        if whose == "bnb":
            return bnb_bytes(*self.bnb[0])
        # Repacked: constants are no longer nested, and are stored in bf16.
        packed, state = bnb_stored(self.bnb_eval_layers[0])
        return packed.nbytes + state.absmax.nbytes


def decoded(pieces: Pieces, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The dense weight of ``shape`` [n, k] that stored data stand for, in plain torch alone, on their device.

    Some millions of weights at a time: plain torch takes 30 bytes for each.
    """
    n, k = shape
    packed, scales = pieces[0], reference.decode_absmax(pieces)
    dense = torch.empty(n * k, dtype=dtype, device=packed.device)
    for begin in range(0, n * k, _AT_A_TIME):
        end = min(begin + _AT_A_TIME, n * k)
        piece = (packed[begin // 2 : -(-end // 2)], scales[begin // 64 : -(-end // 64)], None, None, None)
        dense[begin:end] = reference.decode(piece, 1, end - begin, dtype)[0]
    return dense.view(n, k)


def bnb_bytes(packed: Tensor, state: BnbState) -> int:
    """Of a weight that bitsandbytes stores."""
    return packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def bnb_pieces(packed: Tensor, state: BnbState) -> Pieces:
    """What bitsandbytes stores, as the pieces of an NF4Weight."""
    second = state.state2
    return packed.flatten(), state.absmax, second.absmax, state.offset.reshape(1).float(), second.code.float()


def clone_weight(weight: NF4Weight) -> NF4Weight:
    """The same numbers in other memory."""
    nested_absmax, offset, table = (None if piece is None else piece.clone() for piece in weight.pieces[2:])
    return replace(
        weight,
        packed=weight.packed.clone(),
        absmax=weight.absmax.clone(),
        nested_absmax=nested_absmax,
        nested_offset=offset,
        nested_table=table,
    )


def bnb_stored(layer: nn.Linear) -> tuple[Tensor, BnbState]:
    """(packed, state) of bitsandbytes' layer."""
    weight: Any = layer.weight  # a Params4bit
    return weight.data, weight.quant_state


def as_limited(layer: nn.Linear) -> nn.Linear:
    """A layer of bitsandbytes that does what it would on a processor with no more than the set in use.

    It asks the processor itself whether there is AVX-512 BF16, for its eval mode; its decoding cannot be limited.
    """
    if beyond("avx512_bf16", isa_in_use()) and hasattr(layer, "support_avx512bf16_for_cpu"):
        cast(Any, layer).support_avx512bf16_for_cpu = False
    return layer


def bnb_linear(weight: Tensor) -> nn.Linear:
    """bitsandbytes' layer over a weight [n, k], computing in the weight's dtype and on its device."""
    modules = bitsandbytes("bitsandbytes.nn")
    n, k = weight.shape
    options = {"compress_statistics": True, "quant_type": "nf4"}
    with torch.device("meta"):
        layer = modules.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, **options)
    layer.weight = modules.Params4bit(weight, requires_grad=False, module=layer, **options)
    return layer.to(weight.device)  # where it quantizes
