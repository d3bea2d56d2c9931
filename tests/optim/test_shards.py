"""Paged optimizers of sharded parameters (DTensors, as in FSDP2); two processes run the scenarios of shard_runs.py."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
import torch.distributed as dist
from engines import engine_named

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from optimizers import shard_runs
from optimizers.runs import KINDS, bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from qlora_kernels import PagedAdamW
from qlora_kernels.optim import shards


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory):
    """The folder in which two processes ran all scenarios of shard_runs."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("shards")
    # What they find: a checkpoint of an optimizer of one process.
    model = shard_runs.Small()
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    shard_runs.run(model, optimizer, range(3))
    state = shard_runs.checkpoint_of(model, optimizer)
    dcp.save(state, checkpoint_id=str(folder / "one"), no_dist=True)
    torch.save(state["optimizer"]["state"], folder / "one.pt")
    processes = torch.multiprocessing.spawn(shard_runs.work, (str(folder),), nprocs=2, join=False)
    end = time.monotonic() + 240
    while not processes.join(timeout=5):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", shard_runs.SCENARIOS)
def test_two_processes(folder, name):
    outcomes = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, outcome in enumerate(outcomes):
        assert name in outcome, f"process {rank} ended before: {list(outcome.values())[-1]}"
        assert not outcome[name], f"process {rank}: {outcome[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["32", "8"])
def test_a_checkpoint_of_two_processes_is_read_by_one(folder, name):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    saved = torch.load(folder / f"{name}.pt")
    model = shard_runs.Small()
    model.load_state_dict(saved["model"])
    # The codes of two processes' shards were decoded; 32 bits hold what they meant.
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    mine = shard_runs.checkpoint_of(model, optimizer)
    dcp.load(mine, checkpoint_id=str(folder / name), no_dist=True)
    api.set_optimizer_state_dict(model, optimizer, mine["optimizer"])
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    for key, p in zip(names, optimizer.param_groups[0]["params"]):
        assert {k: bits(v) for k, v in optimizer.state[p].items()} == {
            k: bits(v) for k, v in saved["states"][key].items()
        }
    shard_runs.run(model, optimizer, [3])


@pytest.fixture(name="alone")
def alone_fixture():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield shard_runs.mesh_of(1)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["portable", "emulated-forward"])
def test_one_process_has_the_bits_of_no_mesh(alone, kind, where):
    options = {"max_grad_norm": 0.7} if where == "portable" else {}
    with engine_named(where):
        (whole, a), (cut, b) = shard_runs.both(
            KINDS[kind],
            shard_runs.UNEVEN,
            shard_runs.CUT["rows"],
            alone,
            torch.bfloat16,
            master_weights=True,
            **options,
        )
        for step in range(3):
            shard_runs.give(whole, cut, step)
            a.step()
            b.step()
        shard_runs.assert_equal(whole, cut)
        assert a.grad_norm == b.grad_norm
        assert (a.grad_norm > 0.7) == bool(options)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
def test_on_a_card_nothing_is_sent_between_norm_and_step(alone, options):
    with engine_named("emulated-forward"), pytest.raises(NotImplementedError, match="clip_grad_norm_ before the step"):
        shard_runs.both(KINDS["adamw"], shard_runs.UNEVEN, shard_runs.CUT["rows"], alone, **options)


def test_shards_that_are_offloaded_stay_on_the_host(alone):
    """FSDP2's CPUOffloadPolicy: the mesh is of cards, the shards are on the host."""
    whole, cut = nn.Parameter(torch.ones(6, 5)), nn.Parameter(distribute_tensor(torch.ones(6, 5), alone, [Shard(0)]))
    cut._spec.mesh = DeviceMesh("cuda", [0], _init_backend=False)
    a, b = PagedAdamW([whole]), PagedAdamW([cut])
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(2):
        whole.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        cut.grad = shards.as_dtensor(whole.grad.clone(), cut)
        a.step()
        b.step()
        assert bits(whole) == bits(cut._local_tensor)
        moment = b.state[cut]["exp_avg"]._local_tensor
        assert (moment.device.type, bits(moment)) == ("cpu", bits(a.state[whole]["exp_avg"]))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert bits(b.state[cut]["exp_avg"]._local_tensor) == bits(a.state[whole]["exp_avg"])
