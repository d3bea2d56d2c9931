"""What contenders are called in results and tables."""

from __future__ import annotations

DENSE = "torch dense"
#: The same weight and rows in float32, where the point is in bf16: faster where the processor has no bf16 products.
DENSE_F32 = "torch dense float32"
#: Other 4-bit formats: level * scale + zero for 64 weights (torch), level * scale for 32 with rows of x rounded to int8
#: (ggml).
INT4 = "torch int4"
GGML = "ggml Q4_0"
BNB = "bitsandbytes"
BNB_EVAL = "bitsandbytes, eval-mode layer"
PEFT = "PEFT + bitsandbytes"
PEFT_EVAL = "PEFT + bitsandbytes, eval mode"
DEQUANTIZED = "dequantize, then dense"
COPY = "plain copy"
PRODUCT = "dense product"
PRODUCT_F32 = "dense float32 product"
#: Which of these is fastest differs between machines; the best of them counts.
READ_SUM = "read, sum"
READ_GREATEST = "read, greatest"
READ_DOT = "read, dot product"
READS = (READ_SUM, READ_GREATEST, READ_DOT)
#: A copy reads what it is about to overwrite, too, where the processor does not know better; this does not.
IN_PLACE = "scaling in place"
FUSED = "torch fused"
FOREACH = "torch foreach"
#: A copy of as many bytes as this package's call must move, half read and half written; on a card, by a kernel.
EQUAL_COPY = "copy of as many bytes"
#: On a card: quantize() without that look.
KERNEL = "qlora_kernels, kernel alone"
#: A mixture's experts one after another, each a layer of its own.
LOOP = "qlora_kernels, a loop over layers"
#: The same work without the adapter: the difference is what the adapter costs.
NO_ADAPTER = "qlora_kernels, no adapter"
OURS_8BIT = "qlora_kernels, 8-bit states"
#: On a card: pinned memory comes to it, as many bytes as this package's step pages.
LINK = "copy over the host link"
#: Not rivals: they show how far the roof is.
ROOFS = (COPY, EQUAL_COPY, IN_PLACE, PRODUCT, PRODUCT_F32, LINK, *READS)
#: Bars against the faster of several, by a name of their own.
BEST_DENSE = "better of torch's dense products"
BEST_BNB = "better of bitsandbytes' layers"
BEST_OF = {BEST_DENSE: (DENSE, DENSE_F32), BEST_BNB: (BNB, BNB_EVAL)}
