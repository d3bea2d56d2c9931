"""finetune: tokens a second and peak memory of whole runs of ``qlora-kernels finetune`` on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from ..case import OURS, Settings, quantiles_of
from ..points import Point

TITLE = "fine-tuning step of the tiny model"
#: The name of a result in metrics.json, by contender.
RESULTS = {OURS: "qlora", "LoRA on 16-bit weights": "lora16", "full fine-tuning": "full"}
STEPS, BATCH, TOKENS = 20, 8, 128
_ARGUMENTS = (
    "--quiet", "--compare", "--steps", str(STEPS), "--batch-size", str(BATCH), "--seq-len", str(TOKENS),
    "--pretrain-steps", "1", "--eval-tokens", "1024", "--sample-tokens", "0", "--save-every", "0",
)  # fmt: skip


class FinetuneMeasurement:
    """Runs of the command, each of which trains all contenders, one after the other, in a process of its own.

    Its contenders cannot take turns call by call. What is trained is not looked at here: the loss that NF4 and LoRA
    reach is in the table of a whole run in docs/fine-tuning.md.

    Args:
        settings: how; as many runs as fit its seconds.
        point: its rank is the adapters'.
        announce: see :class:`qlora_kernels.bench.timing.measure.Measurement`.

    Raises:
        RuntimeError: when the command fails, with its last line.
    """

    def __init__(self, settings: Settings, point: Point, announce: Callable[[str], None] = lambda name: None) -> None:
        self.settings, self.point = settings, point
        self.rounds = 1 if settings.seconds < 5 else 3
        self.rounds_done = 0
        self._metrics: list[Mapping[str, Any]] = []
        announce("")

    def round(self) -> float:
        """One run; returns the mean time of a step of this package, in seconds."""
        with tempfile.TemporaryDirectory(prefix="qlora-bench-") as folder:
            command = [sys.executable, "-m", "qlora_kernels", "finetune", *_ARGUMENTS]
            command += ["--rank", str(self.point.rank), "--device", self.settings.device, "--out", folder]
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.settings.threads)}
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise RuntimeError(f"qlora-kernels finetune: {lines[-1]}")
            with open(os.path.join(folder, "metrics.json")) as file:
                metrics = json.load(file)
        self._metrics.append(metrics)
        self.rounds_done += 1
        return BATCH * TOKENS / metrics["results"]["qlora"]["tokens_per_second"]

    def result(self) -> dict[str, Any]:
        """As :meth:`qlora_kernels.bench.timing.measure.Measurement.result` gives it, with tokens a second."""
        return {
            **self.point.as_dict(),
            "title": TITLE,
            "flops": None,
            "rounds": self.rounds_done,
            # Of the machine's time; the command's own processes are not others, and cannot be told from them.
            "other_processes": None,
            # What the command chose for this device, whatever dtype the point has.
            "activations": self._metrics[0]["activations"] if self._metrics else None,
            "contenders": [self._describe(name, key) for name, key in RESULTS.items()],
        }

    def _describe(self, name: str, key: str) -> dict[str, Any]:
        runs = [metrics["results"][key] for metrics in self._metrics]
        quantiles = quantiles_of([BATCH * TOKENS / run["tokens_per_second"] for run in runs])
        return {
            "name": name,
            "samples": len(runs),
            "median_ms": quantiles[50] * 1e3,
            **{f"q{q}_ms": value * 1e3 for q, value in quantiles.items() if q != 50},
            "tokens_per_second": BATCH * TOKENS / quantiles[50],
            # Beyond what interpreter and libraries take.
            "peak": max(run["peak"] - (metrics["library_memory"] or 0) for run, metrics in zip(runs, self._metrics)),
            "peak_method": runs[0]["memory_method"],
            "error": None,
            "bytes": None,
            "copies": 1,
            "peak_allocated": None,
        }
