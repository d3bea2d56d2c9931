"""The operations' library in torch, ``torch.ops.qlora_kernels``, and what their schemas share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

# Any: torch declares the types of Library's methods only in part.
library = cast(Any, torch.library.Library("qlora_kernels", "DEF"))

#: The pieces of a quantized weight, as a schema names them.
WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? nested_table"
#: What the fused product computes in.
LINEAR_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def define(schema: str, function: Callable[..., Any]) -> Any:
    """Defines an operation that one function serves on the CPU and on CUDA devices, and returns it."""
    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        library.impl(name, function, device)
    return getattr(torch.ops.qlora_kernels, name).default


def fake(name: str) -> Callable[[_Function], _Function]:
    """Decorates the function that gives an operation's result without computing it: shapes, dtypes and device."""
    return cast(Any, torch.library).register_fake(f"qlora_kernels::{name}", lib=library)
