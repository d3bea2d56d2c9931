"""The low-rank term of a product, as layers hand it to the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import require


class LoraTerm(NamedTuple):
    """scaling * (dropout(x) A^T) B^T; the fields are in the order of the operations' schemas.

    Attributes:
        A: [r, K], of x's dtype or float32.
        B: [N, r], of x's dtype or float32.
        scaling: alpha / r or alpha / sqrt(r).
        dropout: probability in [0, 1) of dropping an element of x.
        seed: int64 with one element, which determines the mask; needed where dropout > 0.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None


#: The schemas' arguments of a product without the term.
NO_LORA = (None, None, 1.0, 0.0, None)


def make_term(
    lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, dropout: float, seed: Tensor | None
) -> LoraTerm | None:
    """The term of a schema's arguments, or None where there are no adapters.

    Raises:
        ValueError: for one matrix without the other, and for a dropout outside [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout should be in [0, 1), found {dropout}")
    if lora_A is None or lora_B is None:
        require(lora_A is None and lora_B is None, ValueError, "lora_A and lora_B come together: both, or neither")
        return None
    return LoraTerm(lora_A, lora_B, scaling, dropout, seed)


def check_term(term: LoraTerm, n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """Checks the term for a weight [n, k] on a device, and x of a dtype; returns the rank. On every call, so it
    builds no messages before something is wrong.

    Raises:
        TypeError, ValueError: naming the tensor that does not fit.
    """
    A, B, _, dropout, seed = term
    shape = A.shape
    r = shape[0] if len(shape) == 2 else -1
    if not (
        shape == (r, k)
        and B.shape == (n, r)
        and (A.dtype is dtype or A.dtype is torch.float32)
        and (B.dtype is dtype or B.dtype is torch.float32)
        and A.device == device
        and B.device == device
    ):
        _explain(A, B, r, n, k, dtype, device)
    if dropout > 0.0:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError("dropout needs a seed: an int64 tensor with one element")
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"the seed is on {seed.device}, but the weight on {device}")
    return r


def _explain(A: Tensor, B: Tensor, r: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises the error for the first thing that is wrong."""
    for name, tensor, sizes, shape in (("lora_A", A, "[r, K]", [r, k]), ("lora_B", B, "[N, r]", [n, r])):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} should be {sizes} = {shape}, found {list(tensor.shape)}")
        if tensor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} should be {dtype}, as the input is, or float32; found {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the weight on {device}")
