"""The fused product: schemas, checks and fake implementations together, and a way past torch's dispatcher.

``linear_forward`` is Y = X W^T + bias + U B^T with U = s dropout(X) A^T, ``linear_backward`` its gradients for X, A and
B. Below this file there are only pointers and sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import backends
from .backends import reference
from .library import LINEAR_DTYPES, WEIGHT, define, fake
from .weight import PLAIN, Operand, check_weight


def _check_activation(name: str, x: Tensor, columns: int, device: torch.device) -> None:
    """Of at least one dimension; who wants two has asked for them before."""
    if x.dtype not in LINEAR_DTYPES:
        raise TypeError(f"{name} should be bfloat16, float16, float32 or float64, found {x.dtype}")
    if x.shape[-1] != columns:
        raise ValueError(f"{name} should be [M, {columns}], found {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the weight on {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} should be contiguous")


def _check_lora(
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    dropout: float,
    seed: Tensor | None,
) -> int:
    """The rank, 0 without adapters."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout should be in [0, 1), found {dropout}")
    if lora_A is None or lora_B is None:
        require(lora_A is None and lora_B is None, ValueError, "lora_A and lora_B come together: both, or neither")
        return 0
    r = lora_A.shape[0] if lora_A.dim() == 2 else -1
    if not (
        lora_A.shape == (r, k)
        and lora_B.shape == (n, r)
        and (lora_A.dtype is dtype or lora_A.dtype is torch.float32)
        and (lora_B.dtype is dtype or lora_B.dtype is torch.float32)
        and lora_A.device == device
        and lora_B.device == device
    ):
        _explain_lora(lora_A, lora_B, r, n, k, dtype, device)
    if dropout > 0.0:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError("dropout needs a seed: an int64 tensor with one element")
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"the seed is on {seed.device}, but the weight on {device}")
    return r


def _explain_lora(lora_A, lora_B, r, n, k, dtype, device) -> None:
    """Raises the error for the first thing that is wrong."""
    for name, tensor, shape in (("lora_A", lora_A, [r, k]), ("lora_B", lora_B, [n, r])):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} should be {'[r, K]' if name == 'lora_A' else '[N, r]'} = {shape}, found {list(tensor.shape)}"
            )
        if tensor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} should be {dtype}, as the input is, or float32; found {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the weight on {device}")


def _check_forward(x, pieces, n, bias, lora_A, lora_B, dropout, seed) -> int:
    if x.dim() != 2:
        raise ValueError(f"x should be [M, K], found {list(x.shape)}")
    k = x.shape[1]
    check_weight(*pieces, n, k)
    return _check_forward_operands(x, pieces[0].device, n, k, bias, lora_A, lora_B, dropout, seed)


def _check_forward_operands(x, device, n, k, bias, lora_A, lora_B, dropout, seed) -> int:
    """All but the weight, on whose device they should be; the rank."""
    _check_activation("x", x, k, device)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(f"bias should be [{n}], found {list(bias.shape)}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias should be {x.dtype}, as x is, or float32; found {bias.dtype}")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}, but the weight on {device}")
    return _check_lora(lora_A, lora_B, n, k, x.dtype, device, dropout, seed)


def _linear_forward(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    nested_table,
    n: int,
    bias,
    lora_A,
    lora_B,
    scaling: float,
    dropout: float,
    seed,
):
    pieces = (packed, absmax, nested_absmax, nested_offset, nested_table)
    r = _check_forward(x, pieces, n, bias, lora_A, lora_B, dropout, seed)
    if x.dtype == torch.float64:
        return reference.linear_forward(x, pieces, n, bias, lora_A, lora_B, scaling, dropout, seed)
    view = backends.view_of(pieces, n, x.shape[1])
    y, u = backends.backend_for(x).linear_forward(x, view, r, bias, lora_A, lora_B, scaling, dropout, seed, True)
    return y, x.new_empty(x.shape[0], 0) if u is None else u


linear_forward = define(
    f"linear_forward(Tensor x, {WEIGHT}, SymInt n, Tensor? bias, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, float dropout, Tensor? seed) -> (Tensor y, Tensor u)",
    _linear_forward,
)


@fake("linear_forward")
def _linear_forward_fake(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    nested_table,
    n,
    bias,
    lora_A,
    lora_B,
    scaling,
    dropout,
    seed,
):
    pieces = (packed, absmax, nested_absmax, nested_offset, nested_table)
    r = _check_forward(x, pieces, n, bias, lora_A, lora_B, dropout, seed)
    return x.new_empty((x.shape[0], n)), x.new_empty((x.shape[0], r))


def _check_backward(dy, pieces, k, x, u, lora_A, lora_B, dropout, seed, need_dA, need_dB) -> int:
    if dy.dim() != 2:
        raise ValueError(f"dy should be [M, N], found {list(dy.shape)}")
    n = dy.shape[1]
    check_weight(*pieces, n, k)
    return _check_backward_operands(dy, pieces[0].device, n, k, x, u, lora_A, lora_B, dropout, seed, need_dA, need_dB)


def _check_backward_operands(dy, device, n, k, x, u, lora_A, lora_B, dropout, seed, need_dA, need_dB) -> int:
    """All but the weight, on whose device they should be; the rank."""
    _check_activation("dy", dy, n, device)
    r = _check_lora(lora_A, lora_B, n, k, dy.dtype, device, dropout, seed)
    if need_dA or need_dB:
        require(lora_A is not None, ValueError, "gradients for lora_A and lora_B need lora_A and lora_B")
        m = dy.numel() // n
        if need_dA:
            _check_saved("x", x, m, k, dy.dtype, device)
        if need_dB:
            _check_saved("u", u, m, r, dy.dtype, device)
    return r


def _check_saved(name: str, tensor: Tensor | None, m: int, columns: int, dtype, device) -> None:
    if (
        tensor is not None
        and tensor.dtype is dtype
        and tensor.numel() == m * columns
        and tensor.shape[-1] == columns
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    require(tensor is not None, ValueError, f"{name} is needed for the gradient that was asked for")
    _check_activation(name, tensor, columns, device)
    raise ValueError(f"{name} should be {dtype} [{m}, {columns}], found {tensor.dtype} {list(tensor.shape)}")


def _linear_backward(
    dy,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    nested_table,
    k: int,
    x,
    u,
    lora_A,
    lora_B,
    scaling: float,
    dropout: float,
    seed,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
):
    pieces = (packed, absmax, nested_absmax, nested_offset, nested_table)
    r = _check_backward(dy, pieces, k, x, u, lora_A, lora_B, dropout, seed, need_dA, need_dB)
    if dy.dtype == torch.float64:
        return reference.linear_backward(
            dy, pieces, k, x, u, lora_A, lora_B, scaling, dropout, seed, need_dx, need_dA, need_dB
        )
    gradients = backends.backend_for(dy).linear_backward(
        dy,
        backends.view_of(pieces, dy.shape[1], k),
        r,
        x,
        u,
        lora_A,
        lora_B,
        scaling,
        dropout,
        seed,
        need_dx,
        need_dA,
        need_dB,
    )
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)


linear_backward = define(
    f"linear_backward(Tensor dy, {WEIGHT}, SymInt k, Tensor? x, Tensor? u, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, float dropout, Tensor? seed, bool need_dx, bool need_dA, bool need_dB)"
    " -> (Tensor dx, Tensor dA, Tensor dB)",
    _linear_backward,
)


@fake("linear_backward")
def _linear_backward_fake(
    dy,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    nested_table,
    k,
    x,
    u,
    lora_A,
    lora_B,
    scaling,
    dropout,
    seed,
    need_dx,
    need_dA,
    need_dB,
):
    pieces = (packed, absmax, nested_absmax, nested_offset, nested_table)
    r = _check_backward(dy, pieces, k, x, u, lora_A, lora_B, dropout, seed, need_dA, need_dB)
    m, n = dy.shape
    return (
        dy.new_empty((m, k) if need_dx else (0,)),
        dy.new_empty((r, k) if need_dA else (0,), dtype=lora_A.dtype if need_dA else None),
        dy.new_empty((n, r) if need_dB else (0,), dtype=lora_B.dtype if need_dB else None),
    )


def _nobody_watches(x: Tensor, weight: Operand, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch's dispatcher has but to find the kernel: there is no mode, transform, tracer, profiler, subclass or
    other device."""
    return (
        not torch.compiler.is_compiling()
        and (x.is_cpu or x.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
        and x.dtype is not torch.float64  # the reference's
        and weight.is_plain()
        and PLAIN.issuperset(map(type, tensors))
    )


def forward(
    x: Tensor,
    weight: Operand,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    keep_u: bool,
) -> tuple[Tensor, Tensor | None]:
    """linear_forward of a contiguous x [..., K] without its autograd layer, and past the dispatcher where that is idle:
    what it does takes as long as all the rest of a call.

    Returns:
        y [..., N], and u [M, r], which may be None unless keep_u.
    """
    if _nobody_watches(x, weight, (x, bias, lora_A, lora_B, seed)):
        view = weight.view()
        r = _check_forward_operands(x, weight.device, weight.n, weight.k, bias, lora_A, lora_B, dropout, seed)
        return backends.backend_for(x).linear_forward(x, view, r, bias, lora_A, lora_B, scaling, dropout, seed, keep_u)
    rows = x if x.dim() == 2 else x.reshape(-1, weight.k)
    arguments = (rows, *weight.pieces, weight.n, bias, lora_A, lora_B, scaling, dropout, seed)
    if torch.compiler.is_compiling():
        y, u = linear_forward(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y, u = linear_forward(*arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.n), u


def backward(
    dy: Tensor,
    weight: Operand,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """linear_backward of a contiguous dy [..., N], likewise past the dispatcher; None for what is not needed."""
    needs = (need_dx, need_dA, need_dB)
    if _nobody_watches(dy, weight, (dy, x, u, lora_A, lora_B, seed)):
        view, n, k = weight.view(), weight.n, weight.k
        r = _check_backward_operands(dy, weight.device, n, k, x, u, lora_A, lora_B, dropout, seed, need_dA, need_dB)
        backend = backends.backend_for(dy)
        return backend.linear_backward(dy, view, r, x, u, lora_A, lora_B, scaling, dropout, seed, *needs)
    rows = dy if dy.dim() == 2 else dy.reshape(-1, weight.n)
    if x is not None and x.dim() != 2:
        x = x.reshape(-1, weight.k)
    dx, dA, dB = linear_backward(rows, *weight.pieces, weight.k, x, u, lora_A, lora_B, scaling, dropout, seed, *needs)
    if need_dx and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.k)
    return dx if need_dx else None, dA if need_dA else None, dB if need_dB else None
