"""The fine-tuning command: one whole QLoRA run, from a 16-bit model and a text to an adapter and a report.

:func:`qlora_kernels.finetune.run.finetune` carries it through; the other files are its parts. Imports are lazy:
nothing here loads transformers until a run needs it.
"""

from .options import Options

__all__ = ["Options"]
