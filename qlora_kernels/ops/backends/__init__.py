"""Backends: tensors to raw pointers, one for each kind of device. What arrives here has been checked in ops."""

from .choose import backend_for, cuda, forced, forced_backend
from .cpu import CPU
from .cuda import CUDA
from .pointers import non_finite
from .protocol import Backend

__all__ = ["CPU", "CUDA", "Backend", "backend_for", "cuda", "forced", "forced_backend", "non_finite"]
