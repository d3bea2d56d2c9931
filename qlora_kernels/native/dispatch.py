"""Which CUDA kernel computes a product: csrc/cuda/common/dispatch.h as a readable table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from . import extension


@dataclass(frozen=True)
class Card:
    """The properties of a card that decide which kernel runs.

    Attributes:
        name: the card's name.
        architecture: 90 for sm_90.
        multiprocessors: number of SMs.
        shared_bytes: the most shared memory that a block can use.
    """

    name: str
    architecture: int
    multiprocessors: int
    shared_bytes: int


#: One card per architecture (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
#: cards' data sheets).
CARDS = {
    card.architecture: card
    for card in (
        Card("T4", 75, 40, 64 * 1024),
        Card("A100", 80, 108, 163 * 1024),
        Card("RTX 3090", 86, 82, 99 * 1024),
        Card("RTX 4090", 89, 128, 99 * 1024),
        Card("H100 or H200", 90, 132, 227 * 1024),
        Card("B200", 100, 148, 227 * 1024),
        Card("RTX 5090", 120, 170, 99 * 1024),
    )
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def seen() -> Card | None:
    """The first GPU on this machine, or None."""
    if not torch.cuda.is_available():
        return None
    properties = cast(Any, torch.cuda).get_device_properties(0)
    return Card(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", CARDS[75].shared_bytes),
    )


def choose(card: Card, m: int, n: int, k: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """The kernel for M rows and a weight [N, K], and its launch parameters.

    Returns:
        ``kernel`` (its name, as for QLORA_KERNELS_CUDA_KERNEL), a tile's ``rows`` and ``stages``, the number of
        ``tiles``, ``splits`` (blocks that share tiles), ``cluster`` (whether these are a thread block cluster),
        ``shared_tiles`` (how many tiles they share: one or all that are shared), ``whole_tiles`` (tiles that one block
        computes alone while others are shared), ``row_tiles`` and ``scratch`` (bytes).

    Raises:
        RuntimeError: if QLORA_KERNELS_CUDA_KERNEL names no kernel, or one that cannot handle this case.
    """
    return extension.native().dispatch(
        *(m, n, k, extension.code_of(dtype), backward),
        *(card.architecture, card.multiprocessors, card.shared_bytes),
    )


def ranges(
    card: Card, n: int, k: int, dtype: torch.dtype, backward: bool
) -> list[tuple[int, int | None, dict[str, Any]]]:
    """(first M, last M, plan) for each range of M that one kernel covers; the last range has no end (None).

    Plans differ by their blocks per tile only until the tiles fill all SMs once: beyond that only the last wave
    differs, and those plans count as one.
    """
    covered: list[tuple[int, int | None, dict[str, Any]]] = []
    # Eight waves of the widest tiles fill the card, whatever N and K are.
    for m in range(1, 8 * 128 * card.multiprocessors + 2):
        if m > 256 and m % 128 != 1:  # no tile has more than 128 rows: the number of tiles stays the same
            covered[-1] = (covered[-1][0], m, covered[-1][2])
            continue
        plan = choose(card, m, n, k, dtype, backward)
        if plan["tiles"] > card.multiprocessors and (plan["shared_tiles"] == 1 or plan["whole_tiles"] > 0):
            plan["splits"] = plan["shared_tiles"] = 1
        if covered and all(covered[-1][2][key] == plan[key] for key in ("kernel", "splits", "shared_tiles")):
            most = {key: max(plan[key], covered[-1][2][key]) for key in ("scratch", "whole_tiles")}
            covered[-1] = (covered[-1][0], m, plan | most)
        else:
            covered.append((m, m, plan))
    first, _, plan = covered[-1]
    return [*covered[:-1], (first, None, plan)]


def describe(n: int, k: int, card: Card, remark: str = "") -> str:
    """The table for a weight [N, K]."""
    lines = [
        f"N = {n}, K = {k} on {card.name}: sm_{card.architecture}, {card.multiprocessors} multiprocessors, "
        f"{card.shared_bytes // 1024} KiB of shared memory{remark}",
        "",
        f"{'':<14}{'M':>13}  {'kernel':<11}{'blocks a tile':>13}{'scratch, MiB':>14}",
    ]
    for backward in (False, True):
        same: dict[str, list[str]] = {}
        for name, dtype in DTYPES.items():
            rows = "\n".join(
                f"{'':<14}{_interval(first, last):>13}  {plan['kernel']:<11}{_blocks(plan):>13}"
                f"{plan['scratch'] / 2**20:>14.1f}"
                for first, last, plan in ranges(card, n, k, dtype, backward)
            )
            same.setdefault(rows, []).append(name)
        for rows, names in same.items():
            lines += [f"{'dx' if backward else 'y'}, {', '.join(names)}", rows]
    return "\n".join(lines)


def _blocks(plan: dict[str, Any]) -> str:
    """How many blocks compute a tile, or all tiles together."""
    if plan["shared_tiles"] > 1:
        return f"{plan['splits']} for {plan['shared_tiles']}"
    return "1, last more" if plan["whole_tiles"] > 0 else str(plan["splits"])


def _interval(first: int, last: int | None) -> str:
    return f"{first} or more" if last is None else str(first) if first == last else f"{first} to {last}"
