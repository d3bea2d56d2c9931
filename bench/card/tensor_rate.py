"""How many products a card's tensor cores take in a second: by mma.sync, and on sm_90a by wgmma, and nothing else.

    python -m bench.card.tensor_rate [--out FILE] [--seconds S]

The instruction limits what kernels of mma.sync can reach on Hopper, whatever else they do. bench/compiled/predict.py
takes its share of the data sheet's rate from published measurements; this asks the card itself. Operands are random
numbers between -1 and 1: zeros take less power, and perhaps fewer register reads. Each kernel is timed for a tenth of a
second after as long a warm-up, several times. Clocks are not fixed, so compare rates of one run only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.emulator import conformance_module
from qlora_kernels.bench.timing.machine import describe_commit
from qlora_kernels.storage.formats import save_json

#: Thread blocks for each SM: mma.sync's are of 8 warps, two of which share an SM's four parts.
BLOCKS = 2


def operands(device: str) -> torch.Tensor:
    """64 KiB of float16 numbers between -1 and 1."""
    random = torch.Generator().manual_seed(0)
    return (torch.rand(2**15, generator=random) * 2 - 1).half().to(device)


def time_one(launch: Callable[[int], None], flop: float, repetitions: int) -> dict[str, Any]:
    """TFLOP/s of ``launch(turns)``, which does ``turns * flop``: the median, the least and the most."""

    def seconds(turns: int) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        launch(turns)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    seconds(1000)
    turns = max(1000, int(0.1 / max(seconds(1000), 1e-6) * 1000))
    seconds(turns)
    rates = [turns * flop / seconds(turns) / 1e12 for _ in range(repetitions)]
    return {"tflops": statistics.median(rates), "least": min(rates), "most": max(rates), "turns": turns}


def measure(module: Any, repetitions: int, device: str = "cuda") -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    blocks, given = properties.multi_processor_count * BLOCKS, operands(device)
    out = torch.empty(blocks * 256, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    rates = {
        "mma.sync m16n8k16 fp16": time_one(
            lambda turns: module.launch_rate(given.data_ptr(), out.data_ptr(), turns, blocks, 0, stream),
            module.RATE_FLOP * blocks,
            repetitions,
        )
    }
    if hasattr(module, "launch_wide_rate"):
        rates["wgmma m64n256k16 fp16"] = time_one(
            lambda turns: module.launch_wide_rate(given.data_ptr(), out.data_ptr(), turns, blocks, 0, stream),
            module.WIDE_RATE_FLOP * blocks,
            repetitions,
        )
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        **describe_commit(),
        "rates": rates,
        "complete": True,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long, once the kernels are there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure", file=sys.stderr)
        return 2
    result = measure(conformance_module(), max(3, int(options.seconds / 0.3)))
    for name, rate in result["rates"].items():
        print(f"{name}: {rate['tflops']:.0f} TFLOP/s ({rate['least']:.0f} to {rate['most']:.0f}) on {result['device']}")
    if options.out:
        save_json(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
