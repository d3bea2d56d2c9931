"""The operations: schema, checks and fake implementation together. Below this file there are only pointers and sizes.

Five operations, each under one name on every floor: ``quantize``, ``quantize_absmax``, ``dequantize``,
``linear_forward`` and ``linear_backward``, all in ``torch.ops.qlora_kernels``; ``quantize_nested`` is the first two in
one (on a GPU, in two launches), ``dequantize_out`` is ``dequantize`` into a tensor that the caller has. A quantized
weight travels as its five pieces (see :class:`qlora_kernels.NF4Weight`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import backends, reference
from .errors import require
from .native import extension

_library = torch.library.Library("qlora_kernels", "DEF")

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? nested_table"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LINEAR_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _blocks(n: int, k: int) -> int:
    return (n * k + 63) // 64


def check_weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
) -> None:
    """Checks the pieces of a quantized weight [n, k] against each other.

    Raises:
        TypeError: when a piece has another dtype than the format's.
        ValueError: when a piece has another size, is on another device, is not contiguous, or is missing.
        RuntimeError: when a piece asks for a gradient.
    """
    if not _weight_fits(packed, absmax, nested_absmax, nested_offset, nested_table, n, k):
        _explain_weight(packed, absmax, nested_absmax, nested_offset, nested_table, n, k)


def _weight_fits(packed, absmax, nested_absmax, nested_offset, nested_table, n, k) -> bool:
    """Whether all is well; on every call, so it builds no messages."""
    blocks = _blocks(n, k)
    device = packed.device
    if not (
        n > 0
        and k > 0
        and packed.dtype is torch.uint8
        and packed.numel() == (n * k + 1) // 2
        and packed.is_contiguous()
        and absmax.numel() == blocks
        and absmax.device == device
        and absmax.is_contiguous()
        and not absmax.requires_grad
    ):
        return False
    if nested_absmax is None or nested_offset is None or nested_table is None:
        return nested_absmax is nested_offset is nested_table is None and absmax.dtype is torch.float32
    return (
        absmax.dtype is torch.uint8
        and nested_absmax.dtype is nested_offset.dtype is nested_table.dtype is torch.float32
        and nested_absmax.numel() == (blocks + 255) // 256
        and nested_offset.numel() == 1
        and nested_table.numel() == 256
        and nested_absmax.device == nested_offset.device == nested_table.device == device
        and nested_absmax.is_contiguous()
        and nested_table.is_contiguous()
        and not (nested_absmax.requires_grad or nested_offset.requires_grad or nested_table.requires_grad)
    )


def _explain_weight(packed, absmax, nested_absmax, nested_offset, nested_table, n, k) -> None:
    """Raises the error for the first thing that is wrong."""
    require(n > 0 and k > 0, ValueError, f"a quantized weight needs N > 0 and K > 0, found [{n}, {k}]")
    blocks = _blocks(n, k)
    nested = (nested_absmax, nested_offset, nested_table)
    expected = [("packed", packed, torch.uint8, (n * k + 1) // 2)]
    if any(piece is None for piece in nested):
        require(
            all(piece is None for piece in nested),
            ValueError,
            "nested_absmax, nested_offset and nested_table come together: all three, or none",
        )
        expected.append(("absmax", absmax, torch.float32, blocks))
    else:
        expected += [
            ("absmax", absmax, torch.uint8, blocks),
            ("nested_absmax", nested_absmax, torch.float32, (blocks + 255) // 256),
            ("nested_offset", nested_offset, torch.float32, 1),
            ("nested_table", nested_table, torch.float32, 256),
        ]
    device = packed.device
    for name, piece, dtype, size in expected:
        if piece.dtype != dtype:
            raise TypeError(f"{name} of a weight [{n}, {k}] should be {dtype}, found {piece.dtype}")
        if piece.numel() != size:
            raise ValueError(f"{name} of a weight [{n}, {k}] should have {size} elements, found {piece.numel()}")
        if piece.device != device:
            raise ValueError(f"packed is on {device}, but {name} on {piece.device}; move the weight as a whole")
        if not piece.is_contiguous():
            raise ValueError(f"{name} should be contiguous")
        if piece.requires_grad:
            raise RuntimeError(f"an NF4 weight is frozen and has no gradient, but {name} asks for one")


def same_pieces(left: tuple[Tensor | None, ...], right: tuple[Tensor | None, ...]) -> bool:
    """Whether these are the same tensors: objects, not values."""
    return (
        left[0] is right[0]
        and left[1] is right[1]
        and left[2] is right[2]
        and left[3] is right[3]
        and left[4] is right[4]
    )


class Operand:
    """A weight [n, k] as the products take it: its five pieces, and what is known of them.

    Checking the pieces takes as long as launching a kernel, and they hardly ever change. So what a check has found is
    kept for as long as they lie where they lay, with as many elements: an exchange of their data (``.data = ...``, a
    move to another device, a freed storage) is seen by that, and checked anew.
    """

    def __init__(self, pieces: tuple[Tensor | None, ...], n: int, k: int) -> None:
        self.pieces, self.n, self.k = pieces, n, k
        self._view: tuple | None = None
        self._sizes: tuple[int, int] | None = None
        self._plain = False
        self.device: torch.device | None = None  # once view() has been asked

    def view(self) -> tuple:
        """The weight as the kernels take it, checked.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`check_weight` does.
        """
        packed, absmax, nested_absmax, nested_offset, nested_table = self.pieces
        if self._view is not None:
            view = backends.view_of(self.pieces, self.n, self.k)
            if view == self._view and (packed.numel(), absmax.numel()) == self._sizes:
                # Bytes cannot ask for a gradient.
                if nested_absmax is None:
                    if not absmax.requires_grad:
                        return view
                elif not (nested_absmax.requires_grad or nested_offset.requires_grad or nested_table.requires_grad):
                    return view
        check_weight(*self.pieces, self.n, self.k)
        view = backends.view_of(self.pieces, self.n, self.k)
        # The view last: another thread that finds it finds the others.
        self._sizes, self.device = (packed.numel(), absmax.numel()), packed.device
        self._view = view
        return view

    def is_plain(self) -> bool:
        """Whether the pieces are tensors of no other kind, which may want to see operations."""
        self._plain = self._plain or _PLAIN.issuperset(map(type, self.pieces))
        return self._plain

    def versions(self) -> tuple[int, ...] | None:
        """Numbers that change when a piece's elements do; None of tensors made in inference mode, which count none."""
        packed, absmax, nested_absmax, nested_offset, nested_table = self.pieces
        try:
            if nested_absmax is None:
                return packed._version, absmax._version
            return (
                packed._version,
                absmax._version,
                nested_absmax._version,
                nested_offset._version,
                nested_table._version,
            )
        except RuntimeError:
            return None


# ---------------------------------------------------------------------------------------------------- quantize

_library.define("quantize(Tensor weight, str name='weight') -> (Tensor packed, Tensor absmax)", tags=_TAGS)


def _check_quantize(weight: Tensor) -> None:
    require(weight.dim() == 2, ValueError, f"weight should be [N, K], found shape {list(weight.shape)}")
    require(
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16),
        TypeError,
        f"weight should be float32, bfloat16 or float16, found {weight.dtype}",
    )
    require(weight.is_contiguous(), ValueError, "weight should be contiguous")


def _quantize(weight: Tensor, name: str = "weight"):
    _check_quantize(weight)
    return backends.of(weight).quantize(weight, name)


@torch.library.register_fake("qlora_kernels::quantize", lib=_library)
def _quantize_fake(weight, name="weight"):
    _check_quantize(weight)
    count = weight.numel()
    return (
        weight.new_empty((count + 1) // 2, dtype=torch.uint8),
        weight.new_empty((count + 63) // 64, dtype=torch.float32),
    )


# ------------------------------------------------------------------------------------------ check of the result


def check_finite(weight: Tensor, constants: Tensor, name: str) -> None:
    """Refuses a weight that has just been quantized and was not finite, where the kernels have not done so.

    On a CUDA device this waits for the launches; while a graph is captured nothing can be waited for, and a weight
    that is not finite decodes to NaN.

    Args:
        weight: what was quantized.
        constants: float32, any number of them that are NaN when a block was not finite.
        name: what to call the weight.
    """
    if backends.of(constants).refuses_non_finite:
        return
    if backends.capturing(constants):
        return
    if not constants.isfinite().all():
        bad = (~weight.isfinite()).nonzero()
        require(len(bad) > 0, ValueError, f"{name} is too near the largest float32 for its constants to be averaged")
        raise backends.non_finite(weight, tuple(bad[0].tolist()), name)


# --------------------------------------------------------------------------------------------- quantize_absmax

_library.define(
    "quantize_absmax(Tensor absmax, Tensor nested_table) -> (Tensor code, Tensor nested_absmax, Tensor nested_offset)",
    tags=_TAGS,
)


def _check_quantize_absmax(absmax: Tensor, nested_table: Tensor) -> None:
    for name, tensor in (("absmax", absmax), ("nested_table", nested_table)):
        require(tensor.dtype == torch.float32, TypeError, f"{name} should be float32, found {tensor.dtype}")
        require(tensor.dim() == 1, ValueError, f"{name} should have one dimension, found {list(tensor.shape)}")
        require(tensor.is_contiguous(), ValueError, f"{name} should be contiguous")
    require(
        nested_table.numel() == 256, ValueError, f"nested_table should have 256 entries, found {nested_table.numel()}"
    )
    require(
        absmax.device == nested_table.device,
        ValueError,
        f"absmax is on {absmax.device}, but nested_table on {nested_table.device}",
    )


def _quantize_absmax(absmax: Tensor, nested_table: Tensor):
    _check_quantize_absmax(absmax, nested_table)
    return backends.of(absmax).quantize_absmax(absmax, nested_table)


@torch.library.register_fake("qlora_kernels::quantize_absmax", lib=_library)
def _quantize_absmax_fake(absmax, nested_table):
    _check_quantize_absmax(absmax, nested_table)
    count = absmax.numel()
    return (
        absmax.new_empty(count, dtype=torch.uint8),
        absmax.new_empty((count + 255) // 256),
        absmax.new_empty(1),
    )


# --------------------------------------------------------------------------------------------- quantize_nested

_library.define(
    "quantize_nested(Tensor weight, Tensor nested_table, str name='weight')"
    " -> (Tensor packed, Tensor code, Tensor nested_absmax, Tensor nested_offset)",
    tags=_TAGS,
)


def _check_quantize_nested(weight: Tensor, nested_table: Tensor) -> None:
    _check_quantize(weight)
    _check_quantize_absmax(weight.new_empty(0, dtype=torch.float32), nested_table)


def _quantize_nested(weight: Tensor, nested_table: Tensor, name: str = "weight"):
    _check_quantize_nested(weight, nested_table)
    return backends.of(weight).quantize_nested(weight, nested_table, name)


@torch.library.register_fake("qlora_kernels::quantize_nested", lib=_library)
def _quantize_nested_fake(weight, nested_table, name="weight"):
    _check_quantize_nested(weight, nested_table)
    packed, absmax = _quantize_fake(weight, name)
    return packed, *_quantize_absmax_fake(absmax, nested_table)


# -------------------------------------------------------------------------------------------------- dequantize

_library.define(
    f"dequantize({_WEIGHT}, SymInt n, SymInt k, ScalarType dtype, SymInt row_begin, SymInt row_end) -> Tensor",
    tags=_TAGS,
)


def _check_dequantize(pieces, n, k, dtype, row_begin, row_end) -> None:
    check_weight(*pieces, n, k)
    require(
        dtype in _LINEAR_DTYPES,
        TypeError,
        f"a weight dequantizes to float32, bfloat16, float16 or float64, not to {dtype}",
    )
    require(
        0 <= row_begin <= row_end <= n,
        ValueError,
        f"rows [{row_begin}, {row_end}) are not within a weight of {n} rows",
    )


def _dequantize(
    packed, absmax, nested_absmax, nested_offset, nested_table, n: int, k: int, dtype, row_begin: int, row_end: int
):
    pieces = (packed, absmax, nested_absmax, nested_offset, nested_table)
    _check_dequantize(pieces, n, k, dtype, row_begin, row_end)
    return backends.of(packed).dequantize(pieces, n, k, dtype, row_begin, row_end)


@torch.library.register_fake("qlora_kernels::dequantize", lib=_library)
def _dequantize_fake(packed, absmax, nested_absmax, nested_offset, nested_table, n, k, dtype, row_begin, row_end):
    _check_dequantize((packed, absmax, nested_absmax, nested_offset, nested_table), n, k, dtype, row_begin, row_end)
    return packed.new_empty((row_end - row_begin, k), dtype=dtype)


_library.define(
    f"dequantize_out({_WEIGHT}, SymInt n, SymInt k, SymInt row_begin, SymInt row_end, Tensor(a!) out) -> ()",
    tags=_TAGS,
)


def _check_dequantize_out(pieces, n, k, row_begin, row_end, out) -> None:
    _check_dequantize(pieces, n, k, out.dtype, row_begin, row_end)
    shape = [row_end - row_begin, k]
    require(list(out.shape) == shape, ValueError, f"out should be {shape}, found {list(out.shape)}")
    device = pieces[0].device
    require(out.device == device, ValueError, f"out is on {out.device}, but the weight on {device}")
    require(out.is_contiguous(), ValueError, "out should be contiguous")
    require(
        not out.requires_grad,
        RuntimeError,
        "out asks for a gradient, which a dequantized weight has none of; give out.detach()",
    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address, and one past the last, of a contiguous tensor."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


def _dequantize_out(
    packed, absmax, nested_absmax, nested_offset, nested_table, n: int, k: int, row_begin: int, row_end: int, out
) -> None:
    pieces = (packed, absmax, nested_absmax, nested_offset, nested_table)
    _check_dequantize_out(pieces, n, k, row_begin, row_end, out)
    begin, end = _span(out)
    for piece in pieces:
        if piece is not None:
            first, last = _span(piece)
            require(end <= first or last <= begin, ValueError, "out shares memory with the weight that it is to hold")
    backends.of(packed).dequantize_out(pieces, n, k, row_begin, row_end, out)
    # What torch's own operations do: backward then refuses a tensor that it saved and that has changed since.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


@torch.library.register_fake("qlora_kernels::dequantize_out", lib=_library)
def _dequantize_out_fake(packed, absmax, nested_absmax, nested_offset, nested_table, n, k, row_begin, row_end, out):
    _check_dequantize_out((packed, absmax, nested_absmax, nested_offset, nested_table), n, k, row_begin, row_end, out)


# ---------------------------------------------------------------------------------------------- linear_forward

_library.define(
    f"linear_forward(Tensor x, {_WEIGHT}, SymInt n, Tensor? bias, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, float dropout, Tensor? seed) -> (Tensor y, Tensor u)",
    tags=_TAGS,
)


def _check_activation(name: str, x: Tensor, columns: int, device: torch.device) -> None:
    """Of at least one dimension; who wants two has asked for them before."""
    if x.dtype not in _LINEAR_DTYPES:
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
    y, u = backends.of(x).linear_forward(x, view, r, bias, lora_A, lora_B, scaling, dropout, seed, True)
    return y, x.new_empty(x.shape[0], 0) if u is None else u


@torch.library.register_fake("qlora_kernels::linear_forward", lib=_library)
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


# --------------------------------------------------------------------------------------------- linear_backward

_library.define(
    f"linear_backward(Tensor dy, {_WEIGHT}, SymInt k, Tensor? x, Tensor? u, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, float dropout, Tensor? seed, bool need_dx, bool need_dA, bool need_dB)"
    " -> (Tensor dx, Tensor dA, Tensor dB)",
    tags=_TAGS,
)


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
    gradients = backends.of(dy).linear_backward(
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


@torch.library.register_fake("qlora_kernels::linear_backward", lib=_library)
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


for _name, _function in (
    ("quantize", _quantize),
    ("quantize_absmax", _quantize_absmax),
    ("quantize_nested", _quantize_nested),
    ("dequantize", _dequantize),
    ("dequantize_out", _dequantize_out),
    ("linear_forward", _linear_forward),
    ("linear_backward", _linear_backward),
):
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")

quantize = torch.ops.qlora_kernels.quantize.default
quantize_absmax = torch.ops.qlora_kernels.quantize_absmax.default
quantize_nested = torch.ops.qlora_kernels.quantize_nested.default
dequantize = torch.ops.qlora_kernels.dequantize.default
dequantize_out = torch.ops.qlora_kernels.dequantize_out.default
linear_forward = torch.ops.qlora_kernels.linear_forward.default
linear_backward = torch.ops.qlora_kernels.linear_backward.default

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


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
        and _PLAIN.issuperset(map(type, tensors))
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
        return backends.of(x).linear_forward(x, view, r, bias, lora_A, lora_B, scaling, dropout, seed, keep_u)
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
        return backends.of(dy).linear_backward(dy, view, r, x, u, lora_A, lora_B, scaling, dropout, seed, *needs)
    rows = dy if dy.dim() == 2 else dy.reshape(-1, weight.n)
    if x is not None and x.dim() != 2:
        x = x.reshape(-1, weight.k)
    dx, dA, dB = linear_backward(rows, *weight.pieces, weight.k, x, u, lora_A, lora_B, scaling, dropout, seed, *needs)
    if need_dx and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.k)
    return dx if need_dx else None, dA if need_dA else None, dB if need_dB else None


_tables: dict[torch.device, Tensor] = {}


def default_nested_table(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256], one tensor for each device: entry b is the FP8 E4M3 value of byte b, divided by 448."""
    device = torch.device(device)
    # Under a mode such as FakeTensorMode a tensor is something else, and nothing to keep.
    plain = _get_current_dispatch_mode() is None
    if plain and device.type == "cuda" and device.index is None:  # the current one, another at the next call perhaps
        device = torch.device("cuda", torch.cuda.current_device())
    if plain and device in _tables:
        return _tables[device]
    # Kept for good, so not an inference tensor, which autograd could not save; nor on a default device.
    with torch.inference_mode(False):
        table = torch.tensor(extension.native().e4m3_table(), dtype=torch.float32, device="cpu").to(device)
    if plain:
        _tables[device] = table
    return table
