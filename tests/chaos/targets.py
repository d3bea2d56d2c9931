"""The commands and functions that write, each with the smallest work there is, and how their output is judged.

Everything is imported here: a signal while a command imports would say nothing of how it writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_runs.cases import limits_case
from safetensors.torch import load_file
from small.blocks import Model, randomize
from small.blocks import quantize as quantize_model

from qlora_kernels.bench import command as bench_command
from qlora_kernels.bench.report import results as bench_results
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.finetune import checkpoint
from qlora_kernels.formats import nf4
from qlora_kernels.models.adapter_files import load_adapter, save_adapter
from qlora_kernels.models.targets import qlora_layers
from qlora_kernels.optim import PagedAdamW
from qlora_kernels.storage.digest import digest

SAVES = 6  # of the functions, one after the other
_FINETUNE = [
    *("--steps", "6", "--seq-len", "32", "--batch-size", "1", "--rank", "4", "--lora-dropout", "0.1"),
    *("--eval-tokens", "64", "--sample-tokens", "0", "--save-every", "2", "--quiet"),
]
_TINY = ["--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "32", "--pretrain-steps", "4"]


@dataclass(frozen=True)
class Target:
    """Something that writes.

    Attributes:
        run: called with the folder to write in, and a folder with a model and the like; returns an exit code.
        check: called with the folder; raises when a file with a final name is not whole.
        result: called with the folder; equal for equal outcomes. None while it is not complete.
    """

    run: Callable[[str, str], int]
    check: Callable[[str], None]
    result: Callable[[str], Any]


def _sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------- finetune


def _finetune(folder: str, *more: str) -> int:
    out = os.path.join(folder, "out")
    resume = ["--resume"] if os.path.isfile(checkpoint.path_in(out)) else []
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["finetune", *_FINETUNE, *more, "--out", out, *resume])


def finetune(folder: str, given: str) -> int:
    return _finetune(folder, "--model", os.path.join(given, "model"))


def finetune_tiny(folder: str, given: str) -> int:
    return _finetune(folder, *_TINY, "--cache", os.path.join(folder, "cache"))


def _check_run(folder: str) -> None:
    out = os.path.join(folder, "out")
    if os.path.exists(checkpoint.path_in(out)):
        checkpoint.load(out)
    if os.path.exists(f"{out}/metrics.json"):
        json.loads(Path(f"{out}/metrics.json").read_text())
    if os.path.exists(f"{out}/loss.png"):
        assert Path(f"{out}/loss.png").read_bytes().endswith(b"IEND\xaeB\x60\x82"), "half a picture"
    if os.path.exists(f"{out}/adapter/adapter_model.safetensors"):
        load_file(f"{out}/adapter/adapter_model.safetensors")
    for base in Path(folder).glob("cache/tiny-base-*"):
        assert (base / "pretraining.json").exists(), "half a base"


def _run_result(folder: str) -> Any:
    out = os.path.join(folder, "out")
    if not os.path.exists(f"{out}/metrics.json") or os.path.exists(checkpoint.path_in(out)):
        return None
    results = json.loads(Path(f"{out}/metrics.json").read_text())["results"]
    figures = {key: (value["loss"], value.get("losses")) for key, value in results.items()}
    # Tensor by tensor: safetensors writes the entries of its metadata in any order.
    adapter = digest(load_file(f"{out}/adapter/adapter_model.safetensors"))
    return figures, adapter, os.path.exists(f"{out}/loss.png"), os.path.exists(f"{out}/adapter/adapter_config.json")


# ------------------------------------------------------------------------------------------------------- quantize


def quantize(folder: str, given: str) -> int:
    out = os.path.join(folder, "deep", "out")
    done = os.path.exists(out)  # by an earlier attempt, which was interrupted after its last step
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["quantize", os.path.join(given, "model"), out, "--max-shard-size", "100KB", "--quiet"])
    return 0 if done and code == 2 else code


def _quantize_result(folder: str) -> Any:
    out = Path(folder, "deep", "out")
    return {path.name: _sha(str(path)) for path in out.iterdir()} if out.exists() else None


def _check_quantized(folder: str) -> None:
    result = _quantize_result(folder)
    assert result is None or {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= result.keys()
    if result:
        index = json.loads(Path(folder, "deep", "out", "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) <= result.keys()


# ------------------------------------------------------------------------------------------------------- bench


def bench(folder: str, given: str) -> int:
    """With figures that are made up: its workers, which measure, write nothing."""
    case = limits_case()

    def run(*_: Any):
        for _ in range(4):
            time.sleep(0.02)
            yield case

    bench_command.run = run
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["bench", "--quick", "--quiet", "--out", os.path.join(folder, "bench.jsonl")])


def _check_bench(folder: str) -> None:
    if os.path.exists(f"{folder}/bench.jsonl"):
        bench_results.load(f"{folder}/bench.jsonl")


def _bench_result(folder: str) -> Any:
    if not os.path.exists(f"{folder}/bench.jsonl"):
        return None
    loaded = bench_results.load(f"{folder}/bench.jsonl")
    return len(loaded["cases"]) if loaded["complete"] else None


# ------------------------------------------------------------------------------------------------------- functions


def _saves(save: Callable[[int], None]) -> int:
    try:
        for number in range(SAVES):
            save(number)
    except (OSError, InputError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _weight(number: int) -> nf4.NF4Weight:
    torch.manual_seed(number)
    return nf4.quantize(torch.randn(256, 256))


def weight(folder: str, given: str) -> int:
    return _saves(lambda number: _weight(number).save(os.path.join(folder, "weight.safetensors")))


def _check_weight(folder: str) -> None:
    if os.path.exists(f"{folder}/weight.safetensors"):
        packed = nf4.NF4Weight.load(f"{folder}/weight.safetensors").packed
        assert any(torch.equal(packed, _weight(number).packed) for number in range(SAVES))


def _optimizer(number: int) -> PagedAdamW:
    torch.manual_seed(number)
    parameter = torch.nn.Parameter(torch.randn(8192))
    optimizer = PagedAdamW([parameter])
    parameter.grad = torch.randn(8192)
    optimizer.step()
    return optimizer


def optimizer(folder: str, given: str) -> int:
    return _saves(lambda number: _optimizer(number).save(os.path.join(folder, "optimizer.pt")))


def _check_optimizer(folder: str) -> None:
    if os.path.exists(f"{folder}/optimizer.pt"):
        _optimizer(0).load(f"{folder}/optimizer.pt")


def _model(number: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Model()
    quantize_model(model, rank=4 + number % 2)
    torch.manual_seed(number)
    randomize(model)
    return model


def adapter(folder: str, given: str) -> int:
    # Two ranks in turn: their files cannot be mixed.
    return _saves(lambda number: save_adapter(_model(number % 2), os.path.join(folder, "adapter")))


def _check_adapter(folder: str) -> None:
    if os.path.exists(f"{folder}/adapter/adapter_model.safetensors"):
        model = _model(0)
        load_adapter(model, f"{folder}/adapter")
        layers = [layer for _, layer in qlora_layers(model)]
        found = torch.cat([layer.lora_B["default"].flatten() for layer in layers])
        assert any(
            torch.equal(found, torch.cat([layer.lora_B["default"].flatten() for _, layer in qlora_layers(_model(n))]))
            for n in (0, 1)
        )


def _file_result(name: str) -> Callable[[str], Any]:
    return lambda folder: os.path.exists(os.path.join(folder, name)) or None


TARGETS = {
    "finetune": Target(finetune, _check_run, _run_result),
    "finetune tiny": Target(finetune_tiny, _check_run, _run_result),
    "quantize": Target(quantize, _check_quantized, _quantize_result),
    "bench": Target(bench, _check_bench, _bench_result),
    "adapter": Target(adapter, _check_adapter, _file_result("adapter/adapter_config.json")),
    "optimizer": Target(optimizer, _check_optimizer, _file_result("optimizer.pt")),
    "weight": Target(weight, _check_weight, _file_result("weight.safetensors")),
}
