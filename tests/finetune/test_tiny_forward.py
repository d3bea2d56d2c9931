"""The tiny model's own forward pass has transformers' values and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM

from qlora_kernels import quantize_model
from qlora_kernels.finetune import tiny
from qlora_kernels.finetune import tiny_forward as forward
from qlora_kernels.finetune.options import Options


def model_of(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers of two heads, with weights far enough from their initial values to matter."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config(Options(tiny_hidden=128, tiny_layers=2).resolve()))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p) if p.ndim == 1 else 1.2 * p)
    return model.to(dtype)


def outcome(model, tokens, autocast=False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a function of them."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().double(), gradients


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


TOKENS = torch.randint(0, 256, (3, 50), generator=torch.Generator().manual_seed(1))


def test_float32_has_the_same_values_and_gradients():
    model = model_of()
    logits, gradients = outcome(model, TOKENS)
    found, of = outcome(forward.speed_up(model), TOKENS)
    assert error(found, logits) < 1e-5
    assert of.keys() == gradients.keys()
    assert max(error(of[name], gradients[name]) for name in of) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_close_to_float32_as_transformers(autocast):
    logits, gradients = outcome(model_of(), TOKENS)
    model = model_of(torch.float32 if autocast else torch.bfloat16)
    theirs, their_gradients = outcome(model, TOKENS, autocast)
    ours, our_gradients = outcome(forward.speed_up(model), TOKENS, autocast)
    # Under autocast transformers rotates queries and keys in float32.
    logits_bound, bound = (1.3, 1.6) if autocast else (1.1, 1.3)
    assert error(ours, logits) < logits_bound * error(theirs, logits), error(ours, logits) / error(theirs, logits)
    for name, expected in gradients.items():
        assert error(our_gradients[name], expected) < bound * error(their_gradients[name], expected), name


def test_four_bit_layers_and_adapters_take_part():
    model = model_of()
    quantize_model(model, rank=4, alpha=8)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    logits, gradients = outcome(model, TOKENS)
    found, of = outcome(forward.speed_up(model), TOKENS)
    assert error(found, logits) < 1e-5
    assert of.keys() == gradients.keys()
    assert gradients
    assert max(error(of[name], gradients[name]) for name in of) < 1e-4


def test_what_comes_later_does_not_matter():
    model = forward.speed_up(model_of())
    changed = TOKENS.clone()
    changed[:, 30:] = 7
    first, second = (model(input_ids=tokens, use_cache=False).logits for tokens in (TOKENS, changed))
    assert torch.equal(first[:, :30], second[:, :30])
    assert not torch.equal(first[:, 30:], second[:, 30:])


@torch.no_grad()
def test_generation_recomputation_and_long_sequences_take_transformers_own(monkeypatch):
    model = model_of()
    expected = model(input_ids=TOKENS, use_cache=False).logits
    continued = model.generate(input_ids=TOKENS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    forward.speed_up(model)
    own = forward._logits
    monkeypatch.setattr(forward, "_logits", lambda *_: pytest.fail("not transformers' own"))
    again = model.generate(input_ids=TOKENS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(again, continued)
    model.gradient_checkpointing_enable()
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, expected)
    model.gradient_checkpointing_disable()
    monkeypatch.setattr(forward, "_LONGEST", TOKENS.shape[1] - 1)
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, expected)
    monkeypatch.setattr(forward, "_logits", own)
    monkeypatch.setattr(forward, "_LONGEST", TOKENS.shape[1])
    assert not torch.equal(model(input_ids=TOKENS, use_cache=False).logits, expected)  # other roundings
