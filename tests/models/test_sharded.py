"""Adapters of models that FSDP2 has sharded, in one process and in two; and FSDP1, which is refused."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from small import adapter_shards

from qlora_kernels import load_adapter, quantize_model, save_adapter


@pytest.mark.parametrize("name", adapter_shards.SCENARIOS)
def test_one_process(tmp_path, name):
    adapter_shards.prepare(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        adapter_shards.SCENARIOS[name](tmp_path, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    adapter_shards.prepare(tmp_path)
    processes = torch.multiprocessing.spawn(adapter_shards.work, (str(tmp_path),), nprocs=2, join=False)
    end = time.monotonic() + 240
    while not processes.join(timeout=5):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    for rank in (0, 1):
        outcomes = json.loads((tmp_path / f"{rank}.json").read_text())
        assert outcomes == dict.fromkeys(adapter_shards.SCENARIOS, ""), f"process {rank}: " + "".join(outcomes.values())


def test_flat_parameters_are_refused(tmp_path):
    class FullyShardedDataParallel(nn.Sequential):
        """FSDP1 needs a device that can be a mesh's; its name is what counts here."""

    model = nn.Sequential(nn.Linear(8, 8))
    quantize_model(model, 2, progress=False)
    save_adapter(model, tmp_path)
    wrapped = FullyShardedDataParallel(model)
    for call in (load_adapter, save_adapter):
        with pytest.raises(RuntimeError, match=r"wrapped in FullyShardedDataParallel.*use fully_shard \(FSDP2\)"):
            call(wrapped, tmp_path)
