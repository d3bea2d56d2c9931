"""The table at the end, and metrics.json."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.experts import adapted_layers
from ...models.quantize import QuantizeReport
from ...native.build_info import build_info, version

#: The rows of the table in order: key of the result, title.
TITLES = {
    "base16": "16-bit base",
    "nf4": "NF4 base",
    "qlora": "NF4 + LoRA",
    "lora16": "16-bit + LoRA",
    "full": "full fine-tuning",
}


def sizes(model: nn.Module, report: QuantizeReport) -> dict[str, Any]:
    """Bytes of a quantized model's base, and of the same base with every parameter in 16 bits.

    Adapters are not counted; the 256-entry table that all layers share is counted once.
    """
    layers = dict(adapted_layers(model))
    weights = sum(layer.weight.numel() for layer in layers.values())
    packed = sum(layer.weight.nbytes for layer in layers.values())
    counted = tuple(f"{name}.{prefix}" for name in layers for prefix in ("weight_", "lora_A.", "lora_B."))
    others = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(counted))
    return {
        "quantized_layers": len(report.quantized) + len(report.experts),
        "adapted_layers": len(report.adapted) + len(report.adapted_experts),
        "left_alone": report.left_alone,
        "quantized_weights": weights,
        "other_parameters": others,
        "bits_per_weight": 8 * packed / weights,
        "base_bytes_16bit": 2 * (weights + others),
        "base_bytes_nf4": packed + 2 * others + 4 * 256,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def recovery(results: dict[str, Any]) -> float | None:
    """The share of 16-bit LoRA's gain that NF4 + LoRA reaches, both measured from the 16-bit base."""
    if "lora16" not in results or "base16" not in results:
        return None
    base = results["base16"]["loss"]
    gain = base - results["lora16"]["loss"]
    return (base - results["qlora"]["loss"]) / gain if gain > 0 else None


def cells(results: dict[str, Any], size: dict[str, Any]) -> list[tuple[str, ...]]:
    """The header of the table, and a row for each model."""
    dense, quantized = (_bytes(size[f"base_bytes_{kind}"]) for kind in ("16bit", "nf4"))
    bits = f"{size['bits_per_weight']:.3f}"
    header = ("", "held-out loss", "bits/weight", "base", "trainable", "time", "peak memory")
    rows: list[tuple[str, ...]] = [header]
    for key, title in TITLES.items():
        if key not in results:
            continue
        result = results[key]
        four_bit = key in ("nf4", "qlora")
        count = result.get("trainable")
        rows.append(
            (
                title,
                f"{result['loss']:.4f}",
                bits if four_bit else "16",
                quantized if four_bit else dense,
                f"{count:,}" if count else "-",
                f"{result['seconds']:.1f} s",
                _bytes(result["peak"]) if result["peak"] else "?",
            )
        )
    return rows


def table(results: dict[str, Any], size: dict[str, Any]) -> str:
    """The results as aligned text."""
    rows = cells(results, size)
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row: tuple[str, ...]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        return "  ".join(cells).rstrip()

    header, *lines = map(line, rows)
    return "\n".join([header, "-" * (sum(widths) + 2 * len(widths) - 2), *lines])


def conclusions(results: dict[str, Any], start: int | None, method: str) -> list[str]:
    """Sentences about the table."""
    lines = []
    before, after = results["nf4"]["loss"], results["qlora"]["loss"]
    lines.append(f"The adapters lower the held-out loss of the NF4 base by {before - after:.4f} nats per token.")
    share = recovery(results)
    if share is not None:
        lines.append(f"NF4 + LoRA recovers {100 * share:.1f}% of what LoRA gains on the 16-bit base.")
    if start is not None and method.startswith("resident"):
        lines.append(
            f"Peak memory is {method}, while training or, for the bases, evaluating; "
            f"{_bytes(start)} of it are Python, torch and transformers."
        )
    return lines


def versions() -> dict[str, str]:
    import transformers

    return {
        "qlora_kernels": version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """What the run's times were measured on."""
    info = build_info()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": info.get("isa_in_use"),
        "gpus": info["gpus"],
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
