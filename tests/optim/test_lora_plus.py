"""LoRA+'s groups of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels
from qlora_kernels import PagedAdamW, QLinear, lora_plus_groups


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        QLinear(64, 96, bias=False, rank=4), nn.GELU(), QLinear(96, 64, bias=False, rank=4), nn.Linear(64, 3)
    )
    made[0].add_adapter("other", rank=2)
    return made


def test_the_groups_hold_what_is_trained_once():
    made = model()
    slow, fast = lora_plus_groups(made, 1e-3, 8, weight_decay=0.1)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    assert {names[id(p)] for p in fast["params"]} == {"0.lora_B.default", "2.lora_B.default"}
    assert [names[id(p)] for p in slow["params"]] == ["0.lora_A.default", "2.lora_A.default", "3.weight", "3.bias"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, PagedAdamW])
def test_B_takes_larger_steps(optimizer):
    made = model()
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    for B in (made[0].lora_B["default"], made[2].lora_B["default"]):
        nn.init.normal_(B)  # or A has no gradient
        before |= {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    stepper = optimizer(lora_plus_groups(made, 1e-4, weight_decay=0.0))
    made(torch.randn(8, 64)).square().sum().backward()
    stepper.step()
    steps = {name: (parameter - before[name]).abs().median().item() for name, parameter in made.named_parameters()}
    # Adam's first step is the learning rate, whatever the gradient.
    assert steps["0.lora_A.default"] == pytest.approx(1e-4, rel=0.01)
    assert steps["0.lora_B.default"] == pytest.approx(16e-4, rel=0.01)
    assert steps["3.weight"] == pytest.approx(1e-4, rel=0.01)


def test_the_groups_are_peft_s():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    layers = nn.Sequential(QLinear(64, 96, rank=0), nn.Linear(96, 64))
    adapted = peft.get_peft_model(layers, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    theirs = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = {id(p): group["lr"] for group in lora_plus_groups(adapted, 1e-3) for p in group["params"]}
    assert ours == rates
    assert len(ours) == 4


def test_experts_have_a_B_too():
    mixtures = pytest.importorskip("small.mixtures")
    packed, _ = mixtures.quantized(
        mixtures.make("Mixtral"), 2, target_modules=["q_proj"], target_parameters=mixtures.BOTH
    )
    [_, fast] = lora_plus_groups(packed, 1e-3)
    assert sorted({p.dim() for p in fast["params"]}) == [2, 3]


def test_only_B_is_trained():
    made = QLinear(64, 64, bias=False, rank=4)
    made.lora_A["default"].requires_grad_(False)
    [group] = lora_plus_groups(made, 1e-3)
    assert group["lr"] == pytest.approx(16e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr should be finite and not negative, found -1.0"),
        ({"lr": float("nan")}, ValueError, "lr should be finite"),
        ({"lr": "1e-3"}, TypeError, "lr should be a number, found '1e-3'"),
        ({"lr": 1.0, "ratio": 0}, ValueError, "ratio should be finite and positive, found 0"),
        ({"lr": 1.0, "ratio": True}, TypeError, "ratio should be a number, found True"),
        ({"lr": 1e300, "ratio": 1e300}, ValueError, "lr times ratio should be finite"),
        ({"lr": 1.0, "params": []}, ValueError, "params cannot be given"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        lora_plus_groups(model(), **arguments)


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="no matrix B of an adapter asks for gradients; add adapters first"):
        qlora_kernels.lora_plus_groups(nn.Linear(3, 3), 1e-3)
