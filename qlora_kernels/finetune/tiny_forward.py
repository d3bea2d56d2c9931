"""The tiny model's forward pass in fewer, larger operations than transformers' own, with the same parameters.

At 1024 tokens of 256 columns a step's products take milliseconds, and norms, rotations, conversions and attention in
small operations take as long again. The layers' products are calls of the model's own modules, so they may be dense,
4-bit, or with adapters.
"""

from __future__ import annotations

import math
import types
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Attention here keeps all T x T weights; beyond this torch's own, which does not, is as fast.
_LONGEST = 256


def speed_up(model: nn.Module) -> nn.Module:
    """Gives a tiny model (a LlamaForCausalLM) the forward pass of this file for whole sequences, in place.

    Generation, which passes a cache, and recomputed activations take transformers' own.
    """
    original = model.forward

    def forward(self: nn.Module, input_ids: torch.Tensor | None = None, use_cache: bool | None = None, **more: Any):
        recomputes = getattr(cast(Any, self).model, "gradient_checkpointing", False)
        if more or use_cache is not False or input_ids is None or input_ids.shape[1] > _LONGEST or recomputes:
            return original(input_ids=input_ids, use_cache=use_cache, **more)
        return types.SimpleNamespace(logits=_logits(self, input_ids))

    model.forward = types.MethodType(forward, model)
    return model


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T, vocabulary] of tokens [B, T]."""
    inner, config = model.model, model.config
    x = inner.embed_tokens(tokens)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rotation = _rotation(inner.rotary_emb.inv_freq, tokens.shape[1], dtype)
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        y = _normed(x, layer.input_layernorm, dtype)
        mixed = _Attention.apply(
            attention.q_proj(y), attention.k_proj(y), attention.v_proj(y), *rotation, config.num_attention_heads
        )
        x = x + attention.o_proj(mixed)
        y = _normed(x, layer.post_attention_layernorm, dtype)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    return model.lm_head(_normed(x, inner.norm, dtype))


def _normed(x: torch.Tensor, norm: Any, dtype: torch.dtype) -> torch.Tensor:
    return cast(torch.Tensor, _RMSNorm.apply(x, norm.weight, norm.variance_epsilon, dtype))


def _rotation(frequencies: torch.Tensor, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [T, 1, head] and sines [T, 1, head / 2] of the angles by which positions rotate."""
    positions = torch.arange(length, device=frequencies.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies.float()).unsqueeze(1)
    return angles.cos().repeat(1, 1, 2).to(dtype), angles.sin().to(dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension, computed in float32 and written as ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        normed, wide = x.float() * inverse, gradient.float()
        product = wide * normed
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        # d loss / d normed is g = gradient * weight; x's own gradient loses g's part along normed.
        along = torch.mv(product.flatten(0, -2), weight.float()).div_(x.shape[-1]).view_as(inverse)
        of_x = torch.addcmul(wide * weight, normed, along, value=-1).mul_(inverse)
        return of_x.to(x.dtype), of_weight, None, None


class _Attention(torch.autograd.Function):
    """Causal attention on [B, T, heads * D] before rotation, with all weights [B * heads, T, T] kept for the gradient.

    torch's own kernel walks over blocks of the weights, which pays for long sequences and costs three times as much
    for 128 tokens in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        heads: int,
    ) -> torch.Tensor:
        q, k, v = _rotated(_split(q, heads), cosine, sine), _rotated(_split(k, heads), cosine, sine), _split(v, heads)
        q, k, v = _by_head(q), _by_head(k), _by_head(v)
        length = q.shape[1]
        future = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(q.shape[-1]))
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights, cosine, sine)
        ctx.heads = heads
        return _joined(torch.bmm(weights, v), heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, weights, cosine, sine = ctx.saved_tensors
        heads: int = ctx.heads
        gradient = _by_head(_split(gradient, heads))
        of_v = torch.bmm(weights.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, v.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores.mul_(1 / math.sqrt(q.shape[-1]))
        of_q, of_k = torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q)
        back = [_rotated(_positions_first(x, heads), cosine, -sine).flatten(2) for x in (of_q, of_k)]
        return *back, _joined(of_v, heads), None, None, None


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, heads * D] as [B, T, heads, D]."""
    return x.unflatten(-1, (heads, -1))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[B, T, heads, D] to [B * heads, T, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def _positions_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B * heads, T, D] as [B, T, heads, D]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _joined(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B * heads, T, D] to [B, T, heads * D]."""
    return _positions_first(x, heads).flatten(2)


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of columns of [B, T, heads, D], Llama's pairs (i, i + D / 2); a negative sine rotates back."""
    half = x.shape[-1] // 2
    result = x * cosine
    result[..., :half].addcmul_(x[..., half:], sine, value=-1)
    result[..., half:].addcmul_(x[..., :half], sine)
    return result
