"""What a call of a layer costs on the host, Python included, by the CUDA path with kernels that do nothing:

    python -m bench.host.call --out bench/results/host-NAME.json

Everything runs that runs with a card but what the CUDA runtime and torch's allocator for it do: Python, the extension,
the plans of the launches. The launches themselves are counted (tests/emulator), and outputs lie in the CPU's memory,
whose allocation takes about as long. No card is needed. On one, the launches come on top, some microseconds each, and
those of what torch itself does for a call (casts), which are not counted here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from bench import emulator
from qlora_kernels import QLinear
from qlora_kernels.bench.timing.machine import describe_commit, describe_machine, describe_versions
from qlora_kernels.ops import backends
from qlora_kernels.storage.formats import save_json

#: N = K, and the rows of x: small, since sizes cost the host nothing but memory.
SIZE, ROWS = 1024, 16
RANK = 16
#: On the card that launches are planned for.
MULTIPROCESSORS = 132
ADAPTERS = ("none", "bfloat16", "float32")
#: Shapes of x.
SHAPES = {"[M, K]": (ROWS, SIZE), "[B, T, K]": (2, ROWS // 2, SIZE)}


class NoLaunches(backends.CUDA):
    """CUDA's path over tensors on the CPU."""

    @staticmethod
    def queue(device: torch.device) -> tuple[int, int]:
        return 0, 0


def layer_of(adapter: str) -> QLinear:
    """A layer in bfloat16 with adapters of a type, or none."""
    dense = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    if adapter == "none":
        return QLinear.from_linear(dense, rank=0)
    return QLinear.from_linear(dense, rank=RANK, adapter_dtype=getattr(torch, adapter))


def calls_of(layer: QLinear, shape: tuple[int, ...]) -> dict[str, tuple[Callable[[], Any], AbstractContextManager]]:
    """What is timed, by name, and within what."""
    x = torch.randn(shape).bfloat16()
    leaf, dy = x.clone().requires_grad_(), torch.randn(*shape[:-1], SIZE).bfloat16()
    leaves = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    calls = {
        "forward, no_grad": (lambda: layer(x), torch.no_grad()),
        "forward, inference_mode": (lambda: layer(x), torch.inference_mode()),
        "forward, grad": (lambda: layer(leaf), contextlib.nullcontext()),
        # With torch's engine.
        "forward and backward": (lambda: torch.autograd.grad(layer(leaf), leaves, dy), contextlib.nullcontext()),
    }
    if len(shape) == 2:
        node = layer(leaf).grad_fn
        calls["backward alone"] = (lambda: node.apply(dy), torch.no_grad())  # as the engine calls it
    return calls


def keep_memory() -> None:
    """Makes malloc keep freed memory, as torch's allocator for a card does. Returning it to the system and asking
    for it again would take longer than all the rest."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 25)


def cases(repeats: int, number: int) -> Iterator[dict[str, Any]]:
    """The least of `repeats` means over `number` calls each: disturbances only add time, and so few calls fit between
    two switches to another process."""
    layers = {adapter: layer_of(adapter) for adapter in ADAPTERS}
    module = emulator.module()
    module.configure(executes=False, multiprocessors=MULTIPROCESSORS)
    with contextlib.ExitStack() as stack:
        stack.callback(module.configure)
        stack.enter_context(backends.forced(NoLaunches(module.plain)))
        for adapter, layer in layers.items():
            for shape, sizes in SHAPES.items():
                for name, (call, context) in calls_of(layer, sizes).items():
                    with context:
                        call()
                        module.reset_counters()
                        call()
                        launches = json.loads(module.counters())["launches"]
                        us = min(timeit.Timer(call).repeat(repeats, number)) / number * 1e6
                    yield {"call": name, "adapter": adapter, "x": shape, "us": us, "launches": launches}


def markdown(result: dict[str, Any], source: str) -> str:
    """A table of the times, and what they were measured with.

    Args:
        result: of :func:`main`.
        source: where the result is, for the reader.
    """
    m, v = result["machine"], result["versions"]
    commit = (result["commit"] or "unknown")[:10] + (" with changes" if result["modified"] else "")
    rows: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        cell = f"{case['us']:.1f} ({case['launches']})"
        rows.setdefault((case["call"], case["x"]), []).append(cell)
    heads = ["none" if one == "none" else f"{one}, r = {result['rank']}" for one in ADAPTERS]
    return "\n".join(
        [
            f"{m['cpu']} ({'virtual machine, ' if m['virtual'] else ''}{m['usable_cores']} cores), 1 thread, "
            f"torch {v['torch']}, {v['compiler']}, commit {commit}, {result['date'][:10]} ([raw figures]({source})).",
            f"x is bfloat16, N = K = {result['n']}, {result['rows']} rows. Microseconds, the least of many rounds; in "
            "brackets the number of launches, which were not run.",
            "",
            "| | x | adapter: " + " | adapter: ".join(heads) + " |",
            "|---" * (2 + len(ADAPTERS)) + "|",
            *(f"| {call} | {x} | {' | '.join(cells)} |" for (call, x), cells in rows.items()),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host.call", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="FILE", required=True, help="where the result goes, as JSON")
    parser.add_argument("--repeats", type=int, default=500, help="of which the least counts (default %(default)s)")
    parser.add_argument("--number", type=int, default=20, help="of calls in each (default %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "n": SIZE,
        "k": SIZE,
        "rows": ROWS,
        "rank": RANK,
        "complete": True,
        "cases": list(cases(arguments.repeats, arguments.number)),
    }
    save_json(result, arguments.out)
    print(markdown(result, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
