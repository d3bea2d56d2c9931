"""The adapters of all layers at once: select, disable, merge."""

from __future__ import annotations

import math

import pytest
import torch
from contract import relative_error
from small.blocks import IDS, LINEARS, Model, quantize, randomize

import qlora_kernels
from qlora_kernels.models import targets


@pytest.fixture
def model():
    made = Model()
    quantize(made, target_modules=["q_proj", "v_proj"])
    made.layers[0].q_proj.add_adapter("style", rank=2)
    made.layers[0].up.add_adapter("style", rank=2)
    made.layers[0].up.set_adapter(None)
    randomize(made)
    return made.eval()


def test_selecting_an_adapter_leaves_no_mixture(model):
    default = model(IDS)
    qlora_kernels.set_adapter(model, "style")
    active = {name: layer.active_adapter for name, layer in targets.qlora_layers(model)}
    assert {name for name, adapter in active.items() if adapter} == {"layers.0.q_proj", "layers.0.up"}
    assert not torch.equal(model(IDS), default)
    qlora_kernels.set_adapter(model, "default")
    assert torch.equal(model(IDS), default)
    with pytest.raises(KeyError, match="no adapter 'nobody' in this model; it has: 'default', 'style'"):
        qlora_kernels.set_adapter(model, "nobody")
    assert torch.equal(model(IDS), default)


def test_disabling_all(model):
    y = model(IDS)
    with pytest.raises(ZeroDivisionError), qlora_kernels.disable_adapters(model):
        base = model(IDS)
        raise ZeroDivisionError
    assert not torch.equal(base, y)
    assert torch.equal(model(IDS), y)
    for _, layer in targets.qlora_layers(model):
        layer.set_adapter(None)
    assert torch.equal(model(IDS), base)


def test_merging_all_and_taking_out(model):
    y = model(IDS)
    reports = qlora_kernels.merge_adapters(model)
    assert sorted(reports) == [n for n in LINEARS if n.endswith("_proj")]
    assert all(0 < report.weight_error < 0.2 for report in reports.values())
    assert 1e-3 < relative_error(model(IDS), y.double()) < 0.3
    with pytest.raises(RuntimeError, match="adapter 'default' is merged"):
        qlora_kernels.set_adapter(model, "style")
    with pytest.raises(RuntimeError, match="is merged"), qlora_kernels.disable_adapters(model):
        pass
    qlora_kernels.unmerge_adapters(model)
    assert torch.equal(model(IDS), y)
    with pytest.raises(RuntimeError, match="no layer of this model has a merged adapter"):
        qlora_kernels.unmerge_adapters(model)


def test_a_merge_that_fails_in_one_layer_is_taken_back_in_all(model):
    with torch.no_grad():
        model.layers[1].v_proj.lora_A["default"][0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        qlora_kernels.merge_adapters(model)
    assert all(layer.merged_adapter_name is None for _, layer in targets.qlora_layers(model))
    bare = Model()
    quantize(bare, rank=0)
    with pytest.raises(RuntimeError, match="no layer of this model has an active adapter"):
        qlora_kernels.merge_adapters(bare)
