"""PEFT on top of QLinear: ``get_peft_model`` and the rest of PEFT work on 4-bit layers after ``import qlora_kernels``.

Nothing here imports PEFT: what has to change in it is changed when the user imports it.
"""

from __future__ import annotations

from ..import_hooks import when_imported
from . import patches

__all__ = ["register"]


def register() -> None:
    """Has PEFT's modules changed as they are imported, or now if they are already."""
    for module_name, change in patches.CHANGES.items():
        when_imported(module_name, change)
