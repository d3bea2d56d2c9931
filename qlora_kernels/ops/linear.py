"""The fused product: schemas, checks and fake implementations together, and a way past torch's dispatcher.

``linear_forward`` is Y = X W^T + bias + U B^T with U = s dropout(X) A^T, ``linear_backward`` its gradients for X, A and
B. Below this file there are only pointers and sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, dispatcher
from .library import LINEAR_DTYPES, WEIGHT, define, fake
from .lora import NO_LORA, LoraTerm, check_term, make_term
from .weight import Operand, check_weight

#: Which of dx, dA and dB a backward pass should compute.
Needs = tuple[bool, bool, bool]
#: dx, dA and dB, None where not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _check_activation(name: str, x: Tensor, columns: int, device: torch.device) -> None:
    """That an activation is [..., columns]; how many dimensions it may have is checked elsewhere."""
    if x.dtype not in LINEAR_DTYPES:
        raise TypeError(f"{name} should be bfloat16, float16, float32 or float64, found {x.dtype}")
    if x.shape[-1] != columns:
        raise ValueError(f"{name} should be [M, {columns}], found {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the weight on {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} should be contiguous")


def _require_memory(lora: LoraTerm | None, **operands: Tensor | None) -> None:
    if lora is not None:
        operands |= {"lora_A": lora.A, "lora_B": lora.B, "the seed": lora.seed}
    for name, operand in operands.items():
        dispatcher.require_memory(name, operand)


# ------------------------------------------------------------------------------------------------------------ forward


def _check_forward(x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None) -> int:
    """Checks everything but the weight, which has been checked; returns the rank, 0 without adapters."""
    n, device = weight.n, weight.device
    _check_activation("x", x, weight.k, device)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(f"bias should be [{n}], found {list(bias.shape)}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias should be {x.dtype}, as x is, or float32; found {bias.dtype}")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}, but the weight on {device}")
    return 0 if lora is None else check_term(lora, n, weight.k, x.dtype, device)


def _run_forward(
    x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None, keep_u: bool
) -> tuple[Tensor, Tensor | None]:
    """Checks everything, and computes y and u on the backend of x's device."""
    weight.check()
    _check_forward(x, weight, bias, lora)
    return backends.backend_for(x).linear_forward(x, weight, bias, lora, keep_u)


def _forward_operands(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Operand, Tensor | None, LoraTerm | None]:
    """The schema's arguments, as the checks and the backends take them."""
    if x.dim() != 2:
        raise ValueError(f"x should be [M, K], found {list(x.shape)}")
    weight = Operand((packed, absmax, nested_absmax, nested_offset, nested_table), n, x.shape[1])
    return x, weight, bias, make_term(lora_A, lora_B, scaling, dropout, seed)


def _linear_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, lora = _forward_operands(*arguments)
    _require_memory(lora, x=x, bias=bias)
    y, u = _run_forward(x, weight, bias, lora, True)
    return y, x.new_empty(x.shape[0], 0) if u is None else u


linear_forward = define(
    f"linear_forward(Tensor x, {WEIGHT}, SymInt n, Tensor? bias, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, float dropout, Tensor? seed) -> (Tensor y, Tensor u)",
    _linear_forward,
)


@fake("linear_forward")
def _linear_forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, lora = _forward_operands(*arguments)
    check_weight(*weight.pieces, weight.n, weight.k)
    r = _check_forward(x, weight, bias, lora)
    return x.new_empty((x.shape[0], weight.n)), x.new_empty((x.shape[0], r))


# ----------------------------------------------------------------------------------------------------------- backward


def _check_backward(
    dy: Tensor, weight: Operand, x: Tensor | None, u: Tensor | None, lora: LoraTerm | None, needs: Needs
) -> int:
    """Checks everything but the weight, which has been checked; returns the rank, 0 without adapters."""
    n, k, device = weight.n, weight.k, weight.device
    _check_activation("dy", dy, n, device)
    r = 0 if lora is None else check_term(lora, n, k, dy.dtype, device)
    _, need_dA, need_dB = needs
    if need_dA or need_dB:
        if lora is None:
            raise ValueError("gradients for lora_A and lora_B need lora_A and lora_B")
        m = dy.numel() // n
        if need_dA:
            _check_saved("x", x, m, k, dy.dtype, device)
        if need_dB:
            _check_saved("u", u, m, r, dy.dtype, device)
    return r


def _check_saved(
    name: str, tensor: Tensor | None, m: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor is None:
        raise ValueError(f"{name} is needed for the gradient that was asked for")
    if (
        tensor.dtype is dtype
        and tensor.numel() == m * columns
        and tensor.shape[-1] == columns
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    _check_activation(name, tensor, columns, device)
    raise ValueError(f"{name} should be {dtype} [{m}, {columns}], found {tensor.dtype} {list(tensor.shape)}")


def _run_backward(
    dy: Tensor, weight: Operand, x: Tensor | None, u: Tensor | None, lora: LoraTerm | None, needs: Needs
) -> Gradients:
    """Checks everything, and computes the gradients on the backend of dy's device."""
    weight.check()
    _check_backward(dy, weight, x, u, lora, needs)
    return backends.backend_for(dy).linear_backward(dy, weight, x, u, lora, needs)


def _backward_operands(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    k: int,
    x: Tensor | None,
    u: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Operand, Tensor | None, Tensor | None, LoraTerm | None, Needs]:
    """The schema's arguments, as the checks and the backends take them."""
    if dy.dim() != 2:
        raise ValueError(f"dy should be [M, N], found {list(dy.shape)}")
    weight = Operand((packed, absmax, nested_absmax, nested_offset, nested_table), dy.shape[1], k)
    return dy, weight, x, u, make_term(lora_A, lora_B, scaling, dropout, seed), (need_dx, need_dA, need_dB)


def _linear_backward(*arguments: Any) -> tuple[Tensor, ...]:
    dy, weight, x, u, lora, needs = _backward_operands(*arguments)
    _require_memory(lora, dy=dy, x=x, u=u)
    gradients = _run_backward(dy, weight, x, u, lora, needs)
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)


linear_backward = define(
    f"linear_backward(Tensor dy, {WEIGHT}, SymInt k, Tensor? x, Tensor? u, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, float dropout, Tensor? seed, bool need_dx, bool need_dA, bool need_dB)"
    " -> (Tensor dx, Tensor dA, Tensor dB)",
    _linear_backward,
)


@fake("linear_backward")
def _linear_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, weight, x, u, lora, needs = _backward_operands(*arguments)
    n, k = weight.n, weight.k
    check_weight(*weight.pieces, n, k)
    r = _check_backward(dy, weight, x, u, lora, needs)
    need_dx, need_dA, need_dB = needs
    return (
        dy.new_empty((dy.shape[0], k) if need_dx else (0,)),
        dy.new_empty((r, k) if need_dA else (0,), dtype=lora.A.dtype if need_dA and lora is not None else None),
        dy.new_empty((n, r) if need_dB else (0,), dtype=lora.B.dtype if need_dB and lora is not None else None),
    )


# ------------------------------------------------------------------------------------------------ past the dispatcher


def forward(
    x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None, keep_u: bool
) -> tuple[Tensor, Tensor | None]:
    """linear_forward of a contiguous x [..., K] without its autograd layer. Where torch's dispatcher has nothing to do,
    this goes past it, since dispatching takes as long as all the rest of a call.

    Returns:
        y [..., N], and u [M, r], which may be None unless keep_u.
    """
    others = (bias,) if lora is None else (bias, lora.A, lora.B, lora.seed)
    if dispatcher.is_idle(x, others) and weight.is_plain():
        return _run_forward(x, weight, bias, lora, keep_u)
    x = dispatcher.with_memory(x)
    rows = x if x.dim() == 2 else x.reshape(-1, weight.k)
    arguments = (rows, *weight.pieces, weight.n, bias, *(NO_LORA if lora is None else lora))
    if torch.compiler.is_compiling():
        y, u = linear_forward(*arguments)
    else:
        with dispatcher.below_autograd():
            y, u = linear_forward(*arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.n), u


def backward(
    dy: Tensor, weight: Operand, x: Tensor | None, u: Tensor | None, lora: LoraTerm | None, needs: Needs
) -> Gradients:
    """linear_backward of a contiguous dy [..., N], past the dispatcher as :func:`forward` is."""
    others = (x, u) if lora is None else (x, u, lora.A, lora.B, lora.seed)
    if dispatcher.is_idle(dy, others) and weight.is_plain():
        return _run_backward(dy, weight, x, u, lora, needs)
    dy = dispatcher.with_memory(dy)
    rows = dy if dy.dim() == 2 else dy.reshape(-1, weight.n)
    if x is not None:
        x = dispatcher.with_memory(x).reshape(-1, weight.k)
    term = NO_LORA if lora is None else lora
    dx, dA, dB = linear_backward(rows, *weight.pieces, weight.k, x, u, *term, *needs)
    if dy.dim() != 2 and needs[0]:
        dx = dx.view(*dy.shape[:-1], weight.k)
    return dx if needs[0] else None, dA if needs[1] else None, dB if needs[2] else None
