"""The 16-bit baseline."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from qlora_kernels.finetune import dense_lora


def test_both_kinds_of_adapter_start_alike():
    from qlora_kernels import NF4Weight, quantize  # noqa: F401 - the extension must load
    from qlora_kernels.layers.qlinear import QLinear

    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(64, 96))
    quantized = QLinear.from_linear(dense[0], rank=8, alpha=16)
    dense_lora.share_initial_values({"0": quantized}, seed=5)
    dense[0].weight.data = quantized.weight.dequantize()
    dense_lora.add_lora(dense, ["0"], 8, 16, 0.0, False, seed=5)
    assert torch.equal(dense[0].lora_A, quantized.lora_A["default"])
    B = torch.randn(96, 8)
    with torch.no_grad():
        dense[0].lora_B.copy_(B)
        quantized.lora_B["default"].copy_(B)
    x = torch.randn(5, 64)
    torch.testing.assert_close(dense(x), quantized(x), rtol=1e-4, atol=1e-5)
