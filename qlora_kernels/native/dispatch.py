"""Which CUDA kernel multiplies: csrc/cuda/linear/dispatch.h as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from . import extension


@dataclass(frozen=True)
class Card:
    """What the choice depends on.

    Attributes:
        name: the card's.
        architecture: whose instructions the kernels have, 90 for sm_90.
        multiprocessors: how many it has.
        shared_bytes: shared memory that a block may have.
    """

    name: str
    architecture: int
    multiprocessors: int
    shared_bytes: int


#: A card of each architecture (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
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
    """The first GPU of this machine."""
    if not torch.cuda.is_available():
        return None
    found = cast(Any, torch.cuda).get_device_properties(0)
    return Card(
        found.name,
        10 * found.major + found.minor,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", CARDS[75].shared_bytes),
    )


def choose(card: Card, m: int, n: int, k: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """The kernel for M rows of a weight [N, K], and how it is launched.

    Returns:
        ``kernel`` (its name, as QLORA_KERNELS_CUDA_KERNEL takes it), ``rows`` and ``stages`` of a tile, ``tiles``,
        ``splits`` (blocks that share tiles), ``shared_tiles`` (how many these share: one, or all), ``whole_tiles``
        (that a block has alone while others are shared), ``row_tiles`` and ``scratch`` (bytes).

    Raises:
        RuntimeError: when QLORA_KERNELS_CUDA_KERNEL names no kernel, or one that cannot take the case.
    """
    return extension.native().dispatch(
        *(m, n, k, extension.code_of(dtype), backward),
        *(card.architecture, card.multiprocessors, card.shared_bytes),
    )


def ranges(
    card: Card, n: int, k: int, dtype: torch.dtype, backward: bool
) -> list[tuple[int, int | None, dict[str, Any]]]:
    """From which M to which (None: any more) which kernel runs, with how many blocks a tile. Up to a round of tiles for
    all multiprocessors the number of blocks counts; beyond it only the last round's differ, and are not told apart."""
    found: list[tuple[int, int | None, dict[str, Any]]] = []
    # With eight rounds of tiles the widest fill the card whatever N and K are.
    for m in range(1, 8 * 128 * card.multiprocessors + 2):
        if m > 256 and m % 128 != 1:  # no tile has more rows: the same number of them
            found[-1] = (found[-1][0], m, found[-1][2])
            continue
        plan = choose(card, m, n, k, dtype, backward)
        if plan["tiles"] > card.multiprocessors and plan["shared_tiles"] == 1:
            plan["splits"] = 1
        if found and all(found[-1][2][key] == plan[key] for key in ("kernel", "splits", "shared_tiles")):
            most = {key: max(plan[key], found[-1][2][key]) for key in ("scratch", "whole_tiles")}
            found[-1] = (found[-1][0], m, plan | most)
        else:
            found.append((m, m, plan))
    first, _, plan = found[-1]
    return [*found[:-1], (first, None, plan)]


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
    """Of how many blocks a tile is, or of how many all tiles are."""
    if plan["shared_tiles"] > 1:
        return f"{plan['splits']} for {plan['shared_tiles']}"
    return "1, last more" if plan["whole_tiles"] > 0 else str(plan["splits"])


def _interval(first: int, last: int | None) -> str:
    return f"{first} and more" if last is None else str(first) if first == last else f"{first} to {last}"
