"""One adapter in PEFT over QLinear, in PEFT over bitsandbytes, and in QLinear itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_kernels import QLinear, load_adapter, quantize_model, save_adapter
from qlora_kernels.models.targets import qlora_layers

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)
        self.bfloat16()

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def ours(rank=0) -> Dense:
    model = Dense()
    quantize_model(model, rank=rank, alpha=8, progress=False)
    return model


def theirs() -> nn.Module:
    """The same model in bitsandbytes' NF4, on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    model = Dense()
    model.is_loaded_in_4bit = True
    for name in ("up", "down"):
        dense = getattr(model, name)
        layer = bnb.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        layer.load_state_dict(dense.state_dict())
        setattr(model, name, layer.to("cpu"))
    model.up.bias.data = model.up.bias.data.bfloat16()
    return model


def trained(model) -> PeftModel:
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["up", "down"]))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    return peft_model.eval()


def error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def test_from_peft_over_us_to_bitsandbytes_and_to_qlinear(tmp_path):
    model = trained(ours())
    model.save_pretrained(tmp_path)
    own = ours()
    assert set(load_adapter(own, tmp_path)) == {"up", "down"}
    assert error(own(X), model(X)) < 1e-2
    foreign = PeftModel.from_pretrained(theirs(), tmp_path).eval()
    assert type(foreign.base_model.model.up).__name__ == "Linear4bit"
    # bitsandbytes' second level is a table of its own, so the constants differ by about half a percent.
    assert error(foreign(X), model(X)) < 3e-2
    assert error(foreign(X), ours()(X)) > 0.1


def test_from_bitsandbytes_to_peft_over_us_and_to_qlinear(tmp_path):
    model = trained(theirs())
    model.save_pretrained(tmp_path)
    over_us = PeftModel.from_pretrained(ours(), tmp_path).eval()
    assert isinstance(over_us.base_model.model.up.base_layer, QLinear)
    own = ours()
    load_adapter(own, tmp_path)
    assert error(over_us(X), own(X)) < 1e-2
    assert error(over_us(X), model(X)) < 3e-2


def test_from_qlinear_to_peft_over_us_and_over_bitsandbytes(tmp_path):
    model = ours(rank=8)
    for _, layer in qlora_layers(model):
        nn.init.normal_(layer.lora_B["default"], std=0.05)
    save_adapter(model, tmp_path)
    over_us = PeftModel.from_pretrained(ours(), tmp_path).eval()
    assert error(over_us(X), model(X)) < 1e-2
    assert error(PeftModel.from_pretrained(theirs(), tmp_path).eval()(X), model(X)) < 3e-2
