"""Queries to torch's dispatcher, through private names that another release may change."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_C = cast(Any, torch._C)
_is_compiling = torch.compiler.is_compiling
_len_torch_dispatch_stack = _C._len_torch_dispatch_stack
_len_torch_function_stack = _C._len_torch_function_stack
_profiler_enabled = cast(Any, torch.autograd)._profiler_enabled

#: The innermost transform of torch.func, or None.
innermost_transform: Any = _C._functorch.peek_interpreter_stack
#: A tensor that has outlived a transform of torch.func, without its wrapper.
unwrap_if_dead: Any = _C._functorch.unwrap_if_dead
#: Whether autocast is on for any device.
is_any_autocast_enabled: Any = _C._is_any_autocast_enabled
#: Arguments of Tensor.to: (device, dtype, non_blocking, memory format).
parse_to: Any = _C._nn._parse_to
#: The address of a CUDA device's current stream, by its ordinal; None in builds of torch without CUDA.
raw_stream_of: Callable[[int], int] | None = getattr(_C, "_cuda_getCurrentRawStream", None)
#: What torch.jit.trace is recording, or None.
tracing_state: Any = _C._get_tracing_state
#: A context in which operations skip their autograd layer.
below_autograd: Any = _C._AutoDispatchBelowAutograd


def has_mode() -> bool:
    """Whether a mode such as FakeTensorMode sees every operation."""
    return _get_current_dispatch_mode() is not None


def has_tangent(x: Tensor) -> bool:
    """Whether a tensor takes part in forward-mode differentiation."""
    forward_mode = cast(Any, forward_ad)
    return forward_mode._current_level >= 0 and forward_mode.unpack_dual(x).tangent is not None


#: Types whose tensors do not intercept operations.
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are ordinary tensors, no subclass among them."""
    return _PLAIN.issuperset(map(type, tensors))


#: No memory that torch allocates lies this low, unless Python itself is loaded there. The address of a tensor whose
#: storage was freed is its offset into the storage.
SUSPICIOUS_ADDRESS = 1 << 40


def _lacks_storage(tensor: Tensor) -> bool:
    return tensor.numel() != 0 and tensor.untyped_storage().data_ptr() == 0


def is_idle(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Whether the dispatcher has only to find the kernel for operands on the CPU or a CUDA device: all of them are
    ordinary tensors in memory, and no mode, transform, tracer or profiler is watching.

    Not so where the storage has been freed, where a tensor of zeros never had one, and where a bit says that the
    numbers are the negatives of those in memory (``torch._neg_view``, the imaginary part of a conjugate).
    """
    if (
        _is_compiling()
        or not (x.is_cpu or x.is_cuda)
        or _len_torch_dispatch_stack() != 0
        or _len_torch_function_stack() != 0
        or innermost_transform() is not None
        or tracing_state() is not None
        or _profiler_enabled()
        or type(x) not in _PLAIN
        or not _PLAIN.issuperset(map(type, others))
    ):
        return False
    try:
        for t in (x, *others):
            if t is not None and (t.is_neg() or (t.data_ptr() < SUSPICIOUS_ADDRESS and _lacks_storage(t))):
                return False
    except RuntimeError:  # from a tensor without storage: a sparse one, or the wrapper that a transform has left
        return False
    return True


def require_memory(name: str, tensor: Tensor | None) -> None:
    """Refuses a tensor whose storage has been freed or cut, where torch itself would read what isn't there.

    To be called before torch copies a tensor, and before a kernel gets its address; not on the way of every call.

    Raises:
        RuntimeError: naming the tensor.
    """
    if (
        tensor is None
        or type(tensor) not in _PLAIN
        or _is_compiling()
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or tensor._is_zerotensor()
        or _C._functorch.is_functorch_wrapped_tensor(tensor)
        or tensor.numel() == 0
    ):
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise RuntimeError(
            f"{name} needs {needed} bytes of memory, and its storage holds {held}: it was freed or made smaller "
            "(untyped_storage().resize_), as FSDP frees parameters between passes"
        )


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """``tensor.contiguous()``, after :func:`require_memory` where that copies."""
    if tensor.is_contiguous():
        return tensor
    require_memory(name, tensor)
    return tensor.contiguous()


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, after :func:`require_memory` where that copies.

    Raises:
        TypeError: for a complex tensor, of which only the real part would remain.
    """
    if tensor.dtype is dtype:
        return tensor
    if tensor.is_complex() and not dtype.is_complex:
        raise TypeError(f"{name} should be real, found {tensor.dtype}")
    require_memory(name, tensor)
    return tensor.to(dtype)


def with_memory(tensor: Tensor) -> Tensor:
    """The tensor, or if it is one of zeros without memory a copy: the dispatcher makes one with strides of 0."""
    return tensor.clone() if not _is_compiling() and tensor._is_zerotensor() else tensor
