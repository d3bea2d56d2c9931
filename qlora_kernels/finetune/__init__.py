"""The fine-tuning command: one whole QLoRA run, from a 16-bit model and a text to an adapter and a report.

:func:`qlora_kernels.finetune.run.finetune` does it, with the help of the other files. transformers is imported only
when a run needs it.
"""

from .options import Options, Settings

__all__ = ["Options", "Settings"]
