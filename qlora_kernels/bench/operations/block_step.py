"""block_step: a training step of one Llama block: forward, backward, and the adapters' optimizer."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from qlora_kernels import PagedAdamW, quantize_model

from ..common import OURS, Case, Contender, Ready, relative_error
from ..contenders import DENSE, PEFT, Lab, bnb_linear
from ..models import Block, peft_lora
from ..points import MODELS

# Seven products and an attention, each rounded to bf16, there and back.
LIMIT = 0.05
#: So small that steps leave the work as it is.
LR = 1e-7


def case(lab: Lab) -> Case:
    """All train the same adapters on the same input, and differ in what W is stored in and who multiplies with it."""
    p = lab.point
    shape = MODELS[p.model]
    x = lab.rows(p.m, shape.hidden)[None].requires_grad_()
    dy = lab.rows(p.m, shape.hidden, seed=3)[None]

    def adapter_of(n: int, k: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n + k)
        A = torch.randn(p.rank, k, generator=generator) / k**0.5
        B = torch.randn(n, p.rank, generator=generator) * 0.1
        return A.to(lab.device, lab.dtype), B.to(lab.device, lab.dtype)

    def lora_over(block: Block) -> Block:
        for name, linear in block.linears().items():
            block.set_submodule(name, peft_lora(linear, *adapter_of(*linear.weight.shape), lab.settings.alpha))
        return block

    exact: dict[str, tuple[Tensor, Tensor]] = {}
    decoded: dict[str, Tensor] = {}  # what this package's weights stand for: the dense block's, too

    def reference(whose: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """y and dx in float32 over the dequantized weights with the adapter merged."""
        if whose not in exact:
            merged = {}
            for name, weight in weights.items():
                A, B = (part.float() for part in adapter_of(*weight.shape))
                merged[name] = torch.addmm(weight.float(), B, A, alpha=lab.scaling)
            block = Block(p.model, torch.float32, lab.device, merged)
            wide = x.detach().float().requires_grad_()
            y = block(wide)
            (dx,) = torch.autograd.grad(y, wide, dy.float())
            exact[whose] = (y.detach().double(), dx.double())
        return exact[whose]

    def ready(
        block: Block, optimizer: torch.optim.Optimizer, weight_bytes: int, wanted: tuple[Tensor, Tensor]
    ) -> Ready:
        adapters = [q for q in block.parameters() if q.requires_grad]

        def call(_: int) -> tuple[Tensor, Tensor]:
            x.grad = None
            y = block(x)
            y.backward(dy)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # bitsandbytes: on a CPU its paged optimizers are not
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return y.detach(), x.grad

        size = sum(q.numel() for q in adapters)
        parts = {
            "weights": weight_bytes,
            "adapters": size * lab.dtype.itemsize,
            "gradients": size * lab.dtype.itemsize,
            "optimizer states": 2 * 4 * size,
        }
        # Weights once each way; an adapter's step reads and writes it, reads its gradient, and both moments both ways.
        total = 2 * weight_bytes + size * (3 * lab.dtype.itemsize + 16)
        return Ready(call, lambda found: max(map(relative_error, found, wanted)), LIMIT, total, parts=parts)

    def ours() -> Ready:
        block = Block(p.model, lab.dtype, lab.device)
        names = block.linears()
        quantize_model(block, rank=p.rank, alpha=lab.settings.alpha, progress=False)
        layers = {name: block.get_submodule(name) for name in names}
        with torch.no_grad():
            for layer in layers.values():
                A, B = adapter_of(layer.out_features, layer.in_features)
                layer.lora_A["default"].copy_(A)
                layer.lora_B["default"].copy_(B)
        weights = {name: layer.weight for name, layer in layers.items()}
        decoded.update({name: w.dequantize(lab.dtype) for name, w in weights.items()})
        wanted = reference("ours", decoded)
        optimizer = PagedAdamW([q for q in block.parameters() if q.requires_grad], lr=LR)
        return ready(block.train(), optimizer, sum(w.nbytes for w in weights.values()), wanted)

    def dense() -> Ready:
        nbytes = sum(w.nbytes for w in decoded.values())
        block = lora_over(Block(p.model, lab.dtype, lab.device, decoded)).train()
        optimizer = torch.optim.AdamW([q for q in block.parameters() if q.requires_grad], lr=LR, fused=True)
        return ready(block, optimizer, nbytes, exact["ours"])

    def peft() -> Ready:
        from bitsandbytes import optim
        from bitsandbytes.functional import dequantize_4bit

        block = Block(p.model, lab.dtype, lab.device)
        weights, nbytes = {}, 0
        for name, linear in block.linears().items():
            layer = bnb_linear(linear.weight.data)
            state = layer.weight.quant_state
            weights[name] = dequantize_4bit(layer.weight.data, state)
            nbytes += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
            adapter = adapter_of(*linear.weight.shape)
            block.set_submodule(name, peft_lora(layer, *adapter, lab.settings.alpha))
        wanted = reference("bnb", weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = optim.PagedAdamW32bit([q for q in block.parameters() if q.requires_grad], lr=LR)
        return ready(block.train(), optimizer, nbytes, wanted)

    contenders = [Contender(OURS, ours), Contender(DENSE, dense), Contender(PEFT, peft)]
    # Each product there and back, the adapter's three times; the attention's own products are few.
    linears = shape.linears.values()
    flops = sum(4 * p.m * n * k + 6 * p.m * p.rank * (n + k) for n, k in linears)
    return Case("training step of a block", flops, contenders)
