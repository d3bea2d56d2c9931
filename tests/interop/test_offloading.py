"""Models whose weights accelerate keeps on the host or on disk between calls."""

from __future__ import annotations

import pytest
import torch
from small.llama import IDS, quantized

import qlora_kernels as qk

accelerate = pytest.importorskip("accelerate")


def on_the_host(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def in_parts(model, folder):
    places = {name: "disk" for name in ("model.layers.1", "model.norm")}
    places |= {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "lm_head")}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("offload", [on_the_host, on_disk, in_parts])
def test_an_offloaded_model_computes_the_same(tmp_path, offload, double_quant):
    model = quantized(double_quant=double_quant)
    with torch.no_grad():
        expected = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    model = offload(model, str(tmp_path))
    assert model.model.layers[1].self_attn.q_proj.weight_packed.is_meta
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    assert model.model.layers[1].self_attn.q_proj.lora_A["default"].is_meta


def test_a_layer_can_be_made_dense_but_not_merged():
    model = quantized()
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.to_linear().weight
    on_the_host(model, None)
    assert torch.equal(layer.to_linear().weight, expected)
    with pytest.raises(RuntimeError, match="merge before dispatching"):
        qk.merge_adapters(model)
    with pytest.raises(RuntimeError, match="merge before dispatching"):
        layer.merge()


def test_an_error_leaves_the_adapters_where_they_were():
    model = quantized()
    layer = model.model.layers[0].self_attn.q_proj
    on_the_host(model, None)
    with pytest.raises(ValueError, match="64"):
        layer(torch.randn(2, 63))
    assert layer.lora_A["default"].is_meta


@pytest.mark.parametrize("offload", [on_the_host, on_disk, in_parts])
def test_adapters_are_saved_from_where_they_are_but_not_loaded_there(tmp_path, offload):
    model = quantized()
    qk.save_adapter(model, tmp_path / "before")
    model = offload(model, str(tmp_path / "weights"))
    qk.save_adapter(model, tmp_path / "after")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    with pytest.raises(RuntimeError, match=r"on the meta device, where an adapter's values would be lost"):
        qk.load_adapter(model, tmp_path / "before")
