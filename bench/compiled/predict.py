"""Predicted times of the layer's products on cards that none has been timed on: bytes, multiplications and issue slots
against a card's rates.

    python -m bench.compiled.predict [--card h200|h100|a100|4090] [--shape N K] [--backward]

The largest of six times is the prediction, and says what binds:

memory   what a product must at least read and write, once, over what a copy reaches
L2       what thread blocks read, over the L2 cache's rate
tensor   multiplications of the tiles, padding included, over the rate of mma.sync
shared   bytes that the main loop moves through shared memory, over 128 a clock
issue    instructions of the main loop, counted by bench/compiled/loops.py, over one per clock and scheduler
latency  steps of the main loop one after the other, with so many copies under way as there are stages for

The last four are those of the SM that has the most tiles. Left out: launching, what comes before and after the main
loop, the sums of blocks that share tiles, the adapter's part, and all waiting of warps for one another. A dense bf16
product is taken at the larger of its own memory and tensor times, without tiles. So both are lower bounds, and ours is
the less complete one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench import text

FOLDER = Path(__file__).resolve().parent.parent / "results"
STATIC = FOLDER / "static-sm80-sm90a.json"
OUT = FOLDER / "predicted.json"
LABEL = "prediction, no card has shown this"

#: What has been reached on an H200, of its data sheet: copying 4.3 of 4.8 TB/s, and 790 of 989.4 TFLOP/s in a large
#: dense bf16 product of random data. Other cards are taken to reach the same shares.
COPY_SHARE = 4.3 / 4.8
DENSE_SHARE = 790 / 989.4
#: mma.sync's share of the rate in the data sheet on Hopper, whose full rate takes wgmma: the average of its shapes on
#: an H800 (arXiv 2501.12084, as others quote it: 62.9%, and 65.3% for 16 x 8 x 16). One tool that multiplies zeros
#: shows nearly all of it on an H100, so a card has to say; tensor_rate.py asks it.
HOPPER_MMA_SYNC = 0.629

#: 4-bit codes, an 8-bit constant for 64 of them, a float32 for 256 constants.
BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
SCHEDULERS = 4
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: N, K: an attention layer's and an MLP's of an 8-billion-parameter Llama.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))


@dataclass(frozen=True)
class Card:
    """What is needed of a card; rates by its data sheet.

    Attributes:
        arch: whose code in the static table stands for it.
        clock: GHz, the one that the tensor rate is stated for.
        memory: TB/s.
        tensor: dense bf16 TFLOP/s with float32 sums.
        mma_sync: the share of that rate that mma.sync has, where power lets it.
        l2_bytes: a clock, of all SMs together.
        latency: clocks of a load that no cache has.
        shared: bytes of an SM, and the most of one thread block.
    """

    name: str
    arch: str
    sms: int
    clock: float
    memory: float
    tensor: float
    mma_sync: float
    l2_bytes: float
    latency: float
    shared: tuple[int, int]

    @property
    def copy_rate(self) -> float:
        """Bytes a second."""
        return self.memory * COPY_SHARE * 1e12

    @property
    def dense_rate(self) -> float:
        """FLOP a second of a dense product."""
        return self.tensor * DENSE_SHARE * 1e12


_KIB = 1024
# SMs, clocks, memory and tensor rates: NVIDIA's data sheets and architecture white papers of A100, H100 and Ada.
# Shared memory: CUDA C++ Programming Guide, technical specifications by compute capability.
# L2: 5120 bytes a clock in A100's white paper, and no other figure for Hopper; the 4090 is taken to have as many.
# Latency: measured in arXiv 2402.13499 (A100, H800, RTX 4090).
CARDS = {
    "h200": Card("H200", "sm_90a", 132, 1.83, 4.8, 989.4, HOPPER_MMA_SYNC, 5120, 479, (228 * _KIB, 227 * _KIB)),
    "h100": Card("H100 SXM", "sm_90a", 132, 1.83, 3.35, 989.4, HOPPER_MMA_SYNC, 5120, 479, (228 * _KIB, 227 * _KIB)),
    "a100": Card("A100 80 GB", "sm_80", 108, 1.41, 2.039, 312.0, 1.0, 5120, 466, (164 * _KIB, 163 * _KIB)),
    "4090": Card("RTX 4090", "sm_80", 128, 2.52, 1.008, 165.2, 1.0, 5120, 542, (100 * _KIB, 99 * _KIB)),
}


@dataclass(frozen=True)
class Launch:
    """The kernel that a product takes, and how its work is cut.

    Attributes:
        name: as csrc/cuda/common/dispatch.h calls it.
        kernel: its name in the static table.
        rows, columns, depth: of a thread block's tile, and of a step.
        stages: of copies.
        splits: thread blocks that share a tile's depth, or that of several tiles.
        shared_tiles: how many.
        whole_tiles: those that a thread block has alone while others are shared.
        warps: of a thread block.
        shared_bytes: moved through shared memory in a step.
        persistent: whether a thread block takes tile after tile.
    """

    name: str
    kernel: str
    rows: int
    columns: int
    depth: int
    stages: int
    splits: int
    warps: int
    shared_bytes: float
    persistent: bool = False
    shared_tiles: int = 1
    whole_tiles: int = 0


def launch_of(card: Card, m: int, n: int, k: int, backward: bool) -> Launch:
    """What csrc/cuda/linear/launch.cu launches for bf16, aligned rows and a double-quantized weight."""
    from qlora_kernels.native import extension

    code = extension.code_of(torch.bfloat16)
    plan = extension.native().dispatch(m, n, k, code, backward, int(card.arch[3:5]), card.sms, card.shared[1])
    if plan["kernel"] == "few":
        slices = 16 // plan["row_tiles"]  # warps that share rows, each with four chunks of 128 in a turn
        columns, depth = 8 * plan["row_tiles"], 4 * 128 * slices
        # For each weight 4 bytes of the table; x, 64 bytes for each row and piece of a chunk, comes to each warp.
        moved = 4 * columns * depth + 16 * 4 * 4 * 64 * m
        return Launch("few", "few_kernel<bf16, true>", 16, columns, depth, 1, 1, 16, moved, persistent=True)
    rows, columns = plan["rows"], plan["columns"]
    if plan["kernel"].startswith("middle"):
        # The same table, for seven of eight weights; x as it comes, and into both groups of warps; the constants,
        # written, and read by each warp.
        depth = 256
        moved = 7 / 8 * 4 * columns * depth + 3 * rows * depth * 2 + 4 * columns * 4 + 8 * 256
        kernel = f"middle_kernel<bf16, MiddleTraits<bf16, {rows}, true>>"
        cut = {"shared_tiles": plan["shared_tiles"]}
        return Launch(plan["kernel"], kernel, rows, columns, depth, plan["stages"], plan["splits"], 8, moved, **cut)
    down, slices = 2 if rows >= 64 else 1, 2 if rows >= 64 and columns == 128 else 1
    traits = f"GemmTraits<bf16, {str(backward).lower()}, {rows}, {columns}, {down}, {plan['stages']}>"
    # Written and read: both operands as they come, the decoded weights, and what each of 8 warps reads of its own.
    per_warp = (rows // down + columns * down * slices // 8) * (64 // slices) * 2
    moved = rows * 128 + columns * 32 * 2 + columns * 128 + 8 * per_warp
    return Launch(
        *(plan["kernel"], f"gemm_kernel<bf16, {traits}>", rows, columns, 64),
        *(plan["stages"], plan["splits"], 8, moved),
        whole_tiles=plan["whole_tiles"],
    )


@cache
def _static() -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["kernel"], row["arch"]): row for row in json.loads(STATIC.read_text())["kernels"]}


def compiled(launch: Launch, card: Card) -> dict[str, Any]:
    """The row of the static table for a kernel."""
    return _static()[launch.kernel, card.arch]


def issued(row: dict[str, Any]) -> float:
    """Instructions that a warp issues in a step of the main loop, by a row of the static table."""
    return row["step_hmma"] + row["step_decode"] + row["step_outside"]


def blocks_at_once(card: Card, row: dict[str, Any], warps: int) -> int:
    """Thread blocks of so many warps that an SM holds at the same time. Each takes 1 KiB of shared memory more than it
    asks for (CUDA C++ Programming Guide)."""
    by_registers = 65536 // (-(-row["registers"] // 8) * 8 * 32 * warps)
    by_shared = card.shared[0] // (row["shared_dynamic"] + 1024)
    return max(1, min(by_registers, by_shared))


def product_bytes(m: int, n: int, k: int, bits: float) -> float:
    """What y = x W^T must read and write, x and y in 16 bits."""
    return n * k * bits / 8 + 2 * m * k + 2 * m * n


@dataclass(frozen=True)
class _Work:
    """What a launch's SM with the most work does.

    Attributes:
        tiles: of the whole product.
        whole: steps of a tile.
        most: thread blocks or, of a persistent one, tiles that this SM takes one after the other.
        steps: of its main loops.
        waits: for memory, one after the other.
    """

    tiles: int
    whole: float
    most: int
    steps: float
    waits: float


def _work(card: Card, launch: Launch, row: dict[str, Any], m: int, columns: int, depth: int) -> _Work:
    # A copy is asked for so many steps before it is waited for.
    ahead = max(1, launch.stages - 2)
    tiles = math.ceil(m / launch.rows) * math.ceil(columns / launch.columns)
    # Of a few-rows kernel's step of four chunks for each warp only those are counted that lie within the depth.
    chunks = 4 if launch.persistent else 1
    whole = math.ceil(depth * chunks / launch.depth) / chunks
    # Thread blocks with a tile of their own, and those that share tiles; or the tiles of a persistent one.
    alone, rest = math.ceil(launch.whole_tiles / card.sms), tiles - launch.whole_tiles
    sharing = math.ceil(rest // launch.shared_tiles * launch.splits / card.sms)
    share = whole if launch.persistent else math.ceil(whole * launch.shared_tiles / launch.splits)
    most = alone + sharing
    if launch.persistent:
        waits = most * math.ceil(share) + 1
    else:
        at_once = blocks_at_once(card, row, launch.warps)
        # Steps, and beginnings, that wait one for the other.
        in_turn = [(alone, whole), (sharing, share)]
        waits = sum(math.ceil(blocks / at_once) * (each / ahead + 1) for blocks, each in in_turn)
    return _Work(tiles, whole, most, alone * whole + sharing * share, waits)


def _seconds(
    card: Card, launch: Launch, row: dict[str, Any], work: _Work, m: int, k: int, moved: float
) -> dict[str, float]:
    """What each part of the card takes for it."""
    clock = card.clock * 1e9
    read = launch.depth * launch.columns * BITS_PER_WEIGHT / 8  # bytes in a step
    read += 0 if launch.persistent else launch.depth * 2 * launch.rows
    once = min(card.sms, work.tiles) * 2 * m * k if launch.persistent else 0  # x, into each block
    flops = 2 * launch.rows * launch.columns * launch.depth  # in a step
    # What keeps a dense product below the data sheet is power; it takes more of that than a slower instruction does.
    tensor_rate = min(card.mma_sync * card.tensor * 1e12, card.dense_rate) / card.sms
    return {
        "memory": moved / card.copy_rate,
        "L2": (work.tiles * work.whole * read + once) / (card.l2_bytes * clock),
        "tensor": work.steps * flops / tensor_rate,
        "shared": work.steps * launch.shared_bytes / 128 / clock,
        "issue": work.steps * issued(row) * launch.warps / SCHEDULERS / clock,
        "latency": work.waits * card.latency / clock,
    }


def predict(card: Card, m: int, n: int, k: int, backward: bool = False) -> dict[str, Any]:
    """Times in microseconds of a product without adapter in bf16, and of a dense one.

    Args:
        card: on what.
        m: rows of x.
        n, k: of the weight [N, K].
        backward: dy W, and not x W^T.
    """
    launch = launch_of(card, m, n, k, backward)
    row = compiled(launch, card)
    work = _work(card, launch, row, m, *((k, n) if backward else (n, k)))
    moved = product_bytes(m, n, k, BITS_PER_WEIGHT)
    seconds = _seconds(card, launch, row, work, m, k, moved)
    binds = max(seconds, key=lambda name: seconds[name])
    dense = max(product_bytes(m, n, k, 16) / card.copy_rate, 2 * m * n * k / card.dense_rate)
    return {
        "card": card.name,
        "direction": "backward" if backward else "forward",
        "m": m,
        "n": n,
        "k": k,
        "dispatch": launch.name,
        "kernel": launch.kernel,
        "tile": f"{launch.rows} x {launch.columns}",
        "splits": launch.splits,
        "shared_tiles": launch.shared_tiles,
        "whole_tiles": launch.whole_tiles,
        "tiles": work.tiles,
        "most_on_an_sm": work.most,
        "bytes": round(moved),
        **{f"{name.lower()}_us": round(value * 1e6, 3) for name, value in seconds.items()},
        "us": round(seconds[binds] * 1e6, 3),
        "binds": binds,
        "of_copy": round(seconds["memory"] / seconds[binds], 4),
        "dense_us": round(dense * 1e6, 3),
        "dense_over_ours": round(dense / seconds[binds], 4),
    }


def every(cards: Sequence[Card], shapes: Sequence[tuple[int, int]], directions: Sequence[bool]) -> Iterator[dict]:
    """Predictions for all of these, at every number of rows in ROWS."""
    for card in cards:
        for backward in directions:
            for n, k in shapes:
                yield from (predict(card, m, n, k, backward) for m in ROWS)


_HEAD = ("M", "kernel", "tiles", "split", "memory", "L2", "tensor", "shared", "issue", "latency")
_HEAD += ("predicted us", "binds", "of copy", "dense us", "dense / ours")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Predictions of one card, direction and shape, to read."""
    one = rows[0]
    bounds = ("memory_us", "l2_us", "tensor_us", "shared_us", "issue_us", "latency_us")
    cells = [
        [
            str(row["m"]),
            row["dispatch"],
            str(row["tiles"]),
            str(row["splits"]) + (f":{row['shared_tiles']}" if row["shared_tiles"] > 1 else ""),
            *(f"{row[key]:.1f}" for key in bounds),
            f"{row['us']:.1f}",
            row["binds"],
            f"{row['of_copy']:.0%}",
            f"{row['dense_us']:.1f}",
            f"{row['dense_over_ours']:.2f}",
        ]
        for row in rows
    ]
    title = f"{one['card']}, {one['direction']}, N = {one['n']}, K = {one['k']}: {LABEL}"
    return "\n".join([title, "", *text.table(_HEAD, cells, left=2), ""])


def to_json(rows: Sequence[dict[str, Any]]) -> str:
    """A file of predictions, a line for each."""
    head = {
        "label": LABEL,
        "model": "python -m bench.compiled.predict",
        "static": STATIC.name,
        "shares": {"copy": COPY_SHARE, "dense": DENSE_SHARE, "mma.sync on Hopper": HOPPER_MMA_SYNC},
        "cards": {name: asdict(card) for name, card in CARDS.items()},
    }
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled.predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    parser.add_argument("--backward", action="store_true", help="the gradient of x")
    parser.add_argument("--out", type=Path, help=f"the file for all cards, directions and shapes; default {OUT.name}")
    arguments = parser.parse_args(argv)
    shapes: list[tuple[int, int]] = [(n, k) for n, k in arguments.shape or SHAPES]
    for n, k in shapes:
        if n < 1 or k < 1 or k % 64:
            parser.error(f"N = {n}, K = {k}: there are predictions for the tensor cores' kernels, K a multiple of 64")
    for shape in shapes:
        print(table(list(every([CARDS[arguments.card]], [shape], [arguments.backward]))))
    if not arguments.shape or arguments.out:
        out = arguments.out or OUT
        out.write_text(to_json(list(every(list(CARDS.values()), shapes, [False, True]))))
        print(f"all cards and both directions: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
