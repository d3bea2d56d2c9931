"""The model behind bench/compiled/predict.py: what a product takes on a card, term by term."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.compiled.cards import SCHEDULERS, Card
from bench.compiled.launches import Launch, launch_of
from bench.compiled.terms import (
    ALU_LANES,
    BARRIER_CLOCKS,
    CLUSTER_US,
    EARLIER_TRIPS,
    LDSM_CLOCKS,
    LOADED,
    LOOKUP_CLOCKS,
    MEMBAR_US,
    PASSES,
    SM_BYTES,
    TICKET_TRIPS,
)

FOLDER = Path(__file__).resolve().parent.parent / "results"
STATIC = FOLDER / "static-sm80-sm90a.json"

#: 4-bit codes, an 8-bit constant for 64 of them, a float32 for 256 constants.
BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: N, K: an attention layer's and an MLP's of an 8-billion-parameter Llama.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))


@cache
def _static(path: Path = STATIC) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["kernel"], row["arch"]): row for row in json.loads(path.read_text())["kernels"]}


def compiled(launch: Launch, card: Card) -> dict[str, Any]:
    """The row of the static table for a kernel: the card's own architecture, or the one that stands for it.

    Raises:
        KeyError: when the table lacks the kernel, or counts no pipes.
    """
    table = _static()
    row = table.get((launch.kernel, card.arch)) or table[launch.kernel, card.code]
    if "alone_alu" not in row:
        raise KeyError(f"{STATIC.name} counts no pipes for {launch.kernel}: python -m bench.compiled.static WHEEL")
    return row


def blocks_at_once(card: Card, row: dict[str, Any], warps: int) -> int:
    """Thread blocks of so many warps that an SM holds at the same time. Each takes 1 KiB of shared memory more than it
    asks for (CUDA C++ Programming Guide)."""
    by_registers = 65536 // (-(-row["registers"] // 8) * 8 * 32 * warps)
    by_shared = card.shared[0] // (row["shared_dynamic"] + 1024)
    return max(1, min(by_registers, by_shared))


def product_bytes(m: int, n: int, k: int, bits: float) -> float:
    """What y = x W^T must read and write, x and y in 16 bits."""
    return n * k * bits / 8 + 2 * m * k + 2 * m * n


# ---------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Step:
    """Clocks of a step of the main loop of one thread block that has an SM for itself.

    Attributes:
        alone: until the tensor cores begin.
        together: from there to the barrier.
        binds: the pipe that takes longest then.
        pipes: clocks of each pipe, of both parts.
    """

    alone: float
    together: float
    binds: str
    pipes: dict[str, float]

    @property
    def clocks(self) -> float:
        return self.alone + self.together


def step_of(card: Card, launch: Launch, row: dict[str, Any]) -> Step:
    """What a step takes, by the instructions in the static table.

    Where all warps decode in every step, decoding that lies before the products is alone. Teams take turns: one decodes
    and then multiplies, which the other does meanwhile.
    """
    warps = launch.warps / SCHEDULERS
    beside = row["decode_beside"] if launch.teams == 1 else 1.0

    def pipes(alone: float, others: float, decode: float) -> dict[str, float]:
        """Clocks of the pipes for such shares of the parts."""
        shares = {"alone": alone, "beside": others, "decode": decode}
        issue, alu, fma = (
            sum(share * row[f"{part}_{pipe}"] for part, share in shares.items()) for pipe in ("issue", "alu", "fma")
        )
        lanes = SCHEDULERS * 32
        return {"issue": issue * warps, "ALU": alu * warps * lanes / ALU_LANES, "FMA": fma * warps * lanes / card.fma}

    flops = 2 * launch.rows * launch.columns * launch.depth
    tensor = flops / ((card.wgmma_rate if launch.in_turn else card.mma_rate) / card.sms) * card.hertz
    before = pipes(1, 0, 1 - beside) | {"shared": launch.decode_bytes * (1 - beside) / 128}
    during = pipes(0, 1, beside) | {
        "tensor": tensor,
        "shared": (launch.other_bytes + launch.decode_bytes * beside) / 128,
    }
    if launch.teams > 1:
        during["decode, then multiply"] = max(pipes(0, 0, 1).values()) + tensor / launch.teams
    if launch.in_turn:
        during["products, then their sums"] = _turn(row, tensor)
    barrier = (
        (BARRIER_CLOCKS if row.get("alone_ldsm", 1.0) else BARRIER_CLOCKS - LDSM_CLOCKS) if row["alone_issue"] else 0
    )
    alone = max(before.values()) + barrier
    binds = max(during, key=lambda name: during[name])
    every = {name: before.get(name, 0.0) + during[name] for name in ("issue", "ALU", "FMA", "shared", "tensor")}
    return Step(alone, during[binds], binds, every)


def _turn(row: dict[str, Any], tensor: float) -> float:
    """Clocks of a step for one of two warpgroups. It asks for the products of one block of weights, decodes the next
    block meanwhile, waits for the sums, scales and adds them. A scheduler has one warp of each warpgroup."""
    decoding = row["beside_issue"] + row["decode_issue"] + LOOKUP_CLOCKS
    return max(tensor / 2, decoding) + BARRIER_CLOCKS + row["beside_fma"] + row["decode_fma"]


# -------------------------------------------------------------------------------------------------------- a product


@dataclass(frozen=True)
class _Work:
    """What a launch's SM with the most work does.

    Attributes:
        tiles: of the whole product.
        whole: steps of a tile.
        most: thread blocks or, of a persistent one, tiles that this SM takes one after the other.
        steps: of its main loops.
        starts: beginnings (and ends) of tiles, one after the other.
    """

    tiles: int
    whole: float
    most: int
    steps: float
    starts: int


def _work(card: Card, launch: Launch, at_once: int, m: int, columns: int, depth: int) -> _Work:
    tiles = math.ceil(m / launch.rows) * math.ceil(columns / launch.columns)
    # Of a few-rows kernel's step of some chunks for each warp only those are counted that lie within the depth.
    whole = math.ceil(depth * launch.turn / launch.depth) / launch.turn
    # Thread blocks with a tile of their own, and those that share tiles; or the tiles of a persistent one.
    alone, rest = math.ceil(launch.whole_tiles / card.sms), tiles - launch.whole_tiles
    sharing = math.ceil(rest // launch.shared_tiles * launch.splits / card.sms)
    share = whole if launch.persistent else math.ceil(whole * launch.shared_tiles / launch.splits)
    if launch.persistent:
        starts = 1
    else:
        # A block whose share of several tiles is one stretch begins in one and ends in another.
        of_a_share = math.ceil(launch.shared_tiles / launch.splits) + 1 if launch.shared_tiles > 1 else 1
        starts = math.ceil(alone / at_once) + math.ceil(sharing / at_once) * of_a_share
    return _Work(tiles, whole, alone + sharing, alone * whole + sharing * share, starts)


def _tail_us(card: Card, launch: Launch, row: dict[str, Any], work: _Work) -> float:
    """What blocks that share a tile take at its end, besides what every tile takes."""
    if launch.splits == 1:
        return 0.0
    # A block's sums, once through an SM's connection.
    part = launch.rows * launch.columns * 4 / SM_BYTES / card.hertz * 1e6
    if launch.cluster:
        return CLUSTER_US + part
    trip = card.latency / card.hertz * 1e6
    ticket = MEMBAR_US if row["membar_sc"] else TICKET_TRIPS * trip
    if launch.shared_tiles == 1:
        return ticket + (1 + launch.splits) * part
    # A block may share the tile in which it begins with others, and be the last in that in which it ends.
    share = math.ceil(work.whole * launch.shared_tiles / launch.splits)
    return EARLIER_TRIPS * trip + part + ticket + (2 + math.ceil(work.whole / share)) * part


def _terms(card: Card, launch: Launch, row: dict[str, Any], work: _Work, m: int, k: int, moved: float) -> dict:
    """Microseconds of each term, the sum that is the prediction, and what binds."""
    step = step_of(card, launch, row)
    at_once = blocks_at_once(card, row, launch.warps)
    read = launch.depth * launch.columns * BITS_PER_WEIGHT / 8  # bytes in a step
    read += 0 if launch.persistent else launch.depth * 2 * launch.rows
    once = min(card.sms, work.tiles) * 2 * m * k if launch.persistent else 0  # x, into each block
    # Blocks that an SM has at the same time fill each other's gaps.
    busy = max(step.clocks / at_once, *step.pipes.values())
    waiting = LOADED * card.latency / launch.ahead / at_once
    if launch.persistent:
        waiting *= math.ceil(work.whole) / work.whole  # a turn that is half empty waits as long
    decoding = max(row["decode_issue"], row["decode_alu"] * 128 / ALU_LANES) * launch.warps / SCHEDULERS
    start = launch.chain * card.latency + (decoding if not launch.table_bytes else 0)
    table = launch.table_bytes / 128 + row["ldc_indexed"] * PASSES * launch.warps * bool(launch.table_bytes)
    end = launch.finish_bytes / 128
    between = (work.starts - 1) * (start + end + card.latency)
    if launch.persistent:
        between = (work.most - 1) * (end + BARRIER_CLOCKS)
    sm = work.steps * max(busy, waiting) + between
    clocks = {
        **{name: work.steps * step.pipes[name] for name in ("tensor", "shared", "issue", "ALU", "FMA")},
        "latency": work.steps * waiting,
        "alone": work.steps * step.alone,
        "together": work.steps * step.together,
        "sm": sm,
        "fill": start + table + once / card.l2_bytes,
        "tail": end + card.latency,
    }
    us = {name: value / card.hertz * 1e6 for name, value in clocks.items()}
    us["tail"] += _tail_us(card, launch, row, work)
    us["memory"] = moved / card.copy_rate * 1e6
    us["L2"] = (work.tiles * work.whole * read + once) / (card.l2_bytes * card.hertz) * 1e6
    binds = max(("memory", "L2", "sm"), key=lambda name: us[name])
    total = us["fill"] + us[binds] + us["tail"]
    if binds == "sm":
        binds = "latency" if waiting > busy else step.binds
    return {"terms": us, "us": total, "binds": binds, "step": step}


def predict(card: Card, m: int, n: int, k: int, backward: bool = False, kernel: str | None = None) -> dict[str, Any]:
    """Times in microseconds of a product without adapter in bf16, and of a dense one.

    Args:
        card: on what.
        m: rows of x.
        n, k: of the weight [N, K].
        backward: dy W, and not x W^T.
        kernel: a row of dispatch.h to take; None: the one it chooses.
    """
    launch = launch_of(card, m, n, k, backward, kernel)
    row = compiled(launch, card)
    at_once = blocks_at_once(card, row, launch.warps)
    work = _work(card, launch, at_once, m, *((k, n) if backward else (n, k)))
    moved = product_bytes(m, n, k, BITS_PER_WEIGHT)
    found = _terms(card, launch, row, work, m, k, moved)
    us, terms, step = found["us"], found["terms"], found["step"]
    dense = dense_us(card, m, n, k)
    return {
        "card": card.name,
        "direction": "backward" if backward else "forward",
        "m": m,
        "n": n,
        "k": k,
        "dispatch": launch.name,
        "kernel": launch.kernel,
        "code": row["arch"],
        "tile": f"{launch.rows} x {launch.columns}",
        "splits": launch.splits,
        "cluster": launch.cluster,
        "shared_tiles": launch.shared_tiles,
        "whole_tiles": launch.whole_tiles,
        "tiles": work.tiles,
        "most_on_an_sm": work.most,
        "steps": work.steps,
        "step_clocks": round(step.clocks, 1),
        "alone_clocks": round(step.alone, 1),
        "bytes": round(moved),
        **{f"{name.lower()}_us": round(value, 3) for name, value in terms.items()},
        "us": round(us, 3),
        "binds": found["binds"],
        "of_copy": round(terms["memory"] / us, 4),
        "dense_us": round(dense, 3),
        "dense_over_ours": round(dense / us, 4),
    }


def dense_us(card: Card, m: int, n: int, k: int) -> float:
    """A dense bf16 product: the larger of its memory's and its multiplications' time."""
    return max(product_bytes(m, n, k, 16) / card.copy_rate, 2 * m * n * k / card.dense_rate) * 1e6


def every(cards: Sequence[Card], shapes: Sequence[tuple[int, int]], directions: Sequence[bool]) -> Iterator[dict]:
    """Predictions for all of these, at every number of rows in ROWS."""
    for card in cards:
        for backward in directions:
            for n, k in shapes:
                yield from (predict(card, m, n, k, backward) for m in ROWS)
