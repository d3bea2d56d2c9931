"""Which layers of a model are quantized and adapted, and why others are left alone."""

from __future__ import annotations

import pytest
import torch
from small.blocks import IDS, LINEARS, Model, quantize, quantized, with_adapters
from torch import nn
from torch.nn.utils import parametrizations, prune

from qlora_kernels import AdapterConfig, QLinear
from qlora_kernels.models import targets


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], [n for n in LINEARS if n.endswith("_proj")]),
        (["layers.1.up"], ["layers.1.up"]),
        (("1.up", "0.down"), ["layers.0.down", "layers.1.up"]),
        (r"layers\.0\..*", LINEARS[:4]),
        (r".*\.(up|down)", [n for n in LINEARS if n.endswith(("up", "down"))]),
        ("all-linear", LINEARS),
    ],
)
def test_targets_get_adapters_and_the_rest_is_quantized_all_the_same(targets, expected):
    model = Model()
    report = quantize(model, target_modules=targets)
    assert quantized(model) == report.quantized == LINEARS
    assert with_adapters(model) == report.adapted == expected


@pytest.mark.parametrize("skip", [["lm_head", "layers.0.up", "1.down"], r"lm_head|.*0\.up|.*1\.down"])
def test_skip_takes_names_and_expressions(skip):
    model = Model()
    report = quantize(model, skip=skip)
    assert sorted(report.left_alone) == ["layers.0.up", "layers.1.down", "lm_head"]
    assert report.quantized == [n for n in LINEARS if n not in report.left_alone]
    report = quantize(Model(), skip=())
    assert report.quantized == [*LINEARS, "lm_head"]


def test_a_skip_that_matches_nothing_is_refused():
    """A typo must not quantize what should stay dense; the default "lm_head" may be missing."""
    for skip in (["lmhead"], "lmhead"):
        model = Model()
        with pytest.raises(ValueError, match=r"skip: 'lmhead' matches nothing in the model; did you mean 'lm_head'\?"):
            quantize(model, skip=skip)
        assert quantized(model) == []
    assert quantize(nn.Sequential(nn.Linear(64, 64))).quantized == ["0"]
    assert quantize(nn.Sequential(nn.Linear(64, 64)), skip=["lm_head"]).quantized == ["0"]


def test_skip_takes_the_module_around_layers():
    report = quantize(Model(), skip=["layers.0", "lm_head"])
    assert report.left_alone == {n: "named in skip" for n in [*LINEARS, "lm_head"] if n[:8] in ("layers.0", "lm_head")}
    assert report.quantized
    nested = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"a": nn.Linear(64, 64)}) for _ in range(2)])})
    nested["0"] = nn.Linear(64, 64)
    report = quantize(nested, skip=["0"])
    assert report.left_alone == {"0": "named in skip"}, "a number is no block's name"
    assert report.quantized == ["blocks.0.a", "blocks.1.a"]


def test_stacked_experts_are_reported():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 128, 64))
            self.position = nn.Parameter(torch.randn(1, 16, 64))

    model = nn.ModuleDict(
        {"experts": Experts(), "up": nn.Linear(64, 64), "conv": nn.Conv1d(64, 64, 3), "pair": nn.Bilinear(64, 64, 8)}
    )
    report = quantize(model)
    assert report.left_alone == {
        "experts.gate_up_proj": "4 matrices in one parameter, such as experts; 0.1 MiB stay dense"
    }
    assert "experts.gate_up_proj: 4 matrices" in str(report)


def test_tied_weights_are_left_alone():
    model = Model(tied=True)
    report = quantize(model, skip=())
    assert report.left_alone == {"lm_head": "its weight is tied to embedding.weight"}
    assert model.lm_head.weight is model.embedding.weight

    pair = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    pair["b"].weight = nn.Parameter(pair["a"].weight.detach())  # another Parameter, the same memory
    assert quantize(pair).left_alone == {
        "a": "its weight is tied to b.weight",
        "b": "its weight is tied to a.weight",
    }


def test_tied_biases_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    assert quantize(model).left_alone == {"0": "its bias is tied to 1.bias", "1": "its bias is tied to 0.bias"}
    assert model[1].bias is model[0].bias


def test_views_into_another_parameter_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model.fused = nn.Parameter(torch.randn(128, 64))
    model[0].weight = nn.Parameter(model.fused.detach()[:64])
    model[1].weight = nn.Parameter(model.fused.detach()[64:])
    assert quantize(model).left_alone == {"0": "its weight is tied to fused", "1": "its weight is tied to fused"}

    del model.fused  # parts of one allocation that do not overlap are not tied
    assert quantize(model).quantized == ["0", "1"]


def test_a_module_in_two_places_is_swapped_in_both():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Linear(64, 64)), "b": shared})
    assert quantize(model).quantized == ["a.0", "a.1"]
    assert isinstance(model["b"], QLinear)
    assert model["b"] is model["a"][0]


class Patched(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_other_modules_are_left_alone_with_a_reason():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64),
            "patched": Patched(64, 64),
            "normed": parametrizations.weight_norm(nn.Linear(64, 64)),
            "wide": nn.Linear(64, 64, dtype=torch.float64),
            "empty": nn.Linear(0, 64),
            "attention": nn.MultiheadAttention(64, 4),
            "hooked": nn.Linear(64, 64),
            "pruned": nn.Linear(64, 64),
            "embedding": nn.Embedding(4, 64),
        }
    )
    model["hooked"].forward = lambda x: x
    prune.identity(model["pruned"], "weight")
    report = quantize(model)
    assert report.quantized == ["plain"]
    assert {name: reason.split(",")[0].split(";")[0] for name, reason in report.left_alone.items()} == {
        "patched": f"unsupported type {__name__}.Patched",
        "normed": "unsupported type torch.nn.utils.parametrize.ParametrizedLinear",
        "wide": "a weight in torch.float64",
        "empty": "an empty weight",
        "attention.out_proj": "unsupported type torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "hooked": "its forward has been replaced",
        "pruned": "its weight is computed by a hook (weight_norm",
    }
    x = torch.randn(3, 1, 64)
    assert model["attention"](x, x, x)[0].shape == x.shape


def test_peft_layers_are_left_alone():
    peft = pytest.importorskip("peft")
    model = Model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    report = quantize(model)
    assert report.left_alone["layers.0.q_proj"].startswith("a PEFT layer")
    assert "layers.0.q_proj.base_layer" not in report.quantized
    assert "layers.0.v_proj" in report.quantized
    model(IDS)


def test_hooks_stay_where_they_were():
    model = Model()
    calls = []
    handle = model.layers[0].up.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    quantize(model)
    model(IDS)
    assert calls == [QLinear]
    handle.remove()
    model(IDS)
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plan_says_what_quantizing_does_and_changes_nothing(device):
    options = {"target_modules": ["q_proj", "up"], "skip": ["lm_head", "layers.1.up"]}
    with torch.device(device):
        model = Model(tied=True)
    before = [(name, type(module)) for name, module in model.named_modules()]
    planned = targets.plan(model, AdapterConfig(4, 16), **options)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    report = quantize(Model(tied=True), **options)
    assert list(planned.quantized) == report.quantized
    assert list(planned.adapted) == report.adapted
    assert planned.left_alone == report.left_alone
    assert targets.plan(model, AdapterConfig(0, 16), **options).adapted == ()


def test_a_plan_reads_no_weights():
    model = Model()
    with torch.no_grad():
        model.layers[0].up.weight.fill_(float("nan"))
    assert "layers.0.up" in targets.plan(model, AdapterConfig(4, 16)).quantized


# --------------------------------------------------------------------------------------------- errors stay short


def many(count=300):
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(count)])


def test_errors_and_reports_name_ten_layers_at_most():
    model = many()
    assert str(quantize(model)).count("\n") == 2
    with pytest.raises(ValueError, match=r"9: 4-bit already and 290 more") as caught:
        quantize(model)
    assert "10: " not in str(caught.value)
    model.append(nn.Linear(64, 64))
    text = str(quantize(model))
    assert text.endswith("  9: 4-bit already and 290 more")
    assert text.count("4-bit already") == 10


def test_a_pattern_that_matches_nothing_names_ten_candidates():
    with pytest.raises(ValueError, match=r"candidates: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 290 more$"):
        quantize(many(), target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"\(0 is left alone: named in skip; 1 .*; 2 is left alone: named in skip and 297 more\); "
    ):
        quantize(many(301), target_modules=r"[12]?\d?\d", skip=[str(i) for i in range(300)])


def test_a_weight_tied_to_many_names_ten():
    model = many(40)
    for layer in model:
        layer.weight = model[0].weight
    model.append(nn.Linear(64, 64))
    [first, *_] = quantize(model).left_alone.values()
    assert first.endswith("10.weight and 29 more")
