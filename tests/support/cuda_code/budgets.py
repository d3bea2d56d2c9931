"""What each CUDA kernel may take, and what it promises: held against the compiled code by test_static_gates.py."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field

#: Threads that a multiprocessor holds, by architecture; 2048 where nothing is said
#: (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
MAX_THREADS = {"75": 1024, "86": 1536, "87": 1536, "89": 1536, "120": 1536, "121": 1536}
REGISTERS = 65536  # of a multiprocessor; dealt out in steps of 8 a thread
#: KiB of shared memory that a block may have; 227 where nothing is said (the same table).
MAX_SHARED = {"75": 64, "80": 163, "86": 99, "87": 163, "89": 99, "120": 99, "121": 99}
#: Kernels that multiply on tensor cores, which take bf16 from sm_80 on.
ON_TENSOR_CORES = (
    "few_kernel",
    "middle_kernel",
    "gemm_kernel",
    "grouped_gemm_kernel",
    "adapter_down_kernel",
    "adapter_gradient_kernel",
)


def number_of(architecture: str) -> str:
    """The "90" of "sm_90a"."""
    return re.search(r"\d+", architecture)[0]


@dataclass(frozen=True)
class LoopBudget:
    """What a warp may issue in a step of the main loop (bench/compiled/loops.py)."""

    #: HMMA, exactly: outputs of the thread block * depth of a step / warps / (16 * 8 * 16). On sm_75, where each has
    #: half the depth, twice as many.
    hmma: int
    #: Instructions that neither multiply nor decode.
    outside: float
    #: Instructions that decode, for each weight: 3.3 with tables in registers, made for a whole block at a time.
    slots: float = 3.3


@dataclass(frozen=True)
class Budget:
    #: So many threads, or as many as it holds at all, are to have room on a multiprocessor: that bounds the registers.
    threads: int
    #: Dynamic bytes of a block. Static ones are not used.
    shared: int
    reason: str
    #: Global loads of 128 bits, at least: as many as the code of the aligned path has.
    loads_128: int = 0
    #: Global stores of 128 bits, at least: as many as a thread makes. Where promised, no path has narrower ones, too.
    stores_128: int = 0
    #: Of kernels that bench.compiled.static.LOOPS lists.
    loop: LoopBudget | None = None
    #: The least shared memory that a launch asks for, where that is not always the same.
    least_shared: int | None = None
    #: Other ``threads``, by architecture.
    threads_on: dict[str, int] = field(default_factory=dict)

    def registers(self, architecture: str) -> int:
        """What a thread may take on an architecture, "sm_90a"."""
        number = number_of(architecture)
        return REGISTERS // min(self.threads_on.get(number, self.threads), MAX_THREADS.get(number, 2048)) // 8 * 8

    def runs(self, row: dict) -> bool:
        """Whether a kernel is ever launched on an architecture, by its row of the table. If not, it must have no code
        there (csrc/cuda/common/compiled.cuh)."""
        base, _, arguments = row["kernel"].partition("<")
        number = number_of(row["arch"])
        if base == "warpgroup_kernel" and row["arch"] != "sm_90a":
            return False
        if base in ON_TENSOR_CORES and arguments.startswith("bf16") and int(number) < 80:
            return False
        return (self.least_shared or row["shared_dynamic"]) <= MAX_SHARED.get(number, 227) * 1024


_FULL = "every thread that the multiprocessor holds: a warp has but 512 bytes of codes under way"
_TAILS = "unaligned ranges: launched as the aligned kernel is"
_QUANTIZE = "five blocks: while a thread works on 16 bytes it has the next 16 under way, in registers"
_STEP = "four blocks: 64 bytes a thread under way are 64 KiB, twice what the latency of memory takes at 4.3 TB/s"
_CODES = "three blocks: eight elements a lane, and codes to find"

_SUMS = "one block: 128 sums a thread, 16 + 8 operands, and 8 registers of tables"
#: With 128 columns a thread makes a table for half a block.
_HALF = 3.9
_MIDDLE = "one block: its tiles are spread over the card, one for each multiprocessor"
_GROUPS = "one block: two warpgroups multiply, one brings x"
_EXPERTS = "one block: two parts, the second of decoded weights, and an expert's addresses"
_TWO = "two blocks: one multiplies while the other waits"

#: By kernel, where * stands for anything; the first that fits.
BUDGETS = {
    "absmax_sums_kernel": Budget(2048, 0, "every thread that the multiprocessor holds: it only reads"),
    "dequantize_kernel<bf16, true>": Budget(2048, 4096, _FULL, loads_128=1, stores_128=4),
    "dequantize_kernel<fp16, true>": Budget(2048, 4096, _FULL, loads_128=1, stores_128=4),
    "dequantize_kernel<float, true>": Budget(2048, 4096, _FULL, loads_128=1, stores_128=8),
    "dequantize_kernel<bf16, false>": Budget(2048, 4096, _TAILS),
    "dequantize_kernel<fp16, false>": Budget(2048, 4096, _TAILS),
    "dequantize_kernel<float, false>": Budget(2048, 4096, _TAILS),
    # Loads: of four elements parameter, gradient and moments, of 16-bit types moments and the master copy. A chunk's
    # tail has narrow accesses.
    "optimizer_step_kernel<AdamW, 32>": Budget(1024, 64, _STEP, loads_128=8),
    "optimizer_step_kernel<Lion, 32>": Budget(1024, 64, _STEP, loads_128=5),
    "optimizer_step_kernel<AdamW, 8>": Budget(
        768, 7296, _CODES + "; two on sm_120 (optimizer.cuh)", threads_on={"120": 512}
    ),
    "optimizer_step_kernel<Lion, 8>": Budget(768, 7296, _CODES),
    "optimizer_norm_kernel": Budget(1024, 80, "four blocks: it only reads"),
    "quantize_absmax_kernel": Budget(
        512, 37 * 1024, "two blocks, as many as are launched; 2 x 38 KiB fit everywhere but on sm_75, which has 64"
    ),
    # Two loads: the first unit's and, in the loop, the next one's.
    "quantize_kernel<bf16>": Budget(1280, 4160, _QUANTIZE, loads_128=2),
    "quantize_kernel<fp16>": Budget(1280, 4160, _QUANTIZE, loads_128=2),
    "quantize_kernel<float>": Budget(1280, 4160, _QUANTIZE, loads_128=2),
    # 16 warps, whose codes of two chunks are under way: 32 KiB. Shared memory: the table, and x at M = 8, K = 4096. A
    # turn is two chunks of eight products; one slot a weight, the constants' look-ups, and one FFMA for eight weights.
    "few_kernel<*>": Budget(
        512,
        149 * 1024,
        "one block: codes of two chunks under way, 20 registers, and 32 addresses or pairs of levels",
        loads_128=1,
        loop=LoopBudget(16, outside=160, slots=1.2),
        least_shared=65 * 1024 + 10 * 256,  # M = 1, K = 64
    ),
    # Shared memory: the table with x in its gaps, and constants. A step is 64 columns by 64 of K for a warp: one slot a
    # weight, the constants' look-ups, and 1/8 FFMA for each 8 rows of x.
    "middle_kernel<*, MiddleTraits<*, 32, *>>": Budget(
        256,
        74 * 1024,
        "one block: 64 sums a thread, 32 registers of x, as many of codes of two steps, 12 of constants under way",
        loop=LoopBudget(64, 200, 1.7),
    ),
    "middle_kernel<*, MiddleTraits<*, 16, *>>": Budget(256, 74 * 1024, _MIDDLE, loop=LoopBudget(32, 175, 1.4)),
    "middle_kernel<*, MiddleTraits<*, 8, *>>": Budget(256, 74 * 1024, _MIDDLE, loop=LoopBudget(16, 160, 1.3)),
    # Shared memory: the stages of x, results, and the table. A step is a block of 64 in depth, four products: one slot
    # a weight, the constants' look-ups, and 1/4 FFMA for each 16 rows of x.
    "warpgroup_kernel<*, WarpgroupTraits<*, 16, *>>": Budget(384, 128 * 1024, _GROUPS, loop=LoopBudget(4, 40, 1.4)),
    "warpgroup_kernel<*, WarpgroupTraits<*, 32, *>>": Budget(384, 128 * 1024, _GROUPS, loop=LoopBudget(4, 45, 1.7)),
    "warpgroup_kernel<*, WarpgroupTraits<*, 64, *>>": Budget(384, 128 * 1024, _GROUPS, loop=LoopBudget(4, 50, 2.2)),
    "warpgroup_kernel<*, WarpgroupTraits<*, 128, *>>": Budget(384, 192 * 1024, _GROUPS, loop=LoopBudget(4, 60, 3.2)),
    # Shared memory: the stages of operands, and two of decoded weights.
    "gemm_kernel<*, GemmTraits<*, 128, 256, 2, 4>>": Budget(256, 160 * 1024, _SUMS, loop=LoopBudget(128, outside=210)),
    "gemm_kernel<*, GemmTraits<*, 128, 128, 2, 4>>": Budget(256, 112 * 1024, _SUMS, loop=LoopBudget(64, 180, _HALF)),
    "gemm_kernel<*, GemmTraits<*, 128, 128, 2, 3>>": Budget(
        256, 92 * 1024, _SUMS + "; for the 99 KiB of sm_86 and sm_89", loop=LoopBudget(64, 180, _HALF)
    ),
    "grouped_gemm_kernel<*, GemmTraits<*, 128, 128, 2, 3>>": Budget(
        256, 92 * 1024, _SUMS + "; for the 99 KiB of sm_86 and sm_89", loop=LoopBudget(64, 180, _HALF)
    ),
    # On sm_80 forward a step decodes in 125 instructions, 120 in the plain kernel's.
    "grouped_gemm_kernel<*, GemmTraits<*, 16, 128, 1, 4>>": Budget(512, 56 * 1024, _TWO, loop=LoopBudget(8, 160, 3.95)),
    "gemm_kernel<*, GemmTraits<*, 64, 128, 2, 4>>": Budget(
        256, 80 * 1024, "one block: 64 sums a thread", loop=LoopBudget(32, 165, _HALF)
    ),
    "gemm_kernel<*, GemmTraits<*, 32, 128, 1, 4>>": Budget(512, 64 * 1024, _TWO, loop=LoopBudget(16, 160, _HALF)),
    "gemm_kernel<*, GemmTraits<*, 16, 128, 1, 4>>": Budget(512, 56 * 1024, _TWO, loop=LoopBudget(8, 160, _HALF)),
    # Shared memory: the stages of big and, but for dA and dB alone, of the adapter; two tiles of u or v.
    "adapter_down_kernel<*, AdapterTraits<*, 16, 3, true, false, *>>": Budget(512, 55 * 1024, _TWO),
    "adapter_down_kernel<*, AdapterTraits<*, 32, 4, true, false, *>>": Budget(512, 81 * 1024, _TWO),
    "adapter_gradient_kernel<*, AdapterTraits<*, 16, 3, *, true, true>>": Budget(512, 63 * 1024, _TWO),
    "adapter_gradient_kernel<*, AdapterTraits<*, 32, 4, *, true, true>>": Budget(
        256, 97 * 1024, "one block: 64 sums of the gradient a thread, 16 of v"
    ),
    "adapter_sum_kernel<*>": Budget(512, 0, "two blocks: 16 parts of four sums under way"),
    "narrow_kernel<*>": Budget(2048, 0, "all of a multiprocessor's threads: it waits for memory alone", loads_128=1),
    "product_kernel<InputGradientProduct<*>>": Budget(
        256, 17 * 1024, "one block: two parts, the second of decoded weights"
    ),
    "grouped_product_kernel<ForwardProduct<*>>": Budget(256, 17 * 1024, _EXPERTS),
    "grouped_product_kernel<InputGradientProduct<*>>": Budget(256, 17 * 1024, _EXPERTS),
    "grouped_product_kernel<*>": Budget(512, 17 * 1024, "two blocks: one multiplies while the other loads"),
    "product_kernel<*>": Budget(512, 17 * 1024, "two blocks: one multiplies while the other loads"),
}


def budget_of(kernel: str) -> Budget | None:
    return next((budget for pattern, budget in BUDGETS.items() if fnmatch.fnmatchcase(kernel, pattern)), None)
