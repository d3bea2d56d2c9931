"""How much memory it takes to load a dense checkpoint into 4 bits, in three ways, each in a process of its own.

    python -m bench.interop.loading --out bench/results/loading-memory-cpu.json

The checkpoint is a Llama in float32 with random weights, loaded as bfloat16. What counts is the process's own memory
(RssAnon): transformers maps the files, and the pages of the map belong to the system's cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from qlora_kernels.bench.timing.machine import describe_commit, describe_machine, describe_versions
from qlora_kernels.storage.formats import save_json

WHILE_LOADING, AFTERWARDS, PEER = "NF4Config", "load, then quantize_model", "bitsandbytes"
WAYS = (WHILE_LOADING, AFTERWARDS, PEER)


def _own_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class _Peak(threading.Thread):
    """The most own memory that the process has had, looked at every half millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = _own_bytes(), threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, _own_bytes())
            time.sleep(0.0005)


def load(way: str, folder: str) -> Any:
    """The model of a folder, in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_kernels import NF4Config, quantize_model

    if way == WHILE_LOADING:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=NF4Config())
    if way == AFTERWARDS:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        quantize_model(model, rank=0, progress=False)
        return model
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def measure(way: str, small: str, large: str) -> dict[str, float]:
    """Loads a small model for the first calls' sake, then the large one, and returns bytes and seconds."""
    load(way, small)
    peak, start = _Peak(), _own_bytes()
    peak.start()
    began = time.perf_counter()
    model = load(way, large)
    seconds = time.perf_counter() - began
    peak.done.set()
    peak.join()
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return {"peak_bytes": peak.most - start, "model_bytes": held, "seconds": seconds}


def _checkpoint(folder: str, layers: int, width: int) -> dict[str, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    sizes = [2 * parameter.numel() for parameter in model.parameters()]  # in bfloat16
    return {"dense_bytes": sum(sizes), "largest_bytes": max(sizes)}


def run(layers: int, width: int) -> dict[str, Any]:
    """All ways, one after another."""
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        _checkpoint(small, 1, 64)
        sizes = _checkpoint(large, layers, width)
        ways: dict[str, Any] = {}
        for way in WAYS:
            command = [sys.executable, "-m", "bench.interop.loading", "--measure", way, small, large]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            ways[way] = json.loads(done.stdout.splitlines()[-1])
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "threads": torch.get_num_threads(),
        "layers": layers,
        "width": width,
        **sizes,
        "ways": ways,
        "complete": True,
    }


def sentence(result: dict[str, Any]) -> str:
    """What docs/transformers.md says of it."""
    mib = 2**20
    ours, after, peer = (result["ways"][way] for way in WAYS)
    return (
        f"A float32 checkpoint, {result['dense_bytes'] / mib:.0f} MiB in bfloat16 with a largest weight of "
        f"{result['largest_bytes'] / mib:.0f} MiB, became a 4-bit model of {ours['model_bytes'] / mib:.0f} MiB. The "
        f"process's own memory rose by at most {ours['peak_bytes'] / mib:.0f} MiB; by {after['peak_bytes'] / mib:.0f} "
        f"MiB when the model was loaded dense and then quantized; by {peer['peak_bytes'] / mib:.0f} MiB with "
        f"bitsandbytes ({result['machine']['cpu']}, {result['machine']['usable_cores']} cores)."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.interop.loading", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="where the result goes, as JSON")
    parser.add_argument("--layers", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="(default %(default)s)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return 0
    if not arguments.out:
        parser.error("--out FILE says where the result goes")
    result = run(arguments.layers, arguments.width)
    save_json(result, arguments.out)
    print(sentence(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
