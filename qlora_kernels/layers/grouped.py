"""linear_grouped: the products of a mixture's experts, differentiable in x, bias, lora_A and lora_B."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..formats.nf4_stack import NF4Stack
from ..ops import dispatcher
from ..ops.library import library
from .functional import refuse_second_derivative


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *pieces, offsets, _, bias, A, B, scaling = inputs
    ctx.needs = tuple(ctx.needs_input_grad[i] for i in (0, 8, 9, 10))
    _, need_dbias, need_dA, need_dB = ctx.needs
    saved = (x if need_dA else None, output[1] if need_dB else None, offsets, A, B, *pieces)
    ctx.save_for_backward(*saved)
    ctx.k, ctx.scaling = x.shape[1], scaling
    ctx.bias = (bias.shape, bias.dtype) if need_dbias else None


def _backward(ctx: Any, dy: Tensor, _du: Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        dx, dbias, dA, dB = _gradients(ctx, dy)
    if torch.is_grad_enabled() and dy.requires_grad:
        dx, dbias, dA, dB = (None if g is None else refuse_second_derivative(dy, g) for g in (dx, dbias, dA, dB))
    return dx, *([None] * 7), dbias, dA, dB, None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, u, offsets, A, B, *pieces = ctx.saved_tensors
    need_dx, need_dbias, need_dA, need_dB = ctx.needs
    dy = dispatcher.contiguous("the gradient of the output", dy)
    dx = dbias = dA = dB = None
    if need_dbias:
        shape, dtype = ctx.bias
        rows = torch.arange(dy.shape[0], device=dy.device)
        expert = torch.searchsorted(offsets[1:].to(torch.int64), rows, right=True).clamp(max=shape[0] - 1)
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        dbias = dy.new_zeros(shape, dtype=wide).index_add_(0, expert, dy.to(wide)).to(dtype)
    if need_dx or need_dA or need_dB:
        gradients = ops.linear_grouped_backward(
            dy, *pieces, offsets, ctx.k, x, u, A, B, ctx.scaling, need_dx, need_dA, need_dB
        )
        dx, dA, dB = (g if needed else None for g, needed in zip(gradients, (need_dx, need_dA, need_dB), strict=True))
    return dx, dbias, dA, dB


cast(Any, torch.library).register_autograd(
    "qlora_kernels::linear_grouped_forward", _backward, setup_context=_setup_context, lib=library
)


def linear_grouped(
    x: Tensor,
    weights: NF4Stack,
    offsets: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """Linear layers on a stack of 4-bit weights, each for its own rows, in one operation.

    Equivalent in plain torch, with ``W = weights.dequantize(x.dtype)``::

        for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            rows = x[begin:end]
            y[begin:end] = F.linear(rows, W[e], bias[e]) + scaling * F.linear(F.linear(rows, lora_A[e]), lora_B[e])

    but no W is formed, and all experts share one call. Products accumulate in float32.

    Args:
        x: [M, K], bfloat16, float16 or float32 (float64 runs on a slow reference path), its rows sorted by expert.
            Under autocast it is cast to autocast's dtype.
        weights: the quantized weights [E, N, K], on x's device.
        offsets: int64 or int32 [E + 1] on x's device, ascending from 0 to M: expert e has rows offsets[e] to
            offsets[e + 1]. On the CPU that is checked; on a CUDA device nothing waits to read them, offsets outside
            [0, M] are clamped, and rows of no expert come out undefined.
        bias: [E, N], of x's dtype or float32.
        lora_A: [E, r, K], of x's dtype or float32, or None.
        lora_B: [E, N, r], of the same types.
        scaling: the factor s of the low-rank term, alpha / r or alpha / sqrt(r).

    Returns:
        [M, N] of x's dtype.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or offsets that do not fit; the message names the tensor.
        RuntimeError: for a second derivative.
    """
    if not isinstance(weights, NF4Stack):
        raise TypeError(f"weights should be an NF4Stack, as quantize_stack() gives, found {type(weights).__name__}")
    given = (("x", x), ("offsets", offsets), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B))
    for name, tensor in given:
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "offsets")):
            raise TypeError(f"{name} should be a tensor, found {type(tensor).__name__}")
    return grouped_on(x, weights.pieces, weights.shape, offsets, bias, lora_A, lora_B, scaling)


def grouped_on(
    x: Tensor,
    pieces: ops.Pieces,
    shape: torch.Size,
    offsets: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """:func:`linear_grouped` on a stack's pieces."""
    experts, n, k = shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x should be [M, {k}] for weights {list(shape)}, found {list(x.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] != experts + 1:
        raise ValueError(f"offsets should be [{experts + 1}] for weights {list(shape)}, found {list(offsets.shape)}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        x = dispatcher.convert("x", x, torch.get_autocast_dtype(device))
    bias, lora_A, lora_B = (
        _fit(name, tensor, x.dtype) for name, tensor in (("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B))
    )
    x = dispatcher.contiguous("x", x)
    return ops.linear_grouped_forward(x, *pieces, offsets, n, bias, lora_A, lora_B, scaling)[0]


def _fit(name: str, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias or adapter as the kernels take it: in x's dtype or in float32."""
    if tensor is None or tensor.dtype in (dtype, torch.float32):
        return tensor
    return dispatcher.convert(name, tensor, dtype)
