"""What a prediction is made of besides a card's rates and compiled code, and where each term is from."""

from __future__ import annotations

from bench.compiled.cards import HOPPER_MMA_SYNC, HOPPER_WGMMA

LABEL = "prediction, no card has shown this"

#: Lanes of an SM's integer and logic pipe (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions").
ALU_LANES = 64
#: A load under load takes this many times its latency.
LOADED = 2.0
#: Clocks from the last warp's arrival at a barrier to a full tensor pipe: the barrier, ldmatrix, one product. What
#: ldmatrix takes of these is left out where the first products have their operands in registers by then.
BARRIER_CLOCKS, LDSM_CLOCKS = 80, 30
#: Clocks of a load from shared memory.
LOOKUP_CLOCKS = 30
#: Passes of a constant load by lane: half of them read one address, half read 16. One clock each.
PASSES = (1 + 16) / 2
#: What the blocks that share a tile take to find out which is the last, with MEMBAR.SC; and two barriers of a cluster
#: with a trip between its multiprocessors.
MEMBAR_US, CLUSTER_US = 2.5, 0.6
#: The same with a ticket and fences that release and acquire (MEMBAR.ALL.GPU in compiled code): so many trips to
#: memory, one after the other. Stores, the fence, two atomic operations, loads; L2 answers in about half that time.
TICKET_TRIPS = 5
#: Of these, what a block takes that is not the last.
EARLIER_TRIPS = 3
#: Bytes a clock that one multiprocessor reads from L2, or from another's shared memory.
SM_BYTES = 64

#: From one launch's end to the first load of the next, where that needs the first; of ours and of others.
BETWEEN_US = 1.0

COUNTED, PUBLISHED, ASSUMED = "counted", "published", "assumed"
#: Where each term is from.
TERMS = {
    "instructions": (COUNTED, "of a step, by pipe and part, in compiled code (the static table)"),
    "bytes and tiles": (COUNTED, "by the kernels' layouts; tiles and blocks that share them by dispatch.h itself"),
    "shared memory": (COUNTED, "bytes by the layouts, 128 a clock; no bank conflicts, as the emulator counts"),
    "rates of a card": (PUBLISHED, "data sheets and white papers; latency: arXiv 2402.13499"),
    "copies, dense": (PUBLISHED, "4.3 TB/s and 790 TFLOP/s on an H200"),
    "mma.sync": (PUBLISHED, f"{HOPPER_MMA_SYNC:.0%} of the tensor rate on Hopper; others say up to 75%"),
    "wgmma": (ASSUMED, f"{HOPPER_WGMMA:.0%} of the tensor rate, as FP8 products of that kind are published to reach"),
    "ALU": (PUBLISHED, f"{ALU_LANES} lanes a clock and SM"),
    "IMAD": (ASSUMED, "half counts for the ALU, half for the FMA pipe"),
    "other cards": (ASSUMED, "reach an H200's shares of their data sheets, and mma.sync the rate of a dense product"),
    "RTX 3090, RTX 5090": (ASSUMED, "an RTX 4090's latency"),
    "sm_86, sm_89, sm_120": (ASSUMED, "the code of sm_80, where the static table lacks theirs"),
    "overlap": (ASSUMED, "perfect within a part of a step, none between parts; schedulers issue in every clock"),
    "barrier of a pair": (
        ASSUMED,
        "nothing: two warps wait for each other, and schedulers have one of another pair",
    ),
    "barrier": (
        ASSUMED,
        f"{BARRIER_CLOCKS} clocks until the tensor cores are busy again, {LDSM_CLOCKS} of them ldmatrix",
    ),
    "warpgroups": (ASSUMED, "a warpgroup's products, waiting for them and scaling their sums come one after the other"),
    "latency": (ASSUMED, f"{LOADED:g} times the published one under load"),
    "fill": (
        ASSUMED,
        "loads that wait for each other, the table, x of few rows, the first decoding, one after the other",
    ),
    "constants by lane": (ASSUMED, f"{PASSES} passes a load and warp, one clock each: the upper end of estimates"),
    "tail": (
        ASSUMED,
        f"{CLUSTER_US} us in a cluster, {TICKET_TRIPS} trips to memory with a ticket, {MEMBAR_US} us with MEMBAR.SC; "
        f"sums of parts at {SM_BYTES} bytes a clock",
    ),
    "clock": (ASSUMED, "the data sheet's, held under load"),
    "L2": (ASSUMED, "5120 bytes a clock, as A100's"),
    "launches": (ASSUMED, f"the first is left out; {BETWEEN_US:g} us from one to the next that needs it"),
    "dense product": (ASSUMED, "neither fill nor tail nor tiles, which favours the other side"),
    "bitsandbytes, separate": (ASSUMED, "bytes and multiplications alone, which favours the other side"),
    "adapter kernels": (ASSUMED, "bytes, two latencies and a tail each; their instructions are not counted"),
}


def sources() -> str:
    """Where every term is from, the assumptions last."""
    lines = ["Where the terms are from (a column with * rests on an assumption):"]
    for kind in (COUNTED, PUBLISHED, ASSUMED):
        lines += [f"  {kind:9}  {term}: {words}" for term, (source, words) in TERMS.items() if source == kind]
    return "\n".join([*lines, ""])
