"""Training with states larger than memory: PagedAdamW's page_file under a limit, held to the bit against memory.

    python -m bench.host.page_file --out FILE [--folder FOLDER]

A stack of linear layers in bfloat16 with master weights, all of it trained: 12 bytes of states for each parameter of 2.
The same steps three times, each in a process of its own: with the states in memory; in a file; and in a file, where the
process may have less memory than the states take. The limit is that of a memory cgroup (version 1), which also counts
what the system keeps of files: nothing of the states can hide there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kernels import PagedAdamW
from qlora_kernels.bench.timing.machine import describe_commit, describe_machine, describe_versions
from qlora_kernels.finetune.memory import PeakMemory
from qlora_kernels.storage.digest import digest
from qlora_kernels.storage.formats import save_json

MEMORY, FILE, LIMITED = "in memory", "in a file", "in a file, memory limited"
ROWS = 64


class Stack(nn.Module):
    """Residual layers, each with a weight [width, width]."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def train(layers: int, width: int, steps: int, page_file: str | None) -> dict[str, Any]:
    """Trains some steps; returns their times and a digest of all parameters and states at the end."""
    torch.manual_seed(0)
    model = Stack(layers, width)
    optimizer = PagedAdamW(model.parameters(), lr=1e-4, max_grad_norm=1.0, master_weights=True, page_file=page_file)
    x = torch.randn(ROWS, width, dtype=torch.bfloat16)
    y = x.roll(1, dims=1)
    taken, before = [], _io()
    with PeakMemory() as peak:
        for _ in range(steps):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = (model(x) - y).float().square().mean()
            loss.backward()
            ready = time.perf_counter()
            optimizer.step()
            ended = time.perf_counter()
            taken.append({"loss": loss.item(), "gradients_s": ready - began, "step_s": ended - ready})
        after = _io()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "states_bytes": optimizer.arena_bytes,
        "where": optimizer.paging,
        "resident_bytes": optimizer.resident_bytes(),
        "peak_process_bytes": peak.peak,
        "read_bytes": after["read_bytes"] - before["read_bytes"],
        "written_bytes": after["write_bytes"] - before["write_bytes"],
        "steps": taken,
        "sha256": digest([[p.detach() for p in model.parameters()], list(optimizer.state_dict()["state"].values())]),
    }


def _io() -> dict[str, int]:
    """Bytes that this process has read from and written to disks."""
    return {key: int(value) for key, value in (line.split(":") for line in Path("/proc/self/io").open())}


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup of ``limit`` bytes below this process's own; it goes at the end.

    Raises:
        OSError: where none can be made here: no version 1, or no right to it.
    """
    [own] = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line] or [""]
    if not own:
        raise OSError("this system has no memory cgroups of version 1")
    folder = Path("/sys/fs/cgroup/memory" + own.split(":", 2)[2]) / f"page-file-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()


def in_a_process(arguments: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """train() in a process of its own, with as much memory as ``limit`` says.

    Raises:
        RuntimeError: when it fails, or is killed for want of memory.
    """
    with contextlib.ExitStack() as stack:
        group = None if limit is None else stack.enter_context(memory_cgroup(limit))

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            [sys.executable, "-m", "bench.host.page_file", "--train", json.dumps(arguments)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=join,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the training ended with {done.returncode}")
        figures = json.loads(done.stdout)
        if group is not None:
            figures["limit_bytes"] = limit
            figures["peak_cgroup_bytes"] = int((group / "memory.max_usage_in_bytes").read_text())
        return figures


def run(layers: int, width: int, steps: int, limit: int, folder: str) -> dict[str, Any]:
    """The same training with its states in memory, in a file, and in a file under a limit."""
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "threads": torch.get_num_threads(),
        "layers": layers,
        "width": width,
        "cases": {},
    }
    for name in (MEMORY, FILE, LIMITED):
        arguments = {"layers": layers, "width": width, "steps": steps, "page_file": None if name == MEMORY else folder}
        result["cases"][name] = figures = in_a_process(arguments, limit if name == LIMITED else None)
        times = ", ".join(f"{step['step_s']:.1f}" for step in figures["steps"])
        print(f"{name}: steps of {times} s", file=sys.stderr)
    cases = result["cases"].values()
    result["same"] = len({case["sha256"] for case in cases}) == 1
    result["complete"] = True
    return result


def sentence(result: dict[str, Any]) -> str:
    """What docs/paged-optimizers.md says of it."""
    limited, machine, gib = result["cases"][LIMITED], result["machine"], 2**30

    def seconds(name: str) -> str:
        later = sorted(step["step_s"] for step in result["cases"][name]["steps"][1:])
        return f"{later[len(later) // 2]:.2g}"

    read, written = (limited[f"{what}_bytes"] / len(limited["steps"]) / gib for what in ("read", "written"))
    bits = "match" if result["same"] else "DO NOT MATCH"
    return (
        f"{limited['states_bytes'] / gib:.1f} GiB of states trained in a process that was allowed "
        f"{limited['limit_bytes'] / gib:.2f} GiB in all ({machine['cpu']}, {machine['usable_cores']} cores): the "
        f"results {bits} the in-memory run bit for bit. "
        f"A step took {seconds(LIMITED)} s, against {seconds(FILE)} s with room for the file in memory and "
        f"{seconds(MEMORY)} s without a file; each step read {read:.1f} GiB and wrote {written:.1f} GiB."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host.page_file", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="where the result goes, as JSON")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the states lie (default %(default)s)")
    parser.add_argument("--layers", type=int, default=24, help="(default %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--limit", type=float, default=2.25, help="of memory, in GiB (default %(default)s)")
    parser.add_argument("--train", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.train:
        print(json.dumps(train(**json.loads(arguments.train))))
        return 0
    if not arguments.out:
        parser.error("--out FILE says where the result goes")
    result = run(
        arguments.layers,
        arguments.width,
        arguments.steps,
        int(arguments.limit * 2**30),
        os.path.abspath(arguments.folder),
    )
    save_json(result, arguments.out)
    print(sentence(result))
    return 0 if result["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
