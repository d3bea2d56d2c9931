"""NF4 weights: quantize, dequantize, and the five plain tensors that hold one."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..native import extension
from ..ops import dispatcher
from ..ops.backends import backend_for, reference
from ..ops.weight import own_levels, same_pieces
from .constants import check_constants

_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

BLOCK_SIZE = 64  # weights per absmax
NESTED_BLOCK_SIZE = 256  # absmax per nested_absmax

#: The pieces of a double-quantized weight, in the order the operations take them.
PIECES = ("packed", "absmax", "nested_absmax", "nested_offset", "nested_table")


@dataclass(eq=False)
class NF4Weight:
    """A frozen weight [N, K] in 4-bit NormalFloat, every piece a plain tensor.

    Attributes:
        packed: uint8 [ceil(N*K/2)], two codes a byte, the first in the high nibble, row-major.
        absmax: uint8 [ceil(N*K/64)] codes into ``nested_table``, or float32 constants when not double-quantized.
        nested_absmax: float32 [ceil(blocks/256)], or None.
        nested_offset: float32 [1], the mean of the constants, or None.
        nested_table: float32 [256], or None. A weight with other levels than NF4's, such as bitsandbytes' FP4, has
            them as 16 more entries, [272], and without double quantization as [16].
        shape: (N, K).
        dtype: the default type of :meth:`dequantize`.

    The formats are those of Dettmers et al. 2023 (arXiv 2305.14314): block 64, constants in FP8, block 256.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_table: torch.Tensor | None
    shape: torch.Size
    dtype: torch.dtype = torch.float32

    # transformers fills parameters without this mark with random numbers, also those of the modules inside a block.
    _is_hf_initialized: ClassVar[bool] = True

    @property
    def pieces(self) -> ops.Pieces:
        """The five tensors (None where there is no double quantization), as the operations take them."""
        return (self.packed, self.absmax, self.nested_absmax, self.nested_offset, self.nested_table)

    def operand(self) -> ops.Operand:
        """The weight as the products take it; the same one as long as the pieces are the same tensors."""
        kept = self.__dict__.get("_operand")
        if kept is not None and (kept.n, kept.k) == self.shape and same_pieces(kept.pieces, self.pieces):
            return kept
        operand = ops.Operand(self.pieces, *self.shape)
        if not torch.compiler.is_compiling():
            self.__dict__["_operand"] = operand
        return operand

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_operand"}

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def levels(self) -> torch.Tensor:
        """What the 16 codes stand for, before a block's constant: float32 [16], on the weight's device."""
        own = own_levels(self.pieces)
        return reference.levels().to(self.device) if own is None else own

    @property
    def has_nf4_levels(self) -> bool:
        """Whether the codes are NormalFloat's, as :func:`quantize` makes them."""
        return own_levels(self.pieces) is None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_meta(self) -> bool:
        return self.packed.is_meta

    @property
    def is_cuda(self) -> bool:
        return self.packed.is_cuda

    def is_floating_point(self) -> bool:
        """Always True: it stands for a floating weight."""
        return True

    @property
    def ndim(self) -> int:
        return 2

    @property
    def grad(self) -> None:
        """Always None, as of any frozen weight."""
        return None

    @property
    def data(self) -> torch.Tensor:
        raise RuntimeError(
            "an NF4 weight is frozen and 4-bit and has no dense data; read dequantize(), and to change it quantize a "
            "dense layer with QLinear.from_linear(linear)"
        )

    @property
    def requires_grad(self) -> bool:
        """Always False: a 4-bit weight is frozen, only adapters, bias and inputs get gradients."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> NF4Weight:
        if requires_grad:
            raise RuntimeError(
                "an NF4 weight is frozen and has no gradient; train its adapters (rank > 0), or the dense layer "
                "that QLinear.to_linear() returns"
            )
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A torch function was given the weight: an error in a sentence.

        torch.nn's own fast paths (TransformerEncoderLayer in eval mode) look for this method, and where they find it
        they call the modules rather than reading their weights.
        """
        raise TypeError(
            f"{getattr(function, '__name__', function)} was given an NF4Weight, which is not a tensor; call the layer, "
            "or qlora_kernels.linear(x, weight), or take weight.dequantize()"
        )

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and constants, without the 256-entry table, which all weights have in common."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Storage in bits: 4 + 8/64 + 32/(64*256) = 4.127 with double quantization, 4.5 without."""
        return 8 * self.nbytes / max(self.numel(), 1)

    def dequantize(
        self,
        dtype: torch.dtype | None = None,
        *,
        row_begin: int = 0,
        row_end: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weight, or rows [row_begin, row_end) of it, as a dense tensor.

        Each element is round_to_dtype(float32(level) * float32(absmax)): one rounding, the same bits on every
        device and instruction set.

        Args:
            dtype: float32, bfloat16, float16 or float64; by default :attr:`dtype`.
            row_begin: first row.
            row_end: one past the last row; by default N.
            out: a contiguous tensor [row_end - row_begin, K] of that dtype, on the weight's device, to be filled and
                returned. A new tensor costs its first use of fresh memory, which can take longer than the decoding;
                one that is used again does not.

        Returns:
            Tensor [row_end - row_begin, K].

        Raises:
            TypeError: for another dtype, or an ``out`` of another dtype.
            ValueError: for a range outside [0, N], or an ``out`` of another shape or device, that is not contiguous,
                or shares memory with the weight.
            RuntimeError: for an ``out`` that asks for a gradient.
        """
        rows, columns = self.shape
        end = rows if row_end is None else row_end
        dtype = self.dtype if dtype is None else dtype
        if out is None:
            return ops.dequantize(*self.pieces, rows, columns, dtype, row_begin, end)
        require(isinstance(out, torch.Tensor), TypeError, f"out should be a tensor, found {type(out).__name__}")
        require(
            out.dtype == dtype,
            TypeError,
            f"out should be {dtype}, the dtype of the result, found {out.dtype}; for the latter, ask for that dtype",
        )
        ops.dequantize_out(*self.pieces, rows, columns, row_begin, end, out)
        return out

    def to(self, *args: Any, **kwargs: Any) -> NF4Weight:
        """A copy on another device (``.to(device)``), with another default dtype (``.to(dtype)``), or both.

        The codes and constants never change.
        """
        device, dtype, non_blocking, _ = dispatcher.parse_to(*args, **kwargs)
        moved = {
            name: None if piece is None else piece.to(device=device, non_blocking=non_blocking)
            for name, piece in zip(PIECES, self.pieces, strict=True)
        }
        return replace(self, dtype=self.dtype if dtype is None else dtype, **moved)

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Plain tensors under ``prefix + name``, with the shape as int64 [2]; what safetensors stores."""
        state = {prefix + n: p for n, p in zip(PIECES, self.pieces, strict=True) if p is not None}
        state[prefix + "shape"] = torch.tensor(list(self.shape), dtype=torch.int64)
        return state

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], prefix: str = "", dtype: torch.dtype = torch.float32
    ) -> NF4Weight:
        """The inverse of :meth:`state_dict`.

        Raises:
            KeyError: when a piece is missing.
            ValueError, TypeError: when a piece's shape or dtype is not that of the format, or a constant is not finite.
            RuntimeError: when the memory of one was freed.
        """
        for name in ("packed", "absmax", "shape"):
            if prefix + name not in state:
                raise KeyError(f"no tensor '{prefix + name}': not an NF4 weight, or one that is incomplete")
        for name in (*PIECES, "shape"):
            tensor = state.get(prefix + name)
            if tensor is None and name in PIECES[2:]:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"'{prefix}{name}' should be a tensor, found {type(tensor).__name__}")
            if tensor.layout is not torch.strided:
                raise ValueError(f"'{prefix}{name}' should be a dense tensor, found {tensor.layout}")
            dispatcher.require_memory(f"'{prefix}{name}'", tensor)
        shape = state[prefix + "shape"]
        if shape.dtype != torch.int64 or shape.numel() != 2 or shape.is_meta:
            found = f"{shape.dtype} {list(shape.shape)} on {shape.device}"
            raise ValueError(f"'{prefix}shape' should be int64 [2] with its data, found {found}")
        n, k = (int(size) for size in shape.flatten())
        nested_absmax, nested_offset, nested_table = (state.get(prefix + name) for name in PIECES[2:])
        weight = cls(
            state[prefix + "packed"],
            state[prefix + "absmax"],
            nested_absmax,
            nested_offset,
            nested_table,
            torch.Size((n, k)),
            dtype,
        )
        ops.check_weight(*weight.pieces, *weight.shape)
        check_constants({prefix + name: piece for name, piece in zip(PIECES, weight.pieces, strict=True)})
        return weight

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all."""
        from ..storage.formats import save_safetensors

        save_safetensors(self.state_dict(), path, metadata={"format": "qlora_kernels.nf4", "dtype": str(self.dtype)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> NF4Weight:
        """Reads what :meth:`save` wrote.

        Raises:
            OSError: when it cannot be read.
            ValueError: for a truncated or foreign file, and for constants that are not finite.
        """
        from ..storage.formats import load_safetensors

        tensors, metadata = load_safetensors(path)
        try:
            weight = cls.from_state_dict(tensors)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error.args[0]}") from None
        name = metadata.get("dtype", "torch.float32")
        if name not in _DTYPES:
            raise ValueError(
                f"{os.fspath(path)}: the dtype in the metadata should be one of {', '.join(_DTYPES)}, found {name!r}"
            )
        return weight.to(device, _DTYPES[name])

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={tuple(self.shape)}, bits_per_weight={self.bits_per_weight:.3f}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )


def quantize(
    weight: torch.Tensor,
    double_quant: bool = True,
    *,
    nested_table: torch.Tensor | None = None,
    name: str = "weight",
) -> NF4Weight:
    """Quantizes a weight to NF4: block 64, and by default its constants to FP8, block 256.

    Equivalent in plain torch, with ``levels`` the 16 NF4 levels (any K; blocks run over the flat tensor)::

        blocks = weight.float().reshape(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        codes = (blocks / absmax).unsqueeze(-1).sub(levels).abs().argmin(-1)

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.
        double_quant: store the constants in 8 bits (4.127 bits per weight) rather than float32 (4.5).
        nested_table: float32 [256], another table for the second level, entries in [-1, 1].
        name: what to call the tensor in errors.

    Returns:
        The quantized weight, on the same device.

    Raises:
        TypeError: for a dtype other than those three.
        ValueError: for a tensor that is not two-dimensional, is empty, or holds NaN or infinity (with the first
            bad index).
    """
    require(isinstance(weight, torch.Tensor), TypeError, f"{name} should be a tensor, found {type(weight).__name__}")
    require(
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16),
        TypeError,
        f"{name} should be float32, bfloat16 or float16 to be quantized, found {weight.dtype}",
    )
    require(weight.dim() == 2, ValueError, f"{name} should be [N, K], found shape {list(weight.shape)}")
    require(weight.numel() > 0, ValueError, f"{name} is empty: shape {list(weight.shape)}")
    require(
        double_quant or nested_table is None,
        ValueError,
        "nested_table was given, but double_quant=False has no use for it",
    )
    weight = dispatcher.contiguous(name, weight.detach())
    if double_quant:
        if nested_table is None:
            nested_table = default_nested_table(weight.device)
        elif isinstance(nested_table, torch.Tensor) and not backend_for(nested_table).capturing(nested_table.device):
            dispatcher.require_memory("nested_table", nested_table)
            finite = nested_table.is_meta or bool(nested_table.isfinite().all())
            require(finite, ValueError, "nested_table holds a value that is not finite")
        packed, absmax, nested_absmax, nested_offset = ops.quantize_nested(weight, nested_table, name)
    else:
        packed, absmax = ops.quantize(weight, name)
        nested_absmax = nested_offset = None
    ops.check_finite(weight, absmax if nested_offset is None else nested_offset, name)
    return NF4Weight(packed, absmax, nested_absmax, nested_offset, nested_table, weight.shape, weight.dtype)


def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight; see :meth:`NF4Weight.dequantize`."""
    return weight.dequantize(dtype, out=out)


_tables: dict[torch.device, Tensor] = {}


def default_nested_table(device: str | torch.device = "cpu") -> Tensor:
    """The second-level table, float32 [256]: entry b is the FP8 E4M3 value of byte b, divided by 448.

    Every call for one device returns the same tensor.
    """
    device = torch.device(device)
    # Under a mode such as FakeTensorMode a tensor is something else, and nothing to keep.
    no_mode = not dispatcher.has_mode()
    if no_mode and device.type == "cuda" and device.index is None:  # the current one, another at the next call perhaps
        device = torch.device("cuda", torch.cuda.current_device())
    if no_mode and device in _tables:
        return _tables[device]
    # Kept for good, so not an inference tensor, which autograd could not save; nor on a default device.
    with torch.inference_mode(False):
        table = torch.tensor(extension.native().e4m3_table(), dtype=torch.float32, device="cpu").to(device)
    if no_mode:
        _tables[device] = table
    return table


def check_range(weight: NF4Weight, name: str) -> None:
    """Refuses a weight whose rounded block constants have become larger than its type can say.

    Double quantization rounds a constant up by 1/28 at most, so only values above 0.96 of the largest are concerned.

    Raises:
        ValueError: naming the weight.
    """
    if weight.nested_absmax is None or weight.nested_offset is None or weight.is_meta:
        return
    limit = torch.finfo(weight.dtype).max
    # No constant exceeds this sum, and computing it reads only 1/16384 as many numbers as the weight has.
    if (weight.nested_absmax.max() + weight.nested_offset).item() <= limit:
        return
    if reference.decode_absmax(weight.pieces).to(weight.dtype).isinf().any():
        raise ValueError(
            f"{name} holds values so near the largest {weight.dtype}, {limit:.5g}, that double quantization rounds "
            "them to infinity; use double_quant=False"
        )


def meta_weight(n: int, k: int, double_quant: bool, nf4_levels: bool = True) -> NF4Weight:
    """The shapes of a quantized weight [n, k], on the meta device; without ``nf4_levels`` with room for its own."""
    own = 0 if nf4_levels else 16
    blocks = -(-n * k // BLOCK_SIZE)
    packed = torch.empty((n * k + 1) // 2, dtype=torch.uint8, device="meta")
    shape = torch.Size((n, k))
    if not double_quant:
        absmax = torch.empty(blocks, dtype=torch.float32, device="meta")
        levels = torch.empty(own, dtype=torch.float32, device="meta") if own else None
        return NF4Weight(packed, absmax, None, None, levels, shape)
    codes = torch.empty(blocks, dtype=torch.uint8, device="meta")
    sizes = (-(-blocks // NESTED_BLOCK_SIZE), 1, 256 + own)
    nested_absmax, nested_offset, nested_table = (
        torch.empty(size, dtype=torch.float32, device="meta") for size in sizes
    )
    return NF4Weight(packed, codes, nested_absmax, nested_offset, nested_table, shape)
