"""The autograd Functions: thin, saving x, A, B, U and references to the packed weight, never N x K elements."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..formats.nf4 import NF4Weight
from ..ops import LoraTerm, dispatcher
from ..ops import linear as fused
from ..ops.library import library
from ..ops.lora import NO_LORA, make_term

#: Whether x, bias, A and B want a gradient.
_Needs = tuple[bool, bool, bool, bool]
#: Their gradients, None where not wanted.
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _NoSecondDerivative(torch.autograd.Function):
    """Hands a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("qlora_kernels.linear has no second derivative: its gradients cannot be differentiated")


#: (dy, gradient): the gradient, which cannot be differentiated by dy.
refuse_second_derivative = cast(Any, _NoSecondDerivative).apply


def _gradients(
    dy: Tensor,
    weight: ops.Operand,
    x: Tensor | None,
    u: Tensor | None,
    lora: LoraTerm | None,
    needs: _Needs,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    """The gradients of x, bias, A and B."""
    if not torch.is_grad_enabled():
        return _compute_gradients(dy, weight, x, u, lora, needs, bias_dtype)
    with torch.no_grad():
        gradients = _compute_gradients(dy, weight, x, u, lora, needs, bias_dtype)
    if dy.requires_grad:
        dx, dbias, dA, dB = (None if g is None else refuse_second_derivative(dy, g) for g in gradients)
        return dx, dbias, dA, dB
    return gradients


def _compute_gradients(
    dy: Tensor,
    weight: ops.Operand,
    x: Tensor | None,
    u: Tensor | None,
    lora: LoraTerm | None,
    needs: _Needs,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    need_dx, need_dbias, need_dA, need_dB = needs
    dy = dispatcher.contiguous("the gradient of the output", dy)
    dx = dbias = dA = dB = None
    if need_dbias:
        dispatcher.require_memory("the gradient of the output", dy)
        rows = dy if dy.dim() == 2 else dy.reshape(-1, weight.n)
        dbias = rows.sum(0, dtype=torch.float32 if dy.dtype != torch.float64 else None).to(bias_dtype)
    if need_dx or need_dA or need_dB:
        dx, dA, dB = fused.backward(dy, weight, x, u, lora, (need_dx, need_dA, need_dB))
    return dx, dbias, dA, dB


class _Linear(torch.autograd.Function):
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T for x [..., K], with gradients for x, bias, A and B.

    The weight comes as an ops.Operand: as arguments and as saved tensors its pieces would double what a call costs.
    That they have not been written to since is checked here. A and B come beside their term, for autograd to see them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        weight: ops.Operand,
        lora: LoraTerm | None,
    ) -> Tensor:
        x = dispatcher.contiguous("x", x)
        needs: _Needs = ctx.needs_input_grad[:4]
        y, u = fused.forward(x, weight, bias, lora, needs[3])
        _, _, scaling, dropout, seed = NO_LORA if lora is None else lora
        ctx.save_for_backward(x if needs[2] else None, u if needs[3] else None, lora_A, lora_B, seed)
        bias_dtype = None if bias is None else bias.dtype
        ctx.rest = (weight, weight.versions(), scaling, dropout, needs, bias_dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, u, lora_A, lora_B, seed = ctx.saved_tensors
        weight, versions, scaling, dropout, needs, bias_dtype = ctx.rest
        if versions != weight.versions():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "a piece of the quantized weight, since the forward pass"
            )
        lora = None if lora_A is None else LoraTerm(lora_A, lora_B, scaling, dropout, seed)
        return *_gradients(gradients[0], weight, x, u, lora, needs, bias_dtype), None, None


#: _Linear.apply without the Python code of Function.apply, which would add half as much time again.
_apply = cast(Any, super(torch.autograd.Function, _Linear)).apply


class _TracedLinear(torch.autograd.Function):
    """The same for x [M, K] under torch.compile, which can only pass and save tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        n: int,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        *pieces: Tensor | None,
    ) -> Tensor:
        y, u = ops.linear_forward(x, *pieces, n, bias, lora_A, lora_B, scaling, dropout, seed)
        _save(ctx, x, u, bias, lora_A, lora_B, ctx.needs_input_grad[:4], n, scaling, dropout, seed, pieces)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *_saved_gradients(ctx, gradients[0]), *([None] * 9)


def _save(
    ctx: Any,
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    needs: _Needs,
    n: int,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    pieces: tuple[Tensor | None, ...],
) -> None:
    """Keeps what _saved_gradients needs."""
    ctx.save_for_backward(x if needs[2] else None, u if needs[3] else None, lora_A, lora_B, seed, *pieces)
    ctx.n, ctx.k, ctx.scaling, ctx.dropout, ctx.needs = n, x.shape[1], scaling, dropout, needs
    ctx.bias_dtype = None if bias is None else bias.dtype


def _saved_gradients(ctx: Any, dy: Tensor) -> _Gradients:
    x, u, lora_A, lora_B, seed, *pieces = ctx.saved_tensors
    weight = ops.Operand(tuple(pieces), ctx.n, ctx.k)
    lora = None if lora_A is None else LoraTerm(lora_A, lora_B, ctx.scaling, ctx.dropout, seed)
    return _gradients(dy, weight, x, u, lora, ctx.needs, ctx.bias_dtype)


# The bare operation, torch.ops.qlora_kernels.linear_forward, is differentiable too.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *pieces, n, bias, lora_A, lora_B, scaling, dropout, seed = inputs
    dx, dbias, dA, dB = (ctx.needs_input_grad[i] for i in (0, 7, 8, 9))
    needs = (dx, dbias, dA, dB)
    _save(ctx, x, output[1], bias, lora_A, lora_B, needs, n, scaling, dropout, seed, tuple(pieces))


def _backward(ctx: Any, dy: Tensor, _du: Tensor) -> tuple[Any, ...]:
    dx, dbias, dA, dB = _saved_gradients(ctx, dy)
    return dx, *([None] * 6), dbias, dA, dB, None, None, None


cast(Any, torch.library).register_autograd(
    "qlora_kernels::linear_forward", _backward, setup_context=_setup_context, lib=library
)


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
        lora_B: [N, r], of the same types.
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
    if not isinstance(weight, NF4Weight):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"weight should be an NF4Weight, as quantize() gives, found {type(weight).__name__}")
    given = (("x", x), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B), ("seed", seed))
    for name, tensor in given:
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "x"):
            raise TypeError(f"{name} should be a tensor, found {type(tensor).__name__}")
    if lora_A is None and lora_B is None and 0.0 < dropout < 1.0:
        dropout = 0.0  # nothing to drop, and no seed to ask for
    return linear_on(x, weight.operand(), bias, make_term(lora_A, lora_B, scaling, dropout, seed))


def linear_on(x: Tensor, weight: ops.Operand, bias: Tensor | None = None, lora: LoraTerm | None = None) -> Tensor:
    """:func:`linear` on a weight and with a term as the products take them."""
    compiling = torch.compiler.is_compiling()
    if compiling or dispatcher.is_any_autocast_enabled():
        x, bias, lora = _autocast(x, bias, lora)
    if dispatcher.has_tangent(x):
        raise RuntimeError("qlora_kernels.linear has no forward-mode derivative; use reverse mode (backward)")
    n, k = weight.n, weight.k
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x should be [..., {k}] for a weight [{n}, {k}], found {list(x.shape)}")
    if lora is not None and lora.dropout > 0.0 and lora.seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        lora = lora._replace(seed=seed)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or (lora is not None and (lora.A.requires_grad or lora.B.requires_grad))
        or (bias is not None and bias.requires_grad)
    )
    # torch.jit.trace fails on Functions. The operation that it records is differentiable too.
    if not wanted or dispatcher.tracing_state() is not None:
        return fused.forward(dispatcher.contiguous("x", x), weight, bias, lora, False)[0]
    if compiling:
        lora_A, lora_B, scaling, dropout, seed = NO_LORA if lora is None else lora
        rows = (x if x.dim() == 2 else x.reshape(-1, k)).contiguous()
        y = cast(Any, _TracedLinear).apply(rows, bias, lora_A, lora_B, n, scaling, dropout, seed, *weight.pieces)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    # torch's own error speaks of setup_context, which means nothing to the caller. The check costs 60 ns.
    if dispatcher.innermost_transform() is not None:
        raise RuntimeError(
            "qlora_kernels.linear has no gradients under the transforms of torch.func (grad, vjp, jacrev, vmap, "
            "functionalize); use backward() or torch.autograd.grad, and vmap under torch.no_grad()"
        )
    unwrap = dispatcher.unwrap_if_dead  # as Function.apply does it
    bias = bias if bias is None else unwrap(bias)
    if lora is None:
        return _apply(unwrap(x), bias, None, None, weight, None)
    A, B = unwrap(lora.A), unwrap(lora.B)
    if A is not lora.A or B is not lora.B:
        lora = lora._replace(A=A, B=B)
    return _apply(unwrap(x), bias, A, B, weight, lora)


def _autocast(x: Tensor, bias: Tensor | None, lora: LoraTerm | None) -> tuple[Tensor, Tensor | None, LoraTerm | None]:
    """The operands, cast as autocast wants them on x's device if it is on."""
    device = x.device.type
    # The meta device has no autocast to ask about.
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or not x.is_floating_point()
        or x.dtype == torch.float64
    ):
        return x, bias, lora
    dtype = torch.get_autocast_dtype(device)
    if bias is not None:
        bias = _cast("bias", bias, dtype)
    if lora is not None:
        lora = lora._replace(A=_cast("lora_A", lora.A, dtype), B=_cast("lora_B", lora.B, dtype))
    return dispatcher.convert("x", x, dtype), bias, lora


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To autocast's dtype, unless it is float32, which the kernels take and cast inside."""
    return tensor if tensor.dtype == torch.float32 else dispatcher.convert(name, tensor, dtype)
