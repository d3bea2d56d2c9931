"""Mixtures of experts, as transformers has them in three-dimensional parameters: tiny random models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small.mixtures import BOTH, KINDS, decoded, make, quantized
from torch import nn

import qlora_kernels
from qlora_kernels.layers.experts import QExperts, QExpertsModule
from qlora_kernels.models.experts import experts_layers
from qlora_kernels.models.targets import plan


def dense_twin(model: nn.Module, packed: nn.Module) -> nn.Module:
    """The model with the weights that ``packed`` decodes to, the adapters of its experts added to them."""
    twin = decoded(model, packed)
    for name, layer in experts_layers(packed):
        weights = layer.weight.dequantize()
        if layer.active_adapter is not None:
            weights = weights + layer.scaling * layer.lora_B["default"].detach() @ layer.lora_A["default"].detach()
        module = twin.get_submodule(name.rpartition(".")[0])
        weights = weights.transpose(1, 2).contiguous() if module.is_transposed else weights
        module.get_parameter(name.rpartition(".")[2]).data = weights
    return twin


def randomize_adapters(model: nn.Module) -> None:
    for _, layer in experts_layers(model):
        nn.init.normal_(layer.lora_B["default"], std=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 4])
def test_logits_and_gradients_are_those_of_a_dense_model_with_the_decoded_experts(kind, rank):
    model = make(kind)
    packed, report = quantized(model, rank, target_modules=["q_proj"], target_parameters=BOTH)
    assert [name.rpartition(".")[2] for name in report.experts] == BOTH
    assert report.adapted_experts == (report.experts if rank else [])
    assert set(report.left_alone) == {"lm_head"}
    if rank:
        randomize_adapters(packed)
    twin, tokens = dense_twin(model, packed), torch.randint(0, 96, (2, 9))
    for implementation in ("eager", "grouped_mm"):
        twin.set_experts_implementation(implementation)
        torch.testing.assert_close(packed(tokens).logits, twin(tokens).logits, rtol=1e-4, atol=1e-5)
    if rank:
        packed(tokens, labels=tokens).loss.backward()
        twin(tokens, labels=tokens).loss.backward()
        for name, layer in experts_layers(packed):
            module = twin.get_submodule(name.rpartition(".")[0])
            dW = module.get_parameter(name.rpartition(".")[2]).grad
            dW = dW.transpose(1, 2) if module.is_transposed else dW
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            torch.testing.assert_close(A.grad, layer.scaling * B.detach().mT @ dW, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(B.grad, layer.scaling * dW @ A.detach().mT, rtol=1e-3, atol=1e-6)


def test_a_model_becomes_smaller_and_experts_count_in_full():
    model = make("Mixtral")
    count = sum(p.numel() for p in model.parameters())
    _, report = quantized(model)
    assert report.total_parameters == count
    assert report.bytes_after < 0.4 * report.bytes_before
    assert "2 stacks of experts quantized to NF4, 0 of them with adapters" in str(report)


def test_tokens_of_other_devices_experts_contribute_nothing():
    packed, _ = quantized(make("Mixtral"))
    experts = packed.model.layers[0].mlp.experts
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    chosen = torch.tensor([[0, 4], [4, 4], [2, 1]])
    y = experts(x, chosen, weights)
    assert not y[1].any()
    torch.testing.assert_close(y[0], experts(x, torch.tensor([[0, 1]] * 3), weights * torch.tensor([1, 0]))[0])


def test_trained_and_saved_and_copied():
    model = make("Qwen3Moe")
    packed, _ = quantized(model, 4, target_parameters=BOTH)
    trained = [name for name, p in packed.named_parameters() if p.requires_grad and ".experts." in name]
    assert len(trained) == 4
    tokens = torch.randint(0, 96, (2, 9))
    optimizer = torch.optim.Adam((p for p in packed.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(6):
        loss = packed(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    expected = packed(tokens).logits
    other, _ = quantized(model, 4, target_parameters=BOTH)
    assert not torch.equal(other(tokens).logits, expected)
    other.load_state_dict(packed.state_dict())
    for twin in (other, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(tokens).logits, expected)
    with qlora_kernels.disable_adapters(packed):
        assert torch.equal(packed(tokens).logits, quantized(model)[0](tokens).logits)
    half = copy.deepcopy(packed).bfloat16()
    experts = dict(experts_layers(half))
    assert all(layer.weight_nested_absmax.dtype == torch.float32 for layer in experts.values())
    assert all(layer.lora_A["default"].dtype == torch.bfloat16 for layer in experts.values())
    assert half(tokens).logits.dtype == torch.bfloat16


def test_a_state_dict_of_other_experts_is_refused():
    packed, _ = quantized(make("Mixtral"))
    layer = packed.model.layers[0].mlp.experts.down_proj
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for change, message in (
        ({"weight_packed": before["weight_packed"][:3]}, "should have shape"),
        ({"weight_absmax": before["weight_absmax"].float()}, "should be torch.uint8"),
        ({"weight_nested_absmax": before["weight_nested_absmax"] * float("nan")}, "NaN or infinity"),
        ({"weight": torch.zeros(4, 64, 96)}, "dense weight"),
        ({"merged_adapter": torch.tensor(list(b"default"), dtype=torch.uint8)}, "adapters of experts are not merged"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(before | change)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_on_the_meta_device():
    with torch.device("meta"):
        model = make("Mixtral")
    packed, _ = quantized(model, 4, target_parameters=BOTH)
    real, _ = quantized(make("Mixtral"), 4, target_parameters=BOTH)
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (packed, real)]
    assert shapes[0] == shapes[1]
    packed.load_state_dict(real.state_dict(), assign=True)
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(packed.get_submodule(name).weight.dequantize(), real.get_submodule(name).weight.dequantize())


def test_a_second_call_finds_nothing_more():
    packed, _ = quantized(make("Mixtral"), 4, target_parameters=BOTH)
    with pytest.raises(ValueError, match=r"no nn\.Linear to quantize"):
        qlora_kernels.quantize_model(packed, progress=False)


@pytest.mark.parametrize("skip", [["experts"], ["down_proj"], ["layers.0.mlp"]])
def test_skipped_experts_are_reported(skip):
    packed, report = quantized(make("Mixtral"), skip=skip)
    assert report.experts == []
    assert any("named in skip; 4 matrices in one parameter" in reason for reason in report.left_alone.values())
    assert not any(isinstance(module, QExpertsModule) for module in packed.modules())


class Strange(nn.Module):
    """Experts that no one knows how to call."""

    def __init__(self):
        super().__init__()
        self.linear, self.w1 = nn.Linear(64, 64), nn.Parameter(torch.randn(4, 64, 64))


def test_unknown_experts_stay_dense_and_are_reported():
    model = Strange()
    _, report = quantized(model)
    assert report.experts == []
    assert report.left_alone == {"w1": "4 matrices in one parameter, such as experts; 0.1 MiB stay dense"}


def test_a_plan_without_experts_leaves_them_dense():
    planned = plan(make("Mixtral"), qlora_kernels.AdapterConfig(rank=0, alpha=1))
    assert planned.experts == ()
    assert sum("stay dense" in reason for reason in planned.left_alone.values()) == 2


def test_patterns_that_can_be_gone_through_only_once():
    once = {"target_modules": ["q_proj"], "skip": ["v_proj", "lm_head"], "target_parameters": BOTH}
    _, expected = quantized(make("Mixtral"), 2, **once)
    _, report = quantized(make("Mixtral"), 2, **{name: iter(patterns) for name, patterns in once.items()})
    assert report == expected
    assert len(report.adapted_experts) == 2


def test_arguments_that_do_not_fit():
    model = make("Mixtral")
    for options, error, message in (
        ({"target_parameters": ["w1"]}, ValueError, "matches no weights of experts; candidates: gate_up_proj, down"),
        ({"target_parameters": "down_proj"}, TypeError, "should be a list of names"),
        ({"target_parameters": ["down_proj"], "dropout": 0.1}, ValueError, "have no dropout, found 0.1"),
    ):
        with pytest.raises(error, match=message):
            qlora_kernels.quantize_model(model, rank=4, progress=False, **options)
    bad = model.model.layers[0].mlp.experts.down_proj
    bad.data[2, 1, 0] = float("inf")
    with pytest.raises(ValueError, match=r"experts.down_proj holds inf at index \(2, 1, 0\)"):
        qlora_kernels.quantize_model(model, progress=False)
    assert not any(isinstance(module, (QExperts, qlora_kernels.QLinear)) for module in model.modules())
