"""What contenders are called in results and tables."""

from __future__ import annotations

DENSE = "torch dense"
BNB = "bitsandbytes"
BNB_EVAL = "bitsandbytes, eval-mode layer"
PEFT = "PEFT + bitsandbytes"
PEFT_EVAL = "PEFT + bitsandbytes, eval mode"
DEQUANTIZED = "dequantize, then dense"
COPY = "plain copy"
PRODUCT = "dense product"
#: A copy reads what it is about to overwrite, too, where the processor does not know better; this does not.
IN_PLACE = "scaling in place"
FUSED = "torch fused"
FOREACH = "torch foreach"
#: A copy of as many bytes as this package's call must move, half read and half written; on a card, by a kernel.
EQUAL_COPY = "copy of as many bytes"
#: On a card: quantize() without that look.
KERNEL = "qlora_kernels, kernel alone"
#: The same work without the adapter: the difference is what the adapter costs.
NO_ADAPTER = "qlora_kernels, no adapter"
OURS_8BIT = "qlora_kernels, 8-bit states"
#: On a card: pinned memory comes to it, as many bytes as this package's step pages.
LINK = "copy over the host link"
#: Not rivals: they show how far the roof is.
ROOFS = (COPY, EQUAL_COPY, IN_PLACE, PRODUCT, LINK)
