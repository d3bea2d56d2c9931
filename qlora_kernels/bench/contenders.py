"""The weights that all contenders work on, in each one's own form, made once and on demand."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import qlora_kernels
from qlora_kernels import reference

from .adapter_tensors import AdapterTensors
from .common import Settings

DENSE = "torch dense bf16"
BNB = "bitsandbytes"
BNB_EVAL = "bitsandbytes, eval-mode layer"
PEFT = "PEFT + bitsandbytes"
PEFT_EVAL = "PEFT + bitsandbytes, eval mode"
COPY = "plain copy"
FUSED = "torch fused"
FOREACH = "torch foreach"
#: A copy of as many bytes as this package's call must move, half read and half written.
EQUAL_COPY = "copy of as many bytes"
#: On a card: quantize() as users call it. It looks at its result, and so waits for the device.
CHECKED = "qlora_kernels, checked"


class Lab:
    """Weights [n, k] and inputs.

    All copies of a weight hold the same numbers in different memory, so one reference serves them all. A contender is
    held against float64 over *its own* dequantized weights: quantization itself is another case's business.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._exact: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------------------- weights

    @cached_property
    def source(self) -> Tensor:
        """The float32 weight before quantization: normally distributed, as trained weights nearly are."""
        s = self.settings
        return torch.randn(s.n, s.k, generator=torch.Generator().manual_seed(0)).mul_(0.02)

    @cached_property
    def ours(self) -> list[qlora_kernels.NF4Weight]:
        return [qlora_kernels.quantize(self.source).to(torch.bfloat16) for _ in range(self.settings.copies)]

    @cached_property
    def dense(self) -> list[Tensor]:
        """bf16, what this package's weight dequantizes to."""
        return [weight.dequantize(torch.bfloat16) for weight in self.ours]

    @cached_property
    def bnb(self) -> list[tuple[Tensor, Any]]:
        """(packed, state) from bitsandbytes: NF4, block 64, double quantization."""
        from bitsandbytes.functional import quantize_4bit

        weight = self.source.to(torch.bfloat16)
        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
        return [quantize_4bit(weight, **options) for _ in range(self.settings.copies)]

    def bnb_layer(self) -> nn.Module:
        """bitsandbytes' own layer."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        s = self.settings
        layer = Linear4bit(
            s.k, s.n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
        )
        weight = self.source.to(torch.bfloat16)
        layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
        return layer.to("cpu")  # where it quantizes

    @cached_property
    def bnb_eval_layers(self) -> list[nn.Module]:
        """In eval mode, and without gradients, the layer repacks its weight for a kernel of its own."""
        return [self.bnb_layer().eval() for _ in range(self.settings.copies)]

    def peft_models(self, training: bool) -> list[nn.Module]:
        """PEFT models, each a LoRA over one bitsandbytes layer, adapters in bf16 with random A and B."""
        return self._peft_training if training else self._peft_eval

    @cached_property
    def _peft_training(self) -> list[nn.Module]:
        return [self._peft_model().train() for _ in range(self.settings.copies)]

    @cached_property
    def _peft_eval(self) -> list[nn.Module]:
        return [self._peft_model().eval() for _ in range(self.settings.copies)]

    def _peft_model(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        class One(nn.Module):
            def __init__(self, linear: nn.Module) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x)

        s = self.settings
        config = LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, target_modules=["linear"])
        model = get_peft_model(One(self.bnb_layer()), config, autocast_adapter_dtype=False)
        layer = model.base_model.model.linear
        A, B = self.adapter
        for module, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
            module.weight = nn.Parameter(value.clone())
        return model

    @cached_property
    def layers(self) -> list[qlora_kernels.QLinear]:
        """This package's layer, with the same adapter."""
        return [self._layer(weight) for weight in self.ours]

    def _layer(self, weight: qlora_kernels.NF4Weight) -> qlora_kernels.QLinear:
        s = self.settings
        layer = qlora_kernels.QLinear.from_nf4(weight, rank=s.rank, alpha=s.alpha, dtype=torch.bfloat16)
        A, B = self.adapter
        with torch.no_grad():
            layer.lora_A["default"].copy_(A)
            layer.lora_B["default"].copy_(B)
        return layer

    @cached_property
    def adapter_tensors(self) -> AdapterTensors:
        """What optimizers work on."""
        return AdapterTensors(self.settings)

    # -------------------------------------------------------------------------------------------------- inputs

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A [r, k] and B [n, r], bf16; B is not zero, or its share of the result would go unseen."""
        s = self.settings
        generator = torch.Generator().manual_seed(1)
        A = torch.randn(s.rank, s.k, generator=generator) / s.k**0.5
        B = torch.randn(s.n, s.rank, generator=generator) * 0.1
        return A.to(torch.bfloat16), B.to(torch.bfloat16)

    @property
    def scaling(self) -> float:
        return self.settings.alpha / self.settings.rank

    def rows(self, m: int, columns: int, seed: int = 2) -> Tensor:
        """Random bf16 [m, columns]."""
        return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)

    # ---------------------------------------------------------------------------------------------- references

    def exact(self, whose: str) -> Tensor:
        """The float64 weight that a contender's stored data stand for, decoded in plain torch."""
        if whose not in self._exact:
            s = self.settings
            pieces = self.ours[0].pieces if whose == "ours" else self._bnb_pieces()
            self._exact[whose] = reference.decode(pieces, s.n, s.k, torch.float32).double()
        return self._exact[whose]

    def _bnb_pieces(self) -> tuple[Tensor, ...]:
        packed, state = self.bnb[0]
        second = state.state2
        return packed.flatten(), state.absmax, second.absmax, state.offset.reshape(1), second.code

    def bytes_of(self, whose: str) -> int:
        """Bytes of one stored weight."""
        if whose == "ours":
            return self.ours[0].nbytes
        if whose == "dense":
            return self.dense[0].nbytes
        if whose == "bnb":
            packed, state = self.bnb[0]
            return packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        # Repacked: constants are no longer nested, and are stored in bf16.
        layer = self.bnb_eval_layers[0]
        return layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
