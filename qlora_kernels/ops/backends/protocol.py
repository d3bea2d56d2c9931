"""What a backend is: the operations on one kind of device. Its arguments have been checked in ops."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..lora import LoraTerm
from ..weight import Operand


class Backend(Protocol):
    """The operations on checked tensors of one kind of device.

    x [..., K] and dy [..., N] are contiguous, and M counts their rows. A weight has been checked (Operand.check).
    """

    @property
    def refuses_non_finite(self) -> bool:
        """Whether quantize() itself refuses weights that are not finite."""
        ...

    @property
    def is_host(self) -> bool:
        """Whether results are ready when a call returns, and optimizer states live in host memory."""
        ...

    def capturing(self, device: torch.device) -> bool:
        """Whether the caller's stream on a device is being captured into a CUDA graph, so that nothing can be read."""
        ...

    def quantize(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """packed and absmax of a weight [N, K], called ``name`` in errors."""
        ...

    def quantize_absmax(self, absmax: Tensor, nested_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, nested_absmax and nested_offset of float32 constants."""
        ...

    def quantize_nested(self, weight: Tensor, nested_table: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both steps at once: packed, codes, nested_absmax and nested_offset."""
        ...

    def dequantize(self, weight: Operand, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
        """Rows [row_begin, row_end) of the dense weight."""
        ...

    def dequantize_out(self, weight: Operand, row_begin: int, row_end: int, out: Tensor) -> None:
        """The same rows into a contiguous tensor [row_end - row_begin, K]."""
        ...

    def linear_forward(
        self, x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None, keep_u: bool
    ) -> tuple[Tensor, Tensor | None]:
        """y [..., N], and u [M, r], which may be None unless ``keep_u``, and is without adapters."""
        ...

    def linear_backward(
        self,
        dy: Tensor,
        weight: Operand,
        x: Tensor | None,
        u: Tensor | None,
        lora: LoraTerm | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx [..., K], dA [r, K] and dB [N, r], None where ``needs`` does not ask for them."""
        ...

    def linear_grouped_forward(
        self,
        x: Tensor,
        weight: Operand,
        offsets: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor | None]:
        """y [M, N], and u [M, r] or None without adapters, for experts with rows ``offsets[e]`` to ``offsets[e + 1]``.

        offsets: int64 [experts + 1]; of a host, checked. A [experts, r, K], B [experts, N, r], bias [experts, N].
        """
        ...

    def linear_grouped_backward(
        self,
        dy: Tensor,
        weight: Operand,
        offsets: Tensor,
        x: Tensor | None,
        u: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scaling: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx [M, K], dA [experts, r, K] and dB [experts, N, r], None where ``needs`` does not ask for them."""
        ...
