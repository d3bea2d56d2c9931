"""The autograd Functions: thin, saving x, A, B, U and references to the packed weight, and nothing of size N x K."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..formats.nf4 import NF4Weight
from ..ops import linear as fused
from ..ops.library import library


class _NoSecondDerivative(torch.autograd.Function):
    """Hands a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, dy, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("qlora_kernels.linear has no second derivative: its gradients cannot be differentiated")


def _gradients(dy, *arguments) -> tuple[Tensor | None, ...]:
    """The gradients of x, bias, lora_A and lora_B, None where not wanted."""
    if not torch.is_grad_enabled():
        return _compute_gradients(dy, *arguments)
    with torch.no_grad():
        gradients = _compute_gradients(dy, *arguments)
    if dy.requires_grad:
        return tuple(None if g is None else _NoSecondDerivative.apply(dy, g) for g in gradients)
    return gradients


def _compute_gradients(
    dy, weight, x, u, lora_A, lora_B, scaling, dropout, seed, needs, bias_dtype
) -> tuple[Tensor | None, ...]:
    need_dx, need_dbias, need_dA, need_dB = needs
    dy = dy.contiguous()
    dx = dbias = dA = dB = None
    if need_dbias:
        rows = dy if dy.dim() == 2 else dy.reshape(-1, weight.n)
        dbias = rows.sum(0, dtype=torch.float32 if dy.dtype != torch.float64 else None).to(bias_dtype)
    if need_dx or need_dA or need_dB:
        dx, dA, dB = fused.backward(dy, weight, x, u, lora_A, lora_B, scaling, dropout, seed, need_dx, need_dA, need_dB)
    return dx, dbias, dA, dB


class _Linear(torch.autograd.Function):
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T for x [..., K], with gradients for x, bias, A and B.

    The weight comes as an ops.Operand: as arguments and as saved tensors its pieces would double what a call costs.
    That they have not been written to since is checked here.
    """

    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, weight, scaling, dropout, seed):
        x = x.contiguous()
        needs = ctx.needs_input_grad[:4]
        y, u = fused.forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, needs[3])
        ctx.save_for_backward(x if needs[2] else None, u if needs[3] else None, lora_A, lora_B, seed)
        bias_dtype = None if bias is None else bias.dtype
        ctx.rest = (weight, weight.versions(), scaling, dropout, needs, bias_dtype)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, u, lora_A, lora_B, seed = ctx.saved_tensors
        weight, versions, scaling, dropout, needs, bias_dtype = ctx.rest
        if versions != weight.versions():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "a piece of the quantized weight, since the forward pass"
            )
        gradients = _gradients(dy, weight, x, u, lora_A, lora_B, scaling, dropout, seed, needs, bias_dtype)
        return *gradients, None, None, None, None


#: _Linear.apply less what Function.apply does before it in Python, which takes as long as half of its work.
_apply = super(torch.autograd.Function, _Linear).apply


class _PlainLinear(torch.autograd.Function):
    """The same of x [M, K], for torch.compile: tensors alone come and are saved."""

    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, n, scaling, dropout, seed, *pieces):
        y, u = ops.linear_forward(x, *pieces, n, bias, lora_A, lora_B, scaling, dropout, seed)
        _save(ctx, x, u, bias, lora_A, lora_B, ctx.needs_input_grad[:4], n, scaling, dropout, seed, pieces)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_saved_gradients(ctx, dy), *([None] * 9)


def _save(ctx, x, u, bias, lora_A, lora_B, needs, n, scaling, dropout, seed, pieces) -> None:
    """Keeps what _saved_gradients needs; needs: whether x, bias, lora_A and lora_B want a gradient."""
    ctx.save_for_backward(x if needs[2] else None, u if needs[3] else None, lora_A, lora_B, seed, *pieces)
    ctx.n, ctx.k, ctx.scaling, ctx.dropout, ctx.needs = n, x.shape[1], scaling, dropout, needs
    ctx.bias_dtype = None if bias is None else bias.dtype


def _saved_gradients(ctx, dy) -> tuple[Tensor | None, ...]:
    x, u, lora_A, lora_B, seed, *pieces = ctx.saved_tensors
    weight = ops.Operand(tuple(pieces), ctx.n, ctx.k)
    return _gradients(dy, weight, x, u, lora_A, lora_B, ctx.scaling, ctx.dropout, seed, ctx.needs, ctx.bias_dtype)


# The bare operation is differentiable too, for those who call torch.ops.qlora_kernels.linear_forward.
def _setup_context(ctx, inputs, output) -> None:
    x, *pieces, n, bias, lora_A, lora_B, scaling, dropout, seed = inputs
    needs = tuple(ctx.needs_input_grad[i] for i in (0, 7, 8, 9))
    _save(ctx, x, output[1], bias, lora_A, lora_B, needs, n, scaling, dropout, seed, pieces)


def _backward(ctx, dy, _du):
    dx, dbias, dA, dB = _saved_gradients(ctx, dy)
    return dx, *([None] * 6), dbias, dA, dB, None, None, None


torch.library.register_autograd("qlora_kernels::linear_forward", _backward, setup_context=_setup_context, lib=library)


def linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A linear layer on a 4-bit weight, with a low-rank term fused in; differentiable in x, bias, lora_A and lora_B.

    Equivalent in plain torch, with ``W = weight.dequantize(x.dtype)``::

        F.linear(x, W, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout), lora_A), lora_B)

    but W is never formed, and the low-rank term costs no extra pass over the output. Products accumulate in float32.

    Args:
        x: [..., K], bfloat16, float16 or float32 (float64 runs on a slow reference path). Under autocast it is cast
            to autocast's dtype, as F.linear does.
        weight: the quantized weight [N, K], on x's device.
        bias: [N], of x's dtype or float32.
        lora_A: [r, K], of x's dtype or float32, or None.
        lora_B: [N, r], likewise.
        scaling: the factor s of the low-rank term, alpha / r or alpha / sqrt(r).
        dropout: probability in [0, 1) of dropping an element of x on the low-rank path.
        seed: int64 tensor with one element that determines the dropout mask (Philox 4x32-10), on x's device or on the
            CPU; drawn from the generator of x's device when not given.

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: for dtypes, shapes or devices that do not fit; the message names the tensor.
        RuntimeError: for a gradient of the weight, a second derivative, or gradients under torch.func's transforms.

    Once it has run with several threads a process should not fork and run it again in the child: OpenMP's threads do
    not come along, and the child waits for them forever, as in torch's own operations. Processes that the start method
    "spawn" made can, and forked ones (a DataLoader's workers, say) that do not call it are fine.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight should be an NF4Weight, as quantize() gives, found {type(weight).__name__}")
    return linear_of(x, weight.operand(), bias, lora_A, lora_B, scaling, dropout, seed)


def linear_of(
    x: Tensor,
    weight: ops.Operand,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`linear` of a weight as the products take it."""
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_any_autocast_enabled():
        x, bias, lora_A, lora_B = _autocast(x, bias, lora_A, lora_B)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError("qlora_kernels.linear has no forward-mode derivative; use reverse mode (backward)")
    n, k = weight.n, weight.k
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x should be [..., {k}] for a weight [{n}, {k}], found {list(x.shape)}")
    if lora_A is None and lora_B is None and 0.0 < dropout < 1.0:
        dropout = 0.0  # nothing to drop, and no seed to ask for
    if dropout > 0.0 and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or (lora_A is not None and lora_A.requires_grad)
        or (lora_B is not None and lora_B.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if not wanted:
        return fused.forward(x.contiguous(), weight, bias, lora_A, lora_B, scaling, dropout, seed, False)[0]
    if compiling:
        rows = (x if x.dim() == 2 else x.reshape(-1, k)).contiguous()
        y = _PlainLinear.apply(rows, bias, lora_A, lora_B, n, scaling, dropout, seed, *weight.pieces)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    # torch's own error speaks of setup_context, which is nothing to the caller. The question costs 60 ns.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "qlora_kernels.linear has no gradients under the transforms of torch.func (grad, vjp, jacrev, vmap, "
            "functionalize); use backward() or torch.autograd.grad, and vmap under torch.no_grad()"
        )
    return _apply(
        _unwrapped(x), _unwrapped(bias), _unwrapped(lora_A), _unwrapped(lora_B), weight, scaling, dropout, seed
    )


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    """A tensor that has outlived a transform of torch.func, without its wrapper; as Function.apply does it."""
    return tensor if tensor is None else torch._C._functorch.unwrap_if_dead(tensor)


def _autocast(x, bias, lora_A, lora_B) -> tuple[Tensor | None, ...]:
    """The operands as autocast has them for x's device, where it is on."""
    device = x.device.type
    # The meta device has no autocast to ask about.
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or not x.is_floating_point()
        or x.dtype == torch.float64
    ):
        return x, bias, lora_A, lora_B
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), _cast(bias, dtype), _cast(lora_A, dtype), _cast(lora_B, dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """To autocast's dtype, unless it is float32, which the kernels take as it is and cast inside."""
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.to(dtype)
