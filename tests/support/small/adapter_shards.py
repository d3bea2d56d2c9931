"""A small Llama in shards of FSDP2, in one process or two: its adapters are loaded, saved and refused."""

from __future__ import annotations

import copy
import datetime
import json
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qlora_kernels import load_adapter, qlora_layers, save_adapter
from small.llama import IDS, logits, quantized


def prepare(folder: Path) -> None:
    """Adapters of a model that is not sharded."""
    model = source()
    save_adapter(model, folder / "source")
    save_adapter(quantized(rank=2), folder / "rank 2")
    save_adapter(quantized(target_modules=["q_proj"]), folder / "fewer")


def source():
    """A model whose head and first norm were trained; the norm has an odd number of rows for two processes."""
    torch.manual_seed(5)
    model = quantized()
    for parameter in (model.lm_head.weight, model.model.norm.weight):
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def in_shards(model):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def target():
    model = quantized()
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)
    return in_shards(model)


def loads(folder: Path, rank: int) -> None:
    wanted = logits(source())
    model = target()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert not torch.equal(logits(model), wanted)  # after this the root's parameters are whole
    parameters = {name: id(p) for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert parameters or dist.get_world_size() == 1
    load_adapter(model, folder / "source")
    assert torch.equal(logits(model), wanted)
    # training goes on from these values, in step with a model that is not sharded
    twin = source()
    other = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    for each, group in ((model, optimizer), (twin, other)):
        each.train()
        for _ in range(2):
            group.zero_grad()
            each(IDS, labels=IDS).loss.backward()
            group.step()
        each.eval()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(twin), wanted)


def saves(folder: Path, rank: int) -> None:
    model = in_shards(source())
    logits(model)
    save_adapter(model, folder / "saved")
    files = {name: (folder / name / "adapter_model.safetensors").read_bytes() for name in ("source", "saved")}
    assert files["source"] == files["saved"]
    (folder / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_adapter(model, folder / "file")


def refuses(folder: Path, rank: int) -> None:
    model = target()
    before = copy.deepcopy([p.detach().full_tensor() for p in model.parameters()])
    for name, message in (
        ("rank 2", "has rank 2 in the file, while .* has it with rank 4"),
        ("fewer", "is not in the file, while .* has it with rank 4"),
    ):
        with pytest.raises(RuntimeError, match=rf"sharded by FSDP2, and adapter 'default' {message}"):
            load_adapter(model, folder / name)
    with pytest.raises(RuntimeError, match=r"'other' has rank 4 in the file, while .* does not have it"):
        load_adapter(model, folder / "fewer", "other")
    layer = next(layer for _, layer in qlora_layers(model))
    with pytest.raises(RuntimeError, match="adapter 'new' cannot be added; do that before fully_shard"):
        layer.add_adapter("new")
    with pytest.raises(RuntimeError, match="adapter 'default' cannot be deleted"):
        layer.delete_adapter("default")
    after = [p.full_tensor() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert set(layer.adapters) == {"default"}


SCENARIOS = {function.__name__: function for function in (loads, saves, refuses)}


def work(rank: int, folder: str) -> None:
    """One of two processes; leaves what went wrong in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    outcomes = dict.fromkeys(SCENARIOS, "not reached")
    for name, function in SCENARIOS.items():
        try:
            function(Path(folder), rank)
            outcomes[name] = ""
        except BaseException:  # what the test shows; pytest's failures are no exceptions
            outcomes[name] = traceback.format_exc()
            break  # the other process may be waiting for this one
    Path(f"{folder}/{rank}.json").write_text(json.dumps(outcomes))
    if not any(outcomes.values()):
        dist.barrier()  # neither process leaves while the other still waits for an answer
    # Skips the interpreter's shutdown: gloo's threads sometimes outlive their groups there, which aborts.
    os._exit(0)
