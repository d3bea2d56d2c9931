"""gpt2_forward: the LoRA paper's latency table: what an adapter costs when a model is served.

Hu et al. 2021 (arXiv 2106.09685), section 3, table 1: the forward pass of GPT-2 medium, which is also that of merged
LoRA, beside two designs of adapters with 11 million parameters. Here, too: LoRA left unmerged, and this package's NF4
layers with and without LoRA. Weights are random; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import QLinear, quantize_model
from ..case import OURS, Case, Contender, Ready, relative_error
from ..contenders.models import peft_lora
from ..contenders.weights import Lab, decoded

BASE, MERGED, UNMERGED = "dense base", "LoRA, merged", "LoRA, unmerged (PEFT)"
ADAPTER_H, ADAPTER_L = "adapters (Houlsby)", "adapter (Lin)"
NO_LORA = "qlora_kernels, no LoRA"
#: Of the paper's adapters.
ADAPTER_PARAMETERS = 11e6
# Tens of layers, each rounded to bf16.
LIMIT = 0.05


@dataclass(frozen=True)
class Size:
    """Of a GPT-2."""

    width: int
    layers: int
    heads: int
    adapter_parameters: float


SIZES = {"gpt2-medium": Size(1024, 24, 16, ADAPTER_PARAMETERS), "tiny": Size(64, 2, 2, 2e4)}


class Adapter(nn.Module):
    """h + up(f(down(h))): a bottleneck with biases and a skip connection.

    Args:
        width, inner: of h, and of the bottleneck.
        norm: whether a LayerNorm of its own comes first.
    """

    def __init__(self, width: int, inner: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        # GELU as Houlsby et al., ReLU as Lin et al.
        self.activation = F.relu if norm else F.gelu

    def forward(self, h: Tensor) -> Tensor:
        x = h if self.norm is None else self.norm(h)
        return h + self.up(self.activation(self.down(x)))


def inner_of(size: Size, houlsby: bool) -> int:
    """The bottleneck with which a design has the parameters that it should have, nearly."""
    each = size.adapter_parameters / (size.layers * (2 if houlsby else 1))
    return max(1, round((each - size.width * (1 if houlsby else 3)) / (2 * size.width + 1)))


def add_adapters(model: nn.Module, size: Size, houlsby: bool) -> nn.Module:
    """Puts adapters where a block's dropout is, which does nothing when a model is served: after the projection out of
    attention (Houlsby alone) and after the MLP's, before the residual connection."""
    generator = torch.Generator().manual_seed(7)
    for block in _blocks(model):
        places = [(block.attn, "resid_dropout")] if houlsby else []
        for module, name in [*places, (block.mlp, "dropout")]:
            adapter = Adapter(size.width, inner_of(size, houlsby), norm=not houlsby)
            for linear in (adapter.down, adapter.up):
                for parameter in linear.parameters():
                    parameter.data.normal_(0, 0.02, generator=generator)
            setattr(module, name, adapter)
    return model


def base_model(size: Size, length: int) -> nn.Module:
    """float32 GPT-2 with random weights, each Conv1D as the nn.Linear that computes the same."""
    from transformers import GPT2Config, GPT2Model
    from transformers.pytorch_utils import Conv1D

    config = GPT2Config(n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=max(length, 1024))
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = GPT2Model(config).eval().requires_grad_(False)
    torch.random.set_rng_state(state)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.utils.skip_init(nn.Linear, *module.weight.shape)
            linear.weight = nn.Parameter(module.weight.data.T.contiguous(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def _blocks(model: nn.Module) -> list[Any]:
    """A GPT-2's layers; what they consist of, torch's annotations don't tell."""
    return list(cast(Any, model).h)


def lora_of(size: Size, rank: int, layer: int) -> tuple[Tensor, Tensor]:
    """A [r, width] and B [3 width, r] of a layer's c_attn, float32; B is not zero, so that a result shows it."""
    generator = torch.Generator().manual_seed(100 + layer)
    A = torch.randn(rank, size.width, generator=generator) / size.width**0.5
    return A, torch.randn(3 * size.width, rank, generator=generator) * 0.02


def merge(model: nn.Module, size: Size, rank: int, scaling: float) -> nn.Module:
    """Adds LoRA's product to the weights of a dense model."""
    for i, block in enumerate(_blocks(model)):
        A, B = (factor.to(block.attn.c_attn.weight) for factor in lora_of(size, rank, i))
        block.attn.c_attn.weight.data.add_(B @ A, alpha=scaling)
    return model


def case(lab: Lab) -> Case:
    """All with the same base weights and the same tokens. LoRA sits on c_attn: queries, keys and values."""
    p, size = lab.sizes, SIZES[lab.sizes.model]
    setup = _Setup(lab)
    contenders = [
        Contender(OURS, lambda: setup.ours(lora=True)),
        Contender(NO_LORA, lambda: setup.ours(lora=False)),
        Contender(BASE, lambda: setup.dense(lambda model: model)),
        # What is merged in float32 and what is not compute the same.
        Contender(MERGED, lambda: setup.dense(setup.merged)),
        Contender(UNMERGED, lambda: setup.dense(setup.unmerged, setup.merged)),
        Contender(ADAPTER_H, lambda: setup.dense(lambda model: add_adapters(model, size, houlsby=True))),
        Contender(ADAPTER_L, lambda: setup.dense(lambda model: add_adapters(model, size, houlsby=False))),
    ]
    count = p.batch * p.m
    # Twelve width x width products a layer, and attention's two over the length.
    flops = 2 * count * size.layers * (12 * size.width**2 + 2 * p.m * size.width)
    return Case("forward of GPT-2", flops, contenders)


class _Setup:
    """What the contenders share: base weights and tokens."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.size, self.rank = lab, SIZES[lab.sizes.model], lab.sizes.rank
        shape = (lab.sizes.batch, lab.sizes.m)
        self.tokens = torch.randint(0, 50000, shape, generator=torch.Generator().manual_seed(1)).to(lab.device)
        self.base = base_model(self.size, lab.sizes.m)

    @torch.no_grad()
    def run(self, model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).last_hidden_state

    def ready(self, model: nn.Module, reference: nn.Module) -> Ready:
        """Held against a model in float32, over the first sequence."""
        exact = self.run(reference.to(self.lab.device, torch.float32), self.tokens[:1]).double()
        nbytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        return Ready(
            lambda _: self.run(model, self.tokens), lambda y: relative_error(y[:1], exact), LIMIT, nbytes, checks=1
        )

    def merged(self, model: nn.Module) -> nn.Module:
        return merge(model, self.size, self.rank, self.lab.scaling)

    def unmerged(self, model: nn.Module) -> nn.Module:
        alpha = self.lab.settings.alpha
        for i, block in enumerate(_blocks(model)):
            block.attn.c_attn = peft_lora(block.attn.c_attn, *lora_of(self.size, self.rank, i), alpha)
        return model.eval()

    # ---------------------------------------------------------------------------------------------- contenders

    def dense(
        self,
        change: Callable[[nn.Module], nn.Module],
        reference: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Ready:
        """A changed base, held against itself in float32, or against another change of it."""
        model = change(copy.deepcopy(self.base)).to(self.lab.device, self.lab.dtype)
        return self.ready(model, (reference or change)(copy.deepcopy(self.base)))

    def ours(self, lora: bool) -> Ready:
        model = copy.deepcopy(self.base).to(self.lab.device, self.lab.dtype)
        options = {"target_modules": ["c_attn"], "alpha": self.lab.settings.alpha, "progress": False}
        quantize_model(model, rank=self.rank if lora else 0, **options)
        for i, block in enumerate(_blocks(model) if lora else ()):
            layer = block.attn.c_attn
            with torch.no_grad():
                for adapter, value in zip((layer.lora_A, layer.lora_B), lora_of(self.size, self.rank, i)):
                    adapter["default"].copy_(value)
        return self.ready(model.eval(), self._exact(model, lora))

    def _exact(self, model: nn.Module, lora: bool) -> nn.Module:
        """The dense model that a quantized one stands for."""
        dense = copy.deepcopy(self.base)
        for name, layer in model.named_modules():
            if isinstance(layer, QLinear):
                weight = decoded(layer.weight.pieces, layer.weight.shape, torch.float32)
                cast(nn.Linear, dense.get_submodule(name)).weight.data.copy_(weight)
        return self.merged(dense) if lora else dense
