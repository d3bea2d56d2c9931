"""Which kernel a product takes on a card, how its work is cut, and what its main loop moves through shared memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.compiled.cards import Card

#: FewTraits::kAhead, and MiddleTraits::kAhead.
FEW_CHUNKS, MIDDLE_AHEAD = 2, 2
KERNEL_VARIABLE = "QLORA_KERNELS_CUDA_KERNEL"


@dataclass(frozen=True)
class Launch:
    """The kernel that a product takes, and how its work is cut.

    Attributes:
        name: as csrc/cuda/common/dispatch.h calls it.
        kernel: its name in the static table.
        rows, columns, depth: of a thread block's tile, and of a step.
        ahead: steps whose copies are under way while another is worked on.
        splits: thread blocks that share a tile's depth, or that of several tiles.
        warps: of a thread block.
        decode_bytes: moved through shared memory in a step by decoding.
        other_bytes: the same by all else.
        table_bytes: of the table that a block fills before it begins.
        finish_bytes: moved through shared memory when a tile ends: sums of slices, results.
        teams: of a block's warps; they take turns at decoding.
        chain: loads that wait for one another before a tile's first step.
        persistent: whether a thread block takes tile after tile.
        turn: into how many parts a step of a persistent one can be cut at the end of the depth.
        shared_tiles: how many tiles are shared together.
        whole_tiles: those that a thread block has alone while others are shared.
    """

    name: str
    kernel: str
    rows: int
    columns: int
    depth: int
    ahead: int
    splits: int
    warps: int
    decode_bytes: float
    other_bytes: float
    table_bytes: int = 0
    finish_bytes: int = 0
    teams: int = 1
    chain: int = 2
    persistent: bool = False
    turn: int = 1
    shared_tiles: int = 1
    whole_tiles: int = 0

    @property
    def shared_bytes(self) -> float:
        return self.decode_bytes + self.other_bytes


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Within it, dispatch.h takes the kernel of that name; None: its own choice."""
    before = os.environ.get(KERNEL_VARIABLE)
    if name is not None:
        os.environ[KERNEL_VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(KERNEL_VARIABLE)
            if before is not None:
                os.environ[KERNEL_VARIABLE] = before


def launch_of(card: Card, m: int, n: int, k: int, backward: bool, kernel: str | None = None) -> Launch:
    """What csrc/cuda/linear/launch.cu launches for bf16, aligned rows and a double-quantized weight.

    Args:
        card, m, n, k, backward: the product.
        kernel: a row of the table of dispatch.h to be taken; None: the one it chooses.

    Raises:
        RuntimeError: when that kernel cannot take the product.
    """
    from qlora_kernels.native import extension

    code = extension.code_of(torch.bfloat16)
    with forced(kernel):
        plan = extension.native().dispatch(m, n, k, code, backward, card.architecture, card.sms, card.shared[1])
    family = _few if plan["kernel"] == "few" else _middle if plan["kernel"].startswith("middle") else _tiles
    return family(plan, m, backward)


def _few(plan: dict[str, Any], m: int, backward: bool) -> Launch:
    slices = 16 // plan["row_tiles"]  # warps that share rows, each with two chunks of 128 in a turn
    columns, depth = 16 * plan["row_tiles"], FEW_CHUNKS * 128 * slices
    # For each weight 2 bytes of the table. For each warp and chunk: four loads of x, taken to move 512 bytes each
    # however few rows there are, the constants' table, taken to be read in two passes, and four shuffles.
    moved = (2 * columns * depth, 16 * FEW_CHUNKS * (4 * 512 + 2 * 128 + 4 * 128))
    finish = 2 * 16 * 16 * 4 * m  # a warp's sums of each row of x, written and read
    more = {"table_bytes": 32768, "finish_bytes": finish, "chain": 1, "persistent": True, "turn": FEW_CHUNKS}
    return Launch("few", "few_kernel<bf16, true>", 8, columns, depth, 1, 1, 16, *moved, **more)


def _middle(plan: dict[str, Any], m: int, backward: bool) -> Launch:
    rows, columns, depth = plan["rows"], plan["columns"], 256
    # The same table; x as it comes, and into both groups of warps. For each warp, constants: two look-ups in their
    # table, taken to be read in four passes, written, and read in four loads.
    moved = (2 * columns * depth, 3 * rows * depth * 2 + 8 * (2 * 4 * 128 + 2 * 128 + 4 * 128))
    finish = 2 * 4 * rows * columns * 4  # the sums of four slices, written and read
    kernel = f"middle_kernel<bf16, MiddleTraits<bf16, {rows}, true>>"
    more = {"table_bytes": 32768, "finish_bytes": finish, "shared_tiles": plan["shared_tiles"], "chain": 1}
    return Launch(
        *(plan["kernel"], kernel, rows, columns, depth, MIDDLE_AHEAD, plan["splits"], 8),
        *moved,
        **more,
    )


def _tiles(plan: dict[str, Any], m: int, backward: bool) -> Launch:
    rows, columns = plan["rows"], plan["columns"]
    down, slices = 2 if rows >= 64 else 1, 2 if rows >= 64 and columns == 128 else 1
    traits = f"GemmTraits<bf16, {str(backward).lower()}, {rows}, {columns}, {down}, {plan['stages']}>"
    # Codes are read and weights written. Both operands as they come, and what each of 8 warps reads of its own.
    per_warp = (rows // down + columns * down * slices // 8) * (64 // slices) * 2
    moved = (columns * 32 + columns * 128, rows * 128 + columns * 32 + 8 * per_warp)
    # Half of either slice's sums, written and read; rounded results, written and read.
    finish = (2 * rows * columns * 4 if slices == 2 else 0) + 2 * rows * columns * 2
    return Launch(
        *(plan["kernel"], f"gemm_kernel<bf16, {traits}>", rows, columns, 64),
        *(max(1, plan["stages"] - 2), plan["splits"], 8),
        *moved,
        finish_bytes=finish,
        teams=256 // columns,
        whole_tiles=plan["whole_tiles"],
    )
