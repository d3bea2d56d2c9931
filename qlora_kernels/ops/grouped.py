"""The products of a mixture's experts: schemas, checks and fake implementations together.

``linear_grouped_forward`` is, for each expert e and its rows of X, Y = X W_e^T + bias_e + U B_e^T with U = s X A_e^T;
``linear_grouped_backward`` is its gradients for X, A and B. Rows of X are sorted by expert, and ``offsets`` says where
each expert's begin. The weights are stacked, as are adapters and biases: each expert has its own blocks and constants.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor

from . import backends, dispatcher
from .library import LINEAR_DTYPES, WEIGHT, define, fake
from .weight import Operand, check_weight

#: Which of dx, dA and dB a backward pass should compute.
Needs = tuple[bool, bool, bool]


def _check_rows(name: str, x: Tensor, columns: int, device: torch.device) -> None:
    if x.dtype not in LINEAR_DTYPES:
        raise TypeError(f"{name} should be bfloat16, float16, float32 or float64, found {x.dtype}")
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"{name} should be [M, {columns}], found {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the weights on {device}")
    if not x.is_contiguous():
        raise ValueError(f"{name} should be contiguous")


def _check_offsets(offsets: Tensor, device: torch.device) -> int:
    """The number of experts."""
    if offsets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"offsets should be int64 or int32, found {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets should be [experts + 1], found {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"offsets are on {offsets.device}, but the weights on {device}")
    return offsets.shape[0] - 1


def _readable_offsets(offsets: Tensor, m: int, is_host: bool) -> Tensor:
    """int64, contiguous, and checked where the host can read them. A device clamps what it reads.

    Raises:
        ValueError: for offsets that do not ascend from 0 to M.
    """
    dispatcher.require_memory("offsets", offsets)
    offsets = offsets.to(torch.int64).contiguous()
    if is_host:
        values = cast(list[int], offsets.tolist())  # pyright: ignore[reportUnknownMemberType]
        if values[0] != 0 or values[-1] != m or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"offsets should ascend from 0 to M = {m}, the rows of all experts; found {values}")
    return offsets


def _check_adapters(
    A: Tensor | None, B: Tensor | None, weight: Operand, dtype: torch.dtype, device: torch.device
) -> int:
    """The rank, 0 without adapters."""
    if A is None or B is None:
        if A is not B:
            raise ValueError("lora_A and lora_B come together: both, or neither")
        return 0
    experts, n, k = weight.experts, weight.n, weight.k
    r = A.shape[1] if A.dim() == 3 else -1
    for name, tensor, sizes, shape in (
        ("lora_A", A, "[experts, r, K]", [experts, r, k]),
        ("lora_B", B, "[experts, N, r]", [experts, n, r]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} should be {sizes} = {shape}, found {list(tensor.shape)}")
        if tensor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} should be {dtype}, as the input is, or float32; found {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the weights on {device}")
    return r


# ------------------------------------------------------------------------------------------------------------ forward


def _check_forward(x: Tensor, weight: Operand, bias: Tensor | None, A: Tensor | None, B: Tensor | None) -> int:
    """Checks everything but the weight and the offsets; returns the rank."""
    device = weight.pieces[0].device
    _check_rows("x", x, weight.k, device)
    if bias is not None:
        if list(bias.shape) != [weight.experts, weight.n]:
            raise ValueError(f"bias should be [{weight.experts}, {weight.n}], found {list(bias.shape)}")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias should be {x.dtype}, as x is, or float32; found {bias.dtype}")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}, but the weights on {device}")
    return _check_adapters(A, B, weight, x.dtype, device)


def _forward_weight(x: Tensor, pieces: Any, offsets: Tensor, n: int) -> Operand:
    if x.dim() != 2:
        raise ValueError(f"x should be [M, K], found {list(x.shape)}")
    return Operand(tuple(pieces), n, x.shape[1], _check_offsets(offsets, pieces[0].device))


def _linear_grouped_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *pieces, offsets, n, bias, A, B, scaling = rest
    weight = _forward_weight(x, pieces, offsets, n)
    weight.check()
    r = _check_forward(x, weight, bias, A, B)
    for name, tensor in (("x", x), ("bias", bias), ("lora_A", A), ("lora_B", B)):
        dispatcher.require_memory(name, tensor)
    backend = backends.backend_for(x)
    offsets = _readable_offsets(offsets, x.shape[0], backend.is_host and not offsets.is_cuda)
    y, u = backend.linear_grouped_forward(x, weight, offsets, bias, A, B, scaling)
    return y, x.new_empty(x.shape[0], r) if u is None else u


linear_grouped_forward = define(
    f"linear_grouped_forward(Tensor x, {WEIGHT}, Tensor offsets, SymInt n, Tensor? bias, Tensor? lora_A,"
    " Tensor? lora_B, float scaling) -> (Tensor y, Tensor u)",
    _linear_grouped_forward,
)


@fake("linear_grouped_forward")
def _linear_grouped_forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *pieces, offsets, n, bias, A, B, _ = rest
    weight = _forward_weight(x, pieces, offsets, n)
    check_weight(*weight.pieces, weight.n, weight.k, weight.experts)
    r = _check_forward(x, weight, bias, A, B)
    return x.new_empty((x.shape[0], n)), x.new_empty((x.shape[0], r))


# ----------------------------------------------------------------------------------------------------------- backward


def _check_backward(
    dy: Tensor, weight: Operand, x: Tensor | None, u: Tensor | None, A: Tensor | None, B: Tensor | None, needs: Needs
) -> int:
    """Checks everything but the weight and the offsets; returns the rank."""
    device = weight.pieces[0].device
    _check_rows("dy", dy, weight.n, device)
    r = _check_adapters(A, B, weight, dy.dtype, device)
    _, need_dA, need_dB = needs
    if (need_dA or need_dB) and A is None:
        raise ValueError("gradients for lora_A and lora_B need lora_A and lora_B")
    for name, tensor, needed, columns in (("x", x, need_dA, weight.k), ("u", u, need_dB, r)):
        if not needed:
            continue
        if tensor is None:
            raise ValueError(f"{name} is needed for the gradient that was asked for")
        _check_rows(name, tensor, columns, device)
        if tensor.dtype != dy.dtype or tensor.shape[0] != dy.shape[0]:
            expected = f"{dy.dtype} [{dy.shape[0]}, {columns}]"
            raise ValueError(f"{name} should be {expected}, found {tensor.dtype} {list(tensor.shape)}")
    return r


def _backward_weight(dy: Tensor, pieces: Any, offsets: Tensor, k: int) -> Operand:
    if dy.dim() != 2:
        raise ValueError(f"dy should be [M, N], found {list(dy.shape)}")
    return Operand(tuple(pieces), dy.shape[1], k, _check_offsets(offsets, pieces[0].device))


def _linear_grouped_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *pieces, offsets, k, x, u, A, B, scaling, need_dx, need_dA, need_dB = rest
    weight, needs = _backward_weight(dy, pieces, offsets, k), (need_dx, need_dA, need_dB)
    weight.check()
    _check_backward(dy, weight, x, u, A, B, needs)
    for name, tensor in (("dy", dy), ("x", x), ("u", u), ("lora_A", A), ("lora_B", B)):
        dispatcher.require_memory(name, tensor)
    backend = backends.backend_for(dy)
    offsets = _readable_offsets(offsets, dy.shape[0], backend.is_host and not offsets.is_cuda)
    gradients = backend.linear_grouped_backward(dy, weight, offsets, x, u, A, B, scaling, needs)
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)


linear_grouped_backward = define(
    f"linear_grouped_backward(Tensor dy, {WEIGHT}, Tensor offsets, SymInt k, Tensor? x, Tensor? u, Tensor? lora_A,"
    " Tensor? lora_B, float scaling, bool need_dx, bool need_dA, bool need_dB) -> (Tensor dx, Tensor dA, Tensor dB)",
    _linear_grouped_backward,
)


@fake("linear_grouped_backward")
def _linear_grouped_backward_fake(dy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *pieces, offsets, k, x, u, A, B, _, need_dx, need_dA, need_dB = rest
    weight = _backward_weight(dy, pieces, offsets, k)
    check_weight(*weight.pieces, weight.n, weight.k, weight.experts)
    _check_backward(dy, weight, x, u, A, B, (need_dx, need_dA, need_dB))
    return (
        dy.new_empty((dy.shape[0], k) if need_dx else (0,)),
        A.new_empty(A.shape) if need_dA else dy.new_empty((0,)),
        B.new_empty(B.shape) if need_dB else dy.new_empty((0,)),
    )
