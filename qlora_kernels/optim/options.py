"""Options of a paged optimizer: checked and converted once, then frozen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from ..errors import require, require_number


@dataclass(frozen=True)
class Options:
    """How a paged optimizer keeps its states and treats gradients; PagedAdamW explains each option.

    numpy's numbers become Python's, ``page_file`` becomes an absolute path.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a switch that is neither True nor False.
        NotADirectoryError: if ``page_file`` is not a folder.
    """

    state_bits: int = 32
    max_grad_norm: float | None = None
    page_budget: int | None = None
    master_weights: bool = False
    skip_nonfinite: bool = False
    page_file: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        bits, norm, budget, folder = self.state_bits, self.max_grad_norm, self.page_budget, self.page_file
        known = isinstance(bits, Integral) and bits in (32, 8)
        require(known, ValueError, f"state_bits should be 32 or 8, found {bits!r}")
        if norm is not None:
            require_number("max_grad_norm", norm, lambda x: x > 0, "above 0")
        if budget is not None:
            in_range = isinstance(budget, Integral) and not isinstance(budget, bool) and budget > 0
            require(in_range, ValueError, f"page_budget should be a number of bytes above 0, found {budget!r}")
        for name in ("master_weights", "skip_nonfinite"):
            value = getattr(self, name)
            require(isinstance(value, (bool, np.bool_)), TypeError, f"{name} should be True or False, found {value!r}")
        if folder is not None:
            require(bool(os.fspath(folder)), ValueError, "page_file should be a folder, found ''")
            folder = os.path.abspath(os.fspath(folder))
            is_folder = os.path.isdir(folder)
            require(is_folder, NotADirectoryError, f"page_file should be a folder; {folder} is not one")
        converted = {
            "state_bits": int(bits),
            "max_grad_norm": None if norm is None else float(norm),
            "page_budget": None if budget is None else int(budget),
            "master_weights": bool(self.master_weights),
            "skip_nonfinite": bool(self.skip_nonfinite),
            "page_file": folder,
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    @property
    def needs_norm(self) -> bool:
        """Whether a step has to measure all gradients before it changes anything."""
        return self.max_grad_norm is not None or self.skip_nonfinite
