"""Two processes with optimizers of sharded parameters; test_shards.py starts them and reads what they found."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from optimizers.runs import KINDS, bits
from qlora_kernels import PagedAdamW, QLinear

# Rows that two processes share unevenly, one row alone, none, more dimensions. In the second list blocks of 256 begin
# with the shards.
UNEVEN = [(7, 5), (3,), (1, 9), (0, 4), (300, 40), (5, 2, 3)]
ALIGNED = [(4, 128), (512,), (256, 64)]
CUT = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def mesh_of(*shape: int):
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("xyz"[: len(shape)]))


def both(make, shapes, placements, mesh, dtype=torch.float32, **options):
    """Parameters whole and sharded, with an optimizer each."""
    generator = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    cut = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in whole]
    return (whole, make(whole, **options)), (cut, make(cut, **options))


def give(whole, cut, step: int, integers: bool = False) -> None:
    """Sets the same gradients on both."""
    generator = torch.Generator().manual_seed(100 + step)
    for p, q in zip(whole, cut):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = (grad.mul(3).round() if integers else grad).to(p.dtype)
        q.grad = distribute_tensor(p.grad.clone(), q.device_mesh, q.placements) if isinstance(q, DTensor) else p.grad


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_equal(whole, cut) -> None:
    for p, q in zip(whole, cut):
        assert bits(p) == bits(full(q)), f"{list(p.shape)}"


def whole_states(optimizer) -> list:
    entries = optimizer.state_dict()["state"].values()
    return [{key: bits(full(value)) for key, value in entry.items()} for entry in entries]


@scenario
def steps_are_those_of_the_whole(rank, folder):
    mesh = mesh_of(2)
    for kind, make in KINDS.items():
        shapes = ALIGNED if kind.endswith("8") else UNEVEN
        for placements in CUT.values():
            if placements == [Shard(1)]:  # blocks of 8 bits would run through other elements
                shapes = [shape for shape in UNEVEN if len(shape) > 1] if not kind.endswith("8") else []
            for dtype, master in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
                if not shapes:
                    continue
                options = {"master_weights": master, "page_file": folder}
                (whole, a), (cut, b) = both(make, shapes, placements, mesh, dtype, **options)
                engines = set()
                for step in range(3):
                    give(whole, cut, step)
                    a.step()
                    b.step()
                    engines.add(b._engine)
                assert_equal(whole, cut)
                assert len(engines) == 1, "the arena is not made again without need"
                b.page_out()
                if not kind.endswith("8"):
                    assert whole_states(a) == whole_states(b)


@scenario
def a_norm_is_that_of_all_shards_once(rank, folder):
    # Sums of squares of integers are exact in any order: the same bits as without shards.
    meshes = {(2,): [[Shard(0)], [Replicate()]], (2, 1): [[Replicate(), Shard(0)], [Shard(0), Shard(1)]]}
    meshes[1, 2] = [[Replicate(), Shard(0)], [Shard(0), Shard(0)], [Shard(0), Replicate()]]
    for shape, ways in meshes.items():
        mesh = mesh_of(*shape)
        for placements in ways:
            shapes = [s for s in UNEVEN if len(s) > 1]
            (whole, a), (cut, b) = both(KINDS["adamw"], shapes, placements, mesh, max_grad_norm=1.5)
            # An ordinary parameter, the same in both processes, and one that is replicated.
            for params, optimizer in ((whole, a), (cut, b)):
                params.append(nn.Parameter(torch.ones(600)))
                optimizer.add_param_group({"params": [params[-1]], "lr": 0.3})
            extra = nn.Parameter(torch.ones(30))
            whole.append(extra)
            a.add_param_group({"params": [extra]})
            cut.append(nn.Parameter(distribute_tensor(torch.ones(30), mesh, [Replicate()] * mesh.ndim)))
            b.add_param_group({"params": [cut[-1]]})
            for step in range(2):
                give(whole, cut, step, integers=True)
                a.step()
                b.step()
                assert a.grad_norm == b.grad_norm > 3
            assert_equal(whole, cut)


@scenario
def a_norm_is_the_same_in_all_processes(rank, folder):
    norms = []
    for _ in range(2):
        (whole, a), (cut, b) = both(KINDS["adamw"], UNEVEN, [Shard(0)], mesh_of(2), max_grad_norm=0.5)
        give(whole, cut, 0)
        a.step()
        b.step()
        norms.append(b.grad_norm)
        assert abs(a.grad_norm - b.grad_norm) < 1e-6 * a.grad_norm
        for p, q in zip(whole, cut):
            torch.testing.assert_close(full(q), p.detach(), rtol=1e-6, atol=1e-7)
    assert norms[0] == norms[1]
    every = [None, None]
    dist.all_gather_object(every, norms)
    assert every[0] == every[1]


@scenario
def a_gradient_that_is_not_finite_in_one_process_stops_all(rank, folder):
    (_, _), (cut, b) = both(KINDS["adamw-8"], UNEVEN, [Shard(0)], mesh_of(2), skip_nonfinite=True)
    (whole, _), _ = both(KINDS["adamw-8"], UNEVEN, [Shard(0)], mesh_of(2))
    give(whole, cut, 0)
    before = [bits(p.to_local()) for p in cut]
    if rank == 1:
        cut[0].grad.to_local()[-1, -1] = float("nan")
    b.step()
    assert b.skipped_steps == 1
    assert [bits(p.to_local()) for p in cut] == before
    give(whole, cut, 0)
    b.step()
    assert b.skipped_steps == 1
    assert bits(cut[4].to_local()) != before[4]


@scenario
def a_scaler_finds_infinities_for_all(rank, folder):
    (whole, _), (cut, b) = both(KINDS["adamw"], UNEVEN, [Shard(0)], mesh_of(2), max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    give(whole, cut, 0)
    before = [bits(p.to_local()) for p in cut]
    if rank == 0:
        cut[4].grad.to_local()[0, 0] = float("inf")
    scaler.step(b)
    scaler.update()
    assert [bits(p.to_local()) for p in cut] == before
    assert scaler.get_scale() == 4.0
    assert b.skipped_steps == 1
    give(whole, cut, 0)
    scaler.step(b)
    assert bits(cut[4].to_local()) != before[4]


class Small(nn.Module):
    """4-bit layers with adapters, and dense ones, one of them with a single row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(QLinear(64, 96, rank=3), nn.Tanh(), QLinear(96, 64, rank=5), nn.LayerNorm(64))
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        return self.head(self.layers(x))


def sharded(**options):
    from torch.distributed.fsdp import fully_shard

    model, mesh = Small(), mesh_of(2)
    for layer in model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)


def run(model, optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@scenario
def fsdp2_trains_adapters_of_4_bit_layers(rank, folder):
    for state_bits in (32, 8):
        model, optimizer = sharded(state_bits=state_bits, max_grad_norm=1.0)
        whole = Small()
        twin = PagedAdamW(
            [p for p in whole.parameters() if p.requires_grad], lr=1e-2, state_bits=state_bits, max_grad_norm=1.0
        )
        start = {name: p.detach().clone() for name, p in whole.named_parameters()}
        # Both processes have the same batches: their mean gradient is that of one.
        run(model, optimizer, range(4))
        run(whole, twin, range(4))
        for (name, p), q in zip(whole.named_parameters(), model.parameters()):
            assert isinstance(q, DTensor)
            torch.testing.assert_close(full(q), p.detach(), rtol=1e-3, atol=2e-4 if state_bits == 32 else 1e-2)
            assert torch.equal(p, start[name]) != p.requires_grad, name
        assert abs(optimizer.grad_norm - twin.grad_norm) < 2e-3 * twin.grad_norm


@scenario
def fsdp2_over_tensor_parallel_layers(rank, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for shape in ((1, 2), (2, 1)):
        mesh, models = mesh_of(*shape), []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
        model, whole = models
        parallelize_module(model, mesh["y"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["x"])
        optimizer, twin = (PagedAdamW(m.parameters(), lr=1e-2, max_grad_norm=0.5) for m in (model, whole))
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            for one, group in ((model, optimizer), (whole, twin)):
                group.zero_grad()
                one(x).square().sum().backward()
                group.step()
            assert abs(optimizer.grad_norm - twin.grad_norm) < 1e-4 * twin.grad_norm
        for p, q in zip(whole.parameters(), model.parameters()):
            torch.testing.assert_close(full(q), p.detach(), rtol=1e-3, atol=1e-4)
        saved = {"state": copy.deepcopy(twin.state_dict()["state"]), "param_groups": twin.state_dict()["param_groups"]}
        optimizer.load_state_dict(saved)
        assert whole_states(optimizer) == whole_states(twin)


def checkpoint_of(model, optimizer) -> dict:
    from torch.distributed.checkpoint import state_dict as api

    return {"optimizer": api.get_optimizer_state_dict(model, optimizer)}


@scenario
def a_checkpoint_of_two_processes(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    for name, options in {"32": {}, "8": {"state_bits": 8}}.items():
        model, optimizer = sharded(**options)
        run(model, optimizer, range(3))
        before = whole_states(optimizer), [bits(full(p)) for p in model.parameters()]
        state = checkpoint_of(model, optimizer)
        for entry in state["optimizer"]["state"].values():
            assert {key for key, value in entry.items() if isinstance(value, DTensor)} == {"exp_avg", "exp_avg_sq"}
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        weights = {key: full(value) for key, value in model.state_dict().items()}
        states = {
            key: {k: full(v).clone() for k, v in entry.items()} for key, entry in state["optimizer"]["state"].items()
        }
        if rank == 0:
            torch.save({"model": weights, "states": states}, f"{folder}/{name}.pt")
        assert (whole_states(optimizer), [bits(full(p)) for p in model.parameters()]) == before
        # Another run of two processes, later.
        later, resumed = sharded(**options)
        with torch.no_grad():
            for p, q in zip(later.parameters(), model.parameters()):
                p.to_local().copy_(q.to_local())
        mine = checkpoint_of(later, resumed)
        dcp.load(mine, checkpoint_id=f"{folder}/{name}")
        api.set_optimizer_state_dict(later, resumed, mine["optimizer"])
        if name == "32":
            assert whole_states(resumed) == before[0]
        run(model, optimizer, [3, 4])
        run(later, resumed, [3, 4])
        for p, q in zip(model.parameters(), later.parameters()):
            if name == "32":
                assert bits(full(p)) == bits(full(q))
            else:
                torch.testing.assert_close(full(p), full(q), rtol=0, atol=5e-3)


@scenario
def full_state_dicts_come_from_one_process(rank, folder):
    from torch.distributed.checkpoint import state_dict as api

    for state_bits in (32, 8):
        model, optimizer = sharded(state_bits=state_bits)
        run(model, optimizer, range(3))
        whole = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = api.get_optimizer_state_dict(model, optimizer, options=whole)
        assert bool(saved) == (rank == 0), "torch gives it to the first process alone"
        later, resumed = sharded(state_bits=state_bits)
        sent = api.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        api.set_optimizer_state_dict(later, resumed, saved, options=sent)
        for p, q in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"]):
            assert resumed.state[q]["step"] == 3
            for one, other in zip(optimizer.state[p].values(), resumed.state[q].values()):
                if state_bits == 32:
                    assert bits(full(one)) == bits(full(other))
                elif one.dtype == torch.uint8:
                    assert not ((one.int() - other.int()).abs() > 1).any(), "codes may change by one"


@scenario
def a_checkpoint_of_one_process_is_read_by_two(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    wanted = torch.load(f"{folder}/one.pt")
    model, optimizer = sharded()
    mine = checkpoint_of(model, optimizer)
    dcp.load(mine, checkpoint_id=f"{folder}/one")
    api.set_optimizer_state_dict(model, optimizer, mine["optimizer"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, p in zip(names, optimizer.param_groups[0]["params"]):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert bits(full(optimizer.state[p][key])) == bits(wanted[name][key]), (name, key)


@scenario
def states_of_a_whole_optimizer_are_cut(rank, folder):
    for saved_bits in (32, 8):
        for state_bits in (32, 8):
            make = lambda params, **more: PagedAdamW(params, **more)  # noqa: E731
            (whole, a), (cut, _) = both(make, ALIGNED, [Shard(0)], mesh_of(2), state_bits=saved_bits)
            b = PagedAdamW(cut, state_bits=state_bits)
            for step in range(2):
                give(whole, cut, step)
                a.step()
            saved = copy.deepcopy(a.state_dict())
            b.load_state_dict(saved)
            wide = a.torch_state_dict()["state"].values()
            again = b.torch_state_dict()["state"].values()
            for one, other in zip(wide, again):
                for key in ("exp_avg", "exp_avg_sq"):
                    error = (full(other[key]) - one[key]).abs().max()
                    assert error <= (0 if state_bits == 32 else 0.02) * one[key].abs().max()
                assert one["step"] == full(other["step"]) == 2


@scenario
def groups_and_copies(rank, folder):
    (whole, a), (cut, b) = both(KINDS["adamw"], UNEVEN, [Shard(0)], mesh_of(2))
    for step in range(4):
        if step == 2:
            for params, optimizer in ((whole, a), (cut, b)):
                more = torch.full((9, 2), 0.5)
                params.append(nn.Parameter(distribute_tensor(more, mesh_of(2), [Shard(0)]) if optimizer is b else more))
                optimizer.add_param_group({"params": [params[-1]], "lr": 0.1})
        give(whole, cut, step)
        a.step()
        b.step()
    assert_equal(whole, cut)
    assert whole_states(a) == whole_states(b)
    # Other memory for the same shards, as FSDP2 gives them where a model was moved.
    for p in cut:
        p._local_tensor, old = p._local_tensor.clone(), p._local_tensor
        old.fill_(-1)
    give(whole, cut, 4)
    a.step()
    b.step()
    assert_equal(whole, cut)


def refused(error, text: str, call) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


@scenario
def what_cannot_be_done_is_said(rank, folder):
    mesh = mesh_of(2)
    (whole, a), (cut, b) = both(KINDS["adamw"], UNEVEN, [Shard(0)], mesh)
    give(whole, cut, 0)
    a.step()
    b.step()
    before = [bits(p.to_local()) for p in cut]
    refused(ValueError, "torch.distributed.checkpoint", lambda: b.save(f"{folder}/never.pt"))
    assert not Path(f"{folder}/never.pt").exists()
    refused(ValueError, "full_tensor() makes it an ordinary one", lambda: a.load_state_dict(b.state_dict()))
    term = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    refused(TypeError, "only sharded or replicated parameters", lambda: PagedAdamW([term]))
    saved = copy.deepcopy(a.state_dict())
    saved["state"][0]["exp_avg"] = torch.ones(7, 6)
    refused(
        ValueError,
        "'exp_avg' of parameter 0 is [7, 6], the parameter [7, 5]",
        lambda: b.load_state_dict(saved),
    )
    # A gradient that every process has whole is cut; one of a part of the shape is not taken for all of it.
    give(whole, cut, 1)
    a.step()
    cut[0].grad = None
    cut[0].grad = distribute_tensor(whole[0].grad.clone(), mesh, [Replicate()])
    b.step()
    assert_equal(whole, cut)
    assert [bits(p.to_local()) for p in cut] != before


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    outcomes = {}
    for name, function in SCENARIOS.items():
        try:
            function(rank, folder)
            outcomes[name] = ""
        except BaseException:  # what the test shows; pytest's failures are no exceptions
            outcomes[name] = traceback.format_exc()
            break  # the other process may be waiting for this one
    Path(f"{folder}/{rank}.json").write_text(json.dumps(outcomes))
    if not any(outcomes.values()):
        dist.barrier()  # neither process leaves while the other still waits for an answer
    # Skips the interpreter's shutdown: gloo's threads sometimes outlive their groups there, which aborts.
    os._exit(0)
