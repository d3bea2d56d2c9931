"""Several named adapters in one QLinear."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from qlora_kernels import AdapterConfig, QLinear


@pytest.fixture
def layer():
    """A layer with the adapters "default" (active) and "other", which differ."""
    made = QLinear(96, 80, rank=4)
    made.add_adapter("other", rank=8, alpha=4, dropout=0.1, rslora=True)
    for B in made.lora_B.values():
        nn.init.normal_(B)
    return made.eval()


X = torch.linspace(-1, 1, 2 * 96).view(2, 96)


def trainable(layer):
    return {name for name, p in layer.named_parameters() if p.requires_grad and name != "bias"}


def test_configurations_and_keys(layer):
    assert layer.adapters == {"default": AdapterConfig(4, 16), "other": AdapterConfig(8, 4, 0.1, True)}
    assert layer.active_adapter == "default"
    assert {"lora_A.default", "lora_B.default", "lora_A.other", "lora_B.other"} < set(layer.state_dict())
    layer.adapters.clear()  # a copy
    assert len(layer.adapters) == 2


def test_selecting_changes_the_output_and_what_trains(layer):
    base = layer.weight.dequantize()
    for name in ("other", "default"):
        layer.set_adapter(name)
        scaling = {"default": 4.0, "other": 4 / 8**0.5}[name]
        assert layer.scaling == scaling
        merged = base + scaling * layer.lora_B[name] @ layer.lora_A[name]
        assert torch.allclose(layer(X), X @ merged.T + layer.bias, rtol=1e-4, atol=1e-4)
        assert trainable(layer) == {f"lora_A.{name}", f"lora_B.{name}"}
        layer.zero_grad()
        layer(X).sum().backward()
        unused = ({"default", "other"} - {name}).pop()
        assert layer.lora_A[unused].grad is None
    layer.set_adapter(None)
    assert torch.allclose(layer(X), X @ base.T + layer.bias, atol=1e-5)
    assert trainable(layer) == set()


def test_a_new_adapter_is_active_only_when_none_is(layer):
    assert trainable(layer) == {"lora_A.default", "lora_B.default"}
    bare = QLinear(96, 80, rank=0)
    bare.add_adapter("first", rank=2)
    assert bare.active_adapter == "first"
    assert trainable(bare) == {"lora_A.first", "lora_B.first"}
    y = bare(X)
    with bare.disable_adapters():
        assert torch.equal(bare(X), y)  # B starts at zero


def test_disabling_is_nestable_and_survives_exceptions(layer):
    with_adapter = layer(X)
    layer.set_adapter(None)
    base = layer(X)
    layer.set_adapter("default")
    with layer.disable_adapters():
        with layer.disable_adapters():
            assert torch.equal(layer(X), base)
        assert torch.equal(layer(X), base)
    with pytest.raises(ZeroDivisionError), layer.disable_adapters():
        raise ZeroDivisionError
    assert torch.equal(layer(X), with_adapter)


def test_deleting(layer):
    y = layer(X)
    layer.delete_adapter("other")
    assert set(layer.adapters) == {"default"}
    assert not any("other" in key for key in layer.state_dict())
    assert torch.equal(layer(X), y)
    layer.delete_adapter("default")
    assert layer.active_adapter is None
    assert layer.rank == 0
    assert torch.allclose(layer(X), X @ layer.weight.dequantize().T + layer.bias, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "raised", "message"),
    [
        (lambda m: m.set_adapter("nobody"), KeyError, "no adapter 'nobody' in this layer; it has: 'default', 'other'"),
        (lambda m: m.delete_adapter("nobody"), KeyError, "no adapter 'nobody'"),
        (lambda m: m.add_adapter("other"), ValueError, "there is an adapter 'other' already; .*default, other"),
        (lambda m: m.add_adapter(""), ValueError, "a word without '.'"),
        (lambda m: m.add_adapter("a.b"), ValueError, "a word without '.'.* found 'a.b'"),
        (lambda m: m.add_adapter("keys"), ValueError, "not a reserved one; found 'keys'"),
        (lambda m: m.add_adapter("training"), ValueError, "reserved"),
        (lambda m: m.add_adapter(3), ValueError, "found 3"),
        (lambda m: m.add_adapter("new", rank=0), ValueError, "rank of adapter 'new' should be at least 1"),
        (lambda m: m.add_adapter("new", rank=81), ValueError, "rank 81 is larger than the layer"),
        (lambda m: m.add_adapter("new", alpha=0), ValueError, "alpha"),
        (lambda m: m.add_adapter("new", dropout=1), ValueError, "dropout"),
    ],
)
def test_bad_calls_change_nothing(layer, call, raised, message):
    keys, adapters = set(layer.state_dict()), layer.adapters
    with pytest.raises(raised, match=message):
        call(layer)
    assert set(layer.state_dict()) == keys
    assert layer.adapters == adapters
    assert layer.active_adapter == "default"


def test_peft_s_names_raise_an_error_that_says_ours(layer):
    dense = nn.Linear(96, 80)
    for call in (
        lambda **options: QLinear(96, 80, **options),
        lambda **options: QLinear.from_linear(dense, **options),
        lambda **options: QLinear.from_nf4(layer.weight, **options),
        lambda **options: layer.add_adapter("new", **options),
    ):
        with pytest.raises(TypeError, match="'r' is called 'rank', 'lora_alpha' is called 'alpha' here"):
            call(r=8, lora_alpha=16)
        with pytest.raises(TypeError, match="'lora_dropout' is called 'dropout' here"):
            call(rank=8, lora_dropout=0.1)
        with pytest.raises(TypeError, match="'use_rslora' is called 'rslora' here"):
            call(use_rslora=True)
        with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
            call(ranks=8)
    assert "new" not in layer.adapters
    assert list(inspect.signature(QLinear).parameters)[:4] == ["in_features", "out_features", "bias", "rank"]
    assert list(inspect.signature(QLinear.from_linear).parameters)[:2] == ["linear", "rank"]
