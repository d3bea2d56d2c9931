"""Held-out loss and a generated sample."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from ..console.progress import bar
from .data import Examples, Windows
from .train import batch_loss


@torch.no_grad()
def held_out_loss(
    model: nn.Module, data: Windows | Examples, batch_size: int, limit: int, device: str, title: str, quiet: bool
) -> float:
    """Mean cross-entropy in nats per token over the held-out data, up to ``limit`` tokens, in order."""
    model.eval()
    total, count = 0.0, 0
    for batch in bar(data.sequential(batch_size, limit), show=not quiet, desc=title, unit="batch", leave=False):
        total += batch_loss(model, batch.to(device)).item()
        count += batch.counted
    return total / count if count else math.nan


@torch.no_grad()
def generate(model: nn.Module, prompt: list[int], length: int, seed: int, device: str) -> list[int]:
    """Samples a continuation (temperature 0.7, top 40 tokens); the same seed gives the same one."""
    if length < 1:
        return []
    model.eval()
    inputs = torch.tensor([prompt], dtype=torch.int64, device=device)
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        output = cast(Any, model).generate(  # a method of transformers' models
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=length,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()
