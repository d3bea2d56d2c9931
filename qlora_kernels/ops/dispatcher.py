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
_get_tracing_state = _C._get_tracing_state
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


def is_idle(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Whether the dispatcher has only to find the kernel for operands on the CPU or a CUDA device: all of them are
    ordinary tensors, and no mode, transform, tracer or profiler is watching."""
    return (
        not _is_compiling()
        and (x.is_cpu or x.is_cuda)
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and innermost_transform() is None
        and _get_tracing_state() is None
        and not _profiler_enabled()
        and type(x) in _PLAIN
        and _PLAIN.issuperset(map(type, others))
    )
