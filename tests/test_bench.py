"""The benchmarks: nothing is invented, everybody is verified, and a tiny run goes from end to end."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from emulated import emulated

import qlora_kernels
from qlora_kernels import reference
from qlora_kernels.bench import (
    command,
    common,
    compare,
    contenders,
    cuda_timing,
    limits,
    options,
    plots,
    results,
    table,
    worker,
)
from qlora_kernels.bench.common import OURS, Case, Contender, Ready, Settings
from qlora_kernels.bench.contenders import (
    BNB,
    BNB_EVAL,
    COPY,
    DENSE,
    EQUAL_COPY,
    FOREACH,
    FUSED,
    KERNEL,
    PEFT,
    PEFT_EVAL,
    PRODUCT,
    Lab,
)
from qlora_kernels.bench.measure import CudaMeasurement, Measurement, failed_ours
from qlora_kernels.bench.operations import CASES, OPERATIONS, begin, gpt2_forward
from qlora_kernels.bench.peak import peak_allocated
from qlora_kernels.bench.points import MODELS, OPTIMIZER, SWEEPS, Point, point_of
from qlora_kernels.bench.worker import Worker
from qlora_kernels.cli import main
from qlora_kernels.errors import InputError

TINY = Settings(threads=1, cache_bytes=1 << 18, seconds=0.0, min_rounds=2)
WEIGHT = {"n": 128, "k": 192}
POINTS = (
    Point("quantize", **WEIGHT),
    Point("quantize", "float32", **WEIGHT),
    Point("dequantize", **WEIGHT),
    Point("dequantize", "float16", **WEIGHT),
    Point("dequantize_out", **WEIGHT),
    Point("linear_forward", m=1, rank=0, **WEIGHT),
    Point("linear_forward", m=16, rank=0, **WEIGHT),
    Point("linear_forward", "float32", m=3, rank=0, **WEIGHT),
    Point("linear_forward", m=3, rank=4, **WEIGHT),
    Point("linear_dx", m=20, **WEIGHT),
    Point("linear_step", m=20, rank=0, **WEIGHT),
    Point("linear_step", m=20, rank=1, **WEIGHT),
    Point("linear_step", m=20, rank=4, **WEIGHT),
    Point("decode", m=1, rank=4, model="tiny"),
    Point("block_step", m=16, rank=4, model="tiny"),
    *(Point(name, "float32", rank=4, model="tiny") for name in OPTIMIZER),
    Point("gpt2_forward", m=6, rank=4, model="tiny", batch=3),
)
POINT = POINTS[5]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measured(point: Point, settings: Settings = TINY) -> dict:
    """A case, in this process."""
    measurement = begin(settings, point)
    for _ in range(measurement.rounds):
        measurement.round()
    return measurement.result()


@pytest.fixture(scope="module")
def tiny() -> dict:
    """A run of every operation but the limits and whole runs, at tiny sizes; through its file elsewhere."""
    run = results.begin(TINY, "usual")
    run["cases"] = [limits_case(), *map(measured, POINTS)]
    return {**run, "complete": True}


def limits_case(gb_per_s: float = 10.0, tflop_per_s: float = 1.0) -> dict:
    """A measured case of limits, as if by a machine of such speeds."""
    rows = ((COPY, gb_per_s * 1e6, 1.0), (PRODUCT, 1, 1.0))
    return {
        **Point("limits").as_dict(),
        "title": "limits",
        "flops": tflop_per_s * 1e9,
        "rounds": 1,
        "other_processes": 0.0,
        "contenders": [contender(name, median, bytes=nbytes) for name, nbytes, median in rows],
    }


def contender(name: str, median: float, spread: float = 0.01, **more) -> dict:
    """A measured contender, with quantiles around its median."""
    return {
        "name": name,
        "samples": 9,
        "median_ms": median,
        "q20_ms": median * (1 - spread),
        "q80_ms": median * (1 + spread),
        "error": 0.0,
        "bytes": 8,
        "copies": 1,
        "peak_allocated": 0,
        **more,
    }


def fake(prepare_other, name: str = BNB) -> Case:
    """A case in which this package doubles a number, against one other contender."""
    ours = Ready(lambda i: torch.tensor(2.0), lambda y: abs(y.item() - 2), 0.1, bytes=8, copies=4)
    return Case("forward", 2, [Contender(OURS, lambda: ours), Contender(name, prepare_other)])


def of_fake(case: Case, **more) -> dict:
    measurement = Measurement(case, TINY, POINT, **more)
    for _ in range(measurement.rounds):
        measurement.round()
    return measurement.result()


# ---------------------------------------------------------------------------------------------------- contenders


def test_missing_contender_is_reported_not_invented():
    def prepare():
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    case = of_fake(fake(prepare))
    assert case["contenders"][1] == {"name": BNB, "failed": "not installed (bitsandbytes)"}
    assert case["contenders"][0]["samples"] > 0
    text = table.terminal({**results.begin(TINY, "usual"), "cases": [case]})
    assert text.count("not installed (bitsandbytes)") == 2, "in the figures and in the ratios"


def test_failing_contender_is_reported_with_its_reason():
    def prepare():
        raise RuntimeError("no kernel\nfor this processor")

    failed = of_fake(fake(prepare))["contenders"][1]
    assert failed == {"name": BNB, "failed": "RuntimeError: no kernel for this processor"}


@pytest.mark.parametrize("value", [3.0, float("nan")])
@pytest.mark.parametrize("who", [OURS, BNB])
def test_wrong_result_is_not_timed(value, who):
    wrong = Ready(lambda i: torch.tensor(value), lambda y: abs(y.item() - 2), 0.1, bytes=8)
    right = replace(wrong, call=lambda i: torch.tensor(2.0))
    ready = {OURS: right, BNB: right, who: wrong}
    case = of_fake(Case("forward", 2, [Contender(name, lambda name=name: ready[name]) for name in (OURS, BNB)]))
    failed = next(c for c in case["contenders"] if c["name"] == who)
    assert failed["failed"].startswith("wrong result: error")
    assert "median_ms" not in failed
    assert (failed_ours(case) is not None) == (who == OURS)


def test_every_check_counts():
    """A result that is right only the first time is wrong."""
    answers = iter([2.0, 2.0, 5.0])
    ready = Ready(lambda i: torch.tensor(next(answers)), lambda y: abs(y.item() - 2), 0.1, bytes=8, checks=3)
    assert "wrong result: error 3" in of_fake(fake(lambda: ready))["contenders"][1]["failed"]


def test_every_result_counts():
    """NaN in any of several, and too few of them, are errors."""
    right = [torch.ones(3), torch.ones(2)]
    exact = [one.double() for one in right]
    assert common.largest_error(right, exact) == 0
    assert common.largest_error([torch.ones(3), torch.full((2,), 1.5)], exact) == 0.5
    for i in range(2):
        wrong = [one.clone() for one in right]
        wrong[i][0] = math.nan
        assert math.isnan(common.largest_error(wrong, exact))
    with pytest.raises(ValueError, match="zip"):
        common.largest_error(right[:1], exact)


@pytest.mark.parametrize(
    ("operation", "what"),
    [("linear_step", "error nan"), ("decode", "error nan"), ("block_step", "adapters' gradients")],
)
def test_a_gradient_or_layer_that_is_wrong_is_not_timed(operation, what, monkeypatch):
    """The last one, behind others that are right."""
    from qlora_kernels import autograd, ops

    point = next(p for p in POINTS if p.operation == operation and p.rank == 4)
    if operation == "decode":
        original = autograd._forward

        def forward(x, *more):
            y, u = original(x, *more)
            return (y * math.nan if tuple(y.shape[1:]) == list(MODELS["tiny"].linears.values())[-1][:1] else y), u

        monkeypatch.setattr(autograd, "_forward", forward)
    else:
        backward = ops.linear_backward

        def wrong(*arguments):
            dx, dA, dB = backward(*arguments)
            return dx, dA, dB * (math.nan if operation == "linear_step" else 2)

        monkeypatch.setattr(ops, "linear_backward", wrong)
    case = measured(point)
    assert what in case["contenders"][0]["failed"]
    assert all("failed" not in one for one in case["contenders"][1:] if "bitsandbytes" not in one["name"])


def test_an_optimizer_that_does_nothing_is_not_timed(monkeypatch):
    monkeypatch.setattr(qlora_kernels.PagedAdamW, "step", lambda self: None)
    case = measured(next(p for p in POINTS if p.operation == "block_step"))
    assert "of the optimizer's step" in case["contenders"][0]["failed"]
    assert "failed" not in case["contenders"][1]


def test_weights_decode_as_reference_does():
    """Over the boundaries of what is decoded at a time, too."""
    weight = qlora_kernels.quantize(torch.randn(3, 64 * 7 + 24))
    whole = reference.decode(weight.pieces, *weight.shape, torch.bfloat16)
    for at_a_time in (64, 128, 1 << 22):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contenders, "_AT_A_TIME", at_a_time)
            assert torch.equal(contenders.decoded(weight.pieces, *weight.shape, torch.bfloat16), whole)


def test_contenders_alternate_and_copies_rotate():
    calls = []

    def ready(name):
        return Ready(lambda i: calls.append((name, i)), lambda _: 0.0, 0.1, bytes=8, copies=3)

    contenders = [Contender(OURS, lambda: ready("a")), Contender(BNB, lambda: ready("b"))]
    measurement = Measurement(Case("forward", 2, contenders), TINY, POINT)
    assert {name: {i for other, i in calls if other == name} for name in "ab"} == {"a": {0, 1, 2}, "b": {0, 1, 2}}
    calls.clear()
    measurement.round()
    measurement.round()
    order = [name for name, _ in calls]
    changes = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    assert changes == ["a", "b", "a"], "the second round starts with the other one"
    for name in "ab":
        indices = [i for other, i in calls if other == name]
        assert all((i + 1) % 3 == j for i, j in itertools.pairwise(indices))


def test_first_and_last_copy_are_verified():
    seen = []
    ready = Ready(lambda i: seen.append(i), lambda _: 0.0, 0.1, bytes=8, copies=7)
    begun = Measurement(Case("forward", 2, [Contender(OURS, lambda: ready)]), TINY, POINT)
    assert seen[:2] == [0, 6]
    assert begun.runners[0].error == 0.0


def test_copies_exceed_the_cache():
    settings = Settings(cache_bytes=1000)
    assert settings.copies(100) == 13
    assert settings.copies(10**9) == 3
    assert settings.copies(1) == settings.most_copies
    lab = Lab(TINY, Point("dequantize", n=64, k=256))
    for copies in (lab.ours, lab.dense):
        assert len(copies) == TINY.copies(copies[0].nbytes)
    assert len({w.packed.data_ptr() for w in lab.ours}) == len(lab.ours)
    assert all(torch.equal(w.packed, lab.ours[0].packed) for w in lab.ours)


def test_quantiles():
    assert common.quantiles_of([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == {0: 1.0, 20: 2.0, 50: 3.5, 80: 5.0, 100: 6.0}


def test_peak_memory_counts_what_lives_at_one_time():
    """Two of three temporaries at a time, and the result; what is there before counts for nothing."""
    there = torch.ones(100_000)

    def call():
        a = there + 1
        b = a + 1
        del a
        return b + 1

    assert 800_000 <= peak_allocated(call) < 810_000
    assert peak_allocated(lambda: there.add_(1)) < 1000


# ---------------------------------------------------------------------------------------------------- operations


def test_every_operation_is_measured_and_verified(tiny):
    assert {p.operation for p in POINTS} == set(CASES) - {"limits"}
    for point, case in zip(POINTS, tiny["cases"][1:], strict=True):
        assert point_of(case) == point
        ours = case["contenders"][0]
        assert ours["name"] == OURS
        assert 0 < ours["q0_ms"] <= ours["q20_ms"] <= ours["median_ms"] <= ours["q80_ms"] <= ours["q100_ms"]
        for one in case["contenders"]:
            assert ("failed" in one) != ("median_ms" in one), one
            assert "wrong result" not in one.get("failed", ""), one
            if find_spec("bitsandbytes") or "bitsandbytes" not in one["name"]:
                assert ("failed" in one) == (point.operation == "dequantize_out" and one["name"] == BNB), one


def test_contenders_of_each_operation(tiny):
    named = {(c["operation"], c["rank"]): [one["name"] for one in c["contenders"]] for c in tiny["cases"]}
    first = ["qlora_kernels", "torch dense", "dequantize, then dense"]
    assert named["linear_forward", 0] == [*first, "bitsandbytes", "bitsandbytes, eval-mode layer"]
    assert named["linear_dx", None] == [*first, "bitsandbytes"]
    assert named["linear_step", 4] == [*first, "PEFT + bitsandbytes"]
    assert named["linear_step", 0] == [*first, "bitsandbytes"]
    assert named["block_step", 4] == [OURS, DENSE, PEFT]
    assert named["adamw_step", 4] == [OURS, FUSED, FOREACH, BNB, EQUAL_COPY]


def test_bytes_are_what_the_work_must_move(tiny):
    n, k = WEIGHT["n"], WEIGHT["k"]
    cases = {point_of(case): case for case in tiny["cases"]}
    stored = qlora_kernels.quantize(torch.randn(n, k)).nbytes
    forward = {c["name"]: c.get("bytes") for c in cases[POINT]["contenders"]}
    assert forward[OURS] == stored + 2 * (n + k)
    assert forward[DENSE] == 2 * n * k + 2 * (n + k)
    assert cases[POINT]["flops"] == 2 * n * k
    step = cases[Point("linear_step", m=20, rank=4, **WEIGHT)]
    assert step["flops"] == 4 * 20 * n * k + 6 * 20 * 4 * (n + k)
    dequantized = {c["name"]: c.get("bytes") for c in cases[Point("dequantize", **WEIGHT)]["contenders"]}
    assert dequantized[OURS] == stored + 2 * n * k
    tensors = Lab(TINY, Point("adamw_step", "float32", rank=4, model="tiny")).adapter_tensors
    assert len(tensors.parameters) == 2 * 7 * MODELS["tiny"].layers
    each = {"adamw_step": 28, "adamw_clipped_step": 32, "adamw_8bit_step": 16.0625, "lion_step": 20}
    for case in tiny["cases"]:
        if case["operation"] in each:
            assert case["contenders"][0]["bytes"] == each[case["operation"]] * tensors.count


def test_memory_by_part_of_a_block(tiny):
    """Weights by their storage, moments as each optimizer keeps them; the 4-bit blocks allocate the least."""
    case = next(case for case in tiny["cases"] if case["operation"] == "block_step")
    ours, dense = case["contenders"][:2]
    count = sum(4 * (n + k) for n, k in MODELS["tiny"].linears.values())
    weights = sum(n * k for n, k in MODELS["tiny"].linears.values())
    assert dense["parts"] == {
        "weights": 2 * weights,
        "adapters": 2 * count,
        "gradients": 2 * count,
        "optimizer states": 4 * count,  # torch's have the parameters' dtype
    }
    assert ours["parts"] == {**dense["parts"], "weights": ours["parts"]["weights"], "optimizer states": 8 * count}
    assert 4.1 < 8 * ours["parts"]["weights"] / weights < 4.2
    assert 2 * count < ours["peak_allocated"] < dense["peak_allocated"]


def test_adapters_of_the_latency_table():
    """11 million parameters at full size, two adapters a layer by Houlsby et al., one with its norm by Lin et al."""
    size = gpt2_forward.SIZES["gpt2-medium"]
    for houlsby in (True, False):
        with torch.device("meta"):
            one = gpt2_forward.Adapter(size.width, gpt2_forward.inner_of(size, houlsby), norm=not houlsby)
        count = sum(p.numel() for p in one.parameters()) * size.layers * (2 if houlsby else 1)
        assert count == pytest.approx(11e6, rel=0.01)
        model = gpt2_forward.base_model(gpt2_forward.SIZES["tiny"], 8)
        gpt2_forward.add_adapters(model, gpt2_forward.SIZES["tiny"], houlsby)
        found = [module for module in model.modules() if isinstance(module, gpt2_forward.Adapter)]
        assert len(found) == len(model.h) * (2 if houlsby else 1)
        assert all((one.norm is None) == houlsby for one in found)


def test_base_of_the_latency_table_computes_what_gpt2_does():
    """With nn.Linear in the place of Conv1D."""
    from transformers import GPT2Config, GPT2Model

    model = gpt2_forward.base_model(gpt2_forward.SIZES["tiny"], 8)
    torch.manual_seed(0)
    original = GPT2Model(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=1024)).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = original(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_shapes_of_models():
    """As in the models' published configurations."""
    assert set(MODELS["llama-2-7b"].linears.values()) == {(4096, 4096), (11008, 4096), (4096, 11008)}
    assert MODELS["llama-3-8b"].linears["k"] == (1024, 4096)
    assert MODELS["llama-3-70b"].linears["v"] == (1024, 8192)
    count = {"llama-2-7b": 202_375_168, "llama-3-8b": 218_103_808, "llama-3-70b": 855_638_016}
    for name, elements in count.items():
        assert sum(n * k for n, k in MODELS[name].linears.values()) == elements


def test_sweeps_know_every_operation():
    assert set(options.AXES) == set(OPERATIONS)
    for sweep in SWEEPS.values():
        points = sweep()
        assert len(set(points)) == len(points)
        assert points[0].operation == "limits"
        assert {p.operation for p in points} <= set(OPERATIONS)
    assert {p.operation for p in SWEEPS["usual"]()} == set(OPERATIONS) - {"gpt2_forward"}
    assert {p.operation for p in SWEEPS["full"]()} == set(OPERATIONS)
    full = SWEEPS["full"]()
    assert set(SWEEPS["usual"]()) <= set(full)
    assert {1, 16384} <= {p.m for p in full}
    assert {0, 256} <= {p.rank for p in full}
    assert {p.dtype for p in full} == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("adamw", {"lr": 1.01e-3}),
        ("adamw", {"betas": (0.9, 0.99)}),
        ("adamw", {"betas": (0.8, 0.999)}),
        ("adamw", {"weight_decay": 0.0}),
        ("adamw_clipped", {"max_grad_norm": None}),
        ("adamw_8bit", {"lr": 1.5e-3}),
        ("lion", {"betas": (0.99, 0.99)}),
    ],
)
def test_an_optimizer_that_does_something_else_is_not_timed(case, changed, monkeypatch):
    from qlora_kernels.bench.operations import optimizer

    name = "PagedLion" if case == "lion" else "PagedAdamW"
    original = getattr(optimizer, name)
    monkeypatch.setattr(optimizer, name, lambda params, **given: original(params, **{**given, **changed}))
    # So many elements that the gradients' norm is above the one that is clipped to.
    lab = Lab(TINY, Point(f"{case}_step", "float32", rank=256, model="tiny"))
    ours = getattr(optimizer, case)(lab).contenders[:1]
    case = Measurement(Case("", None, ours), TINY, lab.point)
    assert case.runners[0].failure.startswith("wrong result")


def test_a_layer_that_forgets_its_adapter_is_not_timed(monkeypatch):
    monkeypatch.setattr(qlora_kernels.QLinear, "forward", lambda self, x: qlora_kernels.linear(x, self.weight))
    for point in (POINTS[8], POINTS[13], POINTS[-1]):
        begun = begin(TINY, point)
        assert begun.runners[0].failure.startswith("wrong result")


def test_finetune_is_measured_by_its_command(monkeypatch):
    """Each run in a process of its own, tokens a second from its metrics; a run that fails says its last line."""
    from qlora_kernels.bench.operations import finetune

    # A model whose steps take no time worth mentioning, and only two of them.
    monkeypatch.setattr(finetune, "STEPS", 2)
    small = ["--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "16", "--seq-len", "16", "--steps", "2"]
    monkeypatch.setattr(finetune, "_ARGUMENTS", (*finetune._ARGUMENTS, *small))
    case = measured(Point("finetune", rank=2))
    assert [c["name"] for c in case["contenders"]] == list(finetune.RESULTS)
    for one in case["contenders"]:
        assert one["tokens_per_second"] == pytest.approx(1e3 * finetune.BATCH * finetune.TOKENS / one["median_ms"])
        assert one["peak_method"]
    monkeypatch.setattr(finetune, "_ARGUMENTS", ("--rank", "0"))
    with pytest.raises(RuntimeError, match="--rank should be at least 1"):
        measured(Point("finetune", rank=0))


# -------------------------------------------------------------------------------------------------------- a card


class FakeCard:
    """A card whose events are the host's clock, and that cannot capture."""

    l2_bytes = 1 << 20

    def event(self) -> float:
        return time.perf_counter()

    def microseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def wait(self) -> None:
        pass

    def occupy(self, microseconds: float) -> None:
        pass

    def capture(self, function):
        function()
        return function


def test_on_a_card_graphs_are_replayed():
    ready = Ready(lambda i: time.sleep(1e-4), lambda _: 0.0, 0.1, bytes=8, copies=3)
    waits = replace(ready, waits=True)
    case = Case("forward", 2, [Contender(OURS, lambda: ready), Contender(BNB, lambda: waits)])
    measurement = CudaMeasurement(case, TINY, POINT, card=FakeCard())
    assert measurement.rounds == 1
    assert measurement.round() == pytest.approx(1e-4, rel=2)
    ours, other = measurement.result()["contenders"]
    assert (ours["by"], other["by"]) == ("graph", "events")
    assert other["no_graph"] == "the call waits for the device"
    for one in (ours, other):
        assert 0.1 <= one["q20_ms"] <= one["median_ms"] <= one["q80_ms"]
        assert one["copies"] == 3


CARD_POINTS = (
    Point("quantize", n=24, k=64),
    Point("dequantize", n=24, k=64),
    Point("dequantize_out", n=24, k=64),
    Point("linear_forward", m=3, rank=0, n=24, k=64),
    Point("linear_forward", m=3, rank=2, n=24, k=64),
    Point("linear_dx", m=20, n=24, k=64),
    Point("linear_step", m=20, rank=2, n=24, k=64),
    Point("adamw_step", "float32", rank=1, model="tiny"),
)


@pytest.mark.parametrize("point", CARD_POINTS, ids=str)
def test_a_cards_cases_on_the_emulator(point, monkeypatch):
    """The contenders that only a card has, this package's through the CUDA kernels."""
    monkeypatch.setattr(Lab, "cuda", True)
    monkeypatch.setattr(cuda_timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(cuda_timing, "MOST_CALLS", 1)
    settings = replace(TINY, cache_bytes=1)
    with emulated():
        lab = Lab(settings, point)
        measurement = CudaMeasurement(CASES[point.operation](lab), settings, point, card=FakeCard())
        measurement.round()
        case = measurement.result()
    names = [one["name"] for one in case["contenders"]]
    assert not {BNB_EVAL, PEFT_EVAL} & set(names)
    assert (KERNEL in names) == (point.operation == "quantize")
    for one in case["contenders"]:
        assert "wrong result" not in one.get("failed", ""), one
        if "bitsandbytes" not in one["name"]:
            assert "failed" not in one, one
            assert one["median_ms"] > 0


# ------------------------------------------------------------------------------------------------------- workers


def _sleepy(settings, point, without, announce):
    announce("sleeper")
    if "sleeper" not in without:
        time.sleep(60)
    return _Instant(without)


def _crashing(settings, point, without, announce):
    announce(OURS)
    announce(BNB)
    if BNB not in without:
        os.write(2, b"first words\nlast words\n")
        os.abort()
    return _Instant(without)


def _never(settings, point, without, announce):
    announce("")
    os._exit(3)


def _raising(settings, point, without, announce):
    raise ValueError("nothing works")


class _Instant:
    rounds = 2

    def __init__(self, without):
        self.without, self.done = without, 0

    def round(self):
        self.done += 1
        return 0.0

    def result(self):
        return {"without": self.without, "done": self.done, "process": os.getpid(), "other_processes": 0.0}


@pytest.fixture(scope="module")
def _server():
    """One process that all workers of these tests are forked from, without what benchmarks compare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "PRELOADED", ("torch",))
        yield


@pytest.mark.usefixtures("_server")
def test_who_takes_the_process_along_is_left_out_of_its_case():
    with Worker(begin=_crashing) as one:
        case = one.measure(POINT, TINY)
    assert case["done"] == 2
    assert case["without"] == {BNB: "ended its process: SIGABRT: last words"}
    assert case["process"] != os.getpid()


@pytest.mark.usefixtures("_server")
def test_who_does_not_answer_is_left_out_of_its_case():
    with Worker(prepare_seconds=1.0, begin=_sleepy) as one:
        assert one.measure(POINT, TINY)["without"] == {"sleeper": "gave no answer within 1 s"}


@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize(
    ("fault", "why"), [(_never, "ended its process with exit code 3"), (_raising, "ValueError: nothing works")]
)
def test_a_case_that_cannot_be_set_up_is_a_failed_case(fault, why):
    with Worker(begin=fault) as one:
        case = one.measure(POINT, TINY)
    assert case["failed"] == why
    assert point_of(case) == POINT
    assert failed_ours(case) == why
    assert why in table.terminal({**results.begin(TINY, "usual"), "cases": [case]})


@pytest.mark.usefixtures("_server")
def test_each_case_has_a_process_of_its_own_on_a_cpu_and_not_on_a_card():
    with Worker(begin=_plain) as one:
        assert one.measure(POINT, TINY)["process"] != one.measure(POINT, TINY)["process"]
        card = replace(TINY, device="cuda")
        assert one.measure(POINT, card)["process"] == one.measure(POINT, card)["process"]


def _plain(settings, point, without, announce):
    return _Instant(without)


# ----------------------------------------------------------------------------------------------- files and words


def test_result_files(tiny, tmp_path):
    path = tmp_path / "x.jsonl"
    results.save(tiny, path)
    assert results.load(path) == tiny
    lines = path.read_text().splitlines()
    assert len(lines) == 2 + len(tiny["cases"])
    assert tiny["machine"]["cpu"]
    assert tiny["versions"]["torch"] == torch.__version__
    assert tiny["settings"]["threads"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no result"),
        ("hello\n", "no result"),
        ("\x00\xff", "no result"),
        ('{"format": 1, "cases": []}', "no result"),
        ("[1]\n", "no result"),
        ('{"kind": "run", "format": 2}\n', "cut off"),
        ('{"kind": "run", "format": 2}\n{"kind": "case"}\n{"kind": "en', "cut off"),
        ('{"kind": "run", "format": 2}\n{"kind": "end", "complete": true, "cases": 1}\n', "cut off"),
    ],
)
def test_foreign_and_damaged_files_are_refused(tmp_path, text, words, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=words):
        results.load(path)
    assert main(["bench", "--show", str(path)]) == 2
    assert main(["bench", "--compare", str(path), str(path)]) == 2
    assert "x.jsonl" in capsys.readouterr().err


def test_table_shows_ratios_the_worst_first_and_shares_of_the_limits(tiny):
    case = {
        **POINT.as_dict(),
        "title": "forward",
        "flops": int(2e9),
        "rounds": 1,
        "other_processes": 0.2,
        # 10 GB/s: 20 MB take 2 ms; 1 TFLOP/s: 2 GFLOP take 2 ms as well.
        "contenders": [
            contender(OURS, 4.0, bytes=int(20e6)),
            contender(DENSE, 2.0, bytes=int(10e6)),
            contender(BNB, 40.0, bytes=int(400e6)),
            contender(COPY, 1.0, bytes=int(20e6)),
        ],
    }
    run = {**tiny, "cases": [limits_case(10.0, 1.0), case]}
    assert limits.limits_of(run).share(case, case["contenders"][0]) == pytest.approx(0.5)
    assert limits.limits_of(run).share(case, case["contenders"][2]) == pytest.approx(1.0)
    text = table.terminal(run)
    assert "memory moves 10.0 GB/s" in text
    assert "1 TFLOP/s" in text
    assert "others took 20% of the machine" in text
    ratios = text[text.index("the worst first") :].splitlines()[1:]
    assert [line.split()[-3:] for line in ratios] == [["0.50", "4", "2"], ["10.00", "4", "40"]]
    assert "50%" in next(line for line in text.splitlines() if line.startswith(f"  {OURS}"))


def test_whole_table_and_plots(tiny, tmp_path):
    text = table.terminal(tiny)
    assert "decode, seven layers of a block, tiny, M = 1, r = 4" in text
    assert "not completed" not in text
    assert "not completed" in table.terminal({**tiny, "complete": False})
    forward = [case for case in tiny["cases"] if (case["operation"], case["rank"]) == ("linear_forward", 0)]
    steps = [case for case in tiny["cases"] if case["operation"] == "linear_step"]
    others = [case for case in tiny["cases"] if case not in forward + steps]
    full_size = [{**case, "n": 4096, "k": 4096, "dtype": "bfloat16"} for case in forward[:2] + steps]
    drawn = {
        name: plots.draw({**tiny, "cases": others + full_size}, name, tmp_path / name, "x") for name in plots.PLOTS
    }
    assert drawn == {"speed": True, "memory": True, "rank": True}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    assert not any(plots.draw({**tiny, "cases": []}, name, tmp_path / "none", "x") for name in plots.PLOTS)
    assert not (tmp_path / "none").exists()


def pair(ours: tuple[float, float], others: tuple[float, float], spread: float = 0.01) -> tuple[dict, dict]:
    """Two runs of one case, with this package's and another's medians."""
    runs = []
    for mine, other in zip(ours, others):
        case = {
            **POINT.as_dict(),
            "title": "forward",
            "flops": 2,
            "rounds": 9,
            "other_processes": 0.0,
            "contenders": [contender(OURS, mine, spread), contender(DENSE, other, spread)],
        }
        runs.append({**results.begin(TINY, "usual"), "cases": [case]})
    return tuple(runs)


@pytest.mark.parametrize(
    ("ours", "others", "spread", "verdict"),
    [
        ((1.0, 1.2), (5.0, 5.0), 0.01, "slower"),
        ((1.0, 0.8), (5.0, 5.0), 0.01, "faster"),
        ((1.0, 1.02), (5.0, 5.0), 0.001, "within the noise"),  # less than is called a difference
        ((1.0, 1.2), (5.0, 5.0), 0.15, "within the noise"),  # the medians of nine are not so sure
        ((1.0, 1.2), (5.0, 6.0), 0.01, "within the noise"),  # the machine became slower
        ((1.0, 1.0), (5.0, 4.0), 0.01, "within the noise"),  # only the other became faster
        ((1.0, 1.5), (5.0, 6.0), 0.01, "slower"),  # by more than the machine
        ((1.0, 0.7), (5.0, 4.5), 0.01, "faster"),
    ],
)
def test_comparison_knows_noise(ours, others, spread, verdict):
    changes, left_out = compare.compare(*pair(ours, others, spread))
    assert [change.verdict for change in changes] == [verdict]
    assert not left_out


def test_comparison_names_what_differs_and_what_is_missing(tmp_path, capsys):
    first, second = pair((1.0, 2.0), (5.0, 5.0))
    second["versions"] = {**second["versions"], "torch": "0.1"}
    second["settings"] = {**second["settings"], "threads": 7}
    extra = {**first["cases"][0], "m": 77}
    second["cases"].append(extra)
    first["cases"].append({**extra, "m": 78})
    first["cases"].append({**extra, "m": 79})
    second["cases"].append({**extra, "m": 79, "contenders": [{"name": OURS, "failed": "why not"}]})
    for name, run in (("a", first), ("b", second)):
        results.save(run, tmp_path / name)
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    for words in (
        "versions of torch differ",
        "threads differ: 1 and 7",
        "M = 77, r = 0: only in the second run",
        "M = 78, r = 0: only in the first run",
        "in the second run: why not",
        "1 slower, 0 faster, 0 within the noise",
    ):
        assert words in text, words
    # Another torch is no judge of the machine.
    assert compare.compare(first, second)[0][0].drift is None


def test_a_run_compared_with_itself_has_no_difference(tiny):
    for rounds, verdict in ((9, "within the noise"), (2, "too few samples")):
        run = {**tiny, "cases": [{**case, "rounds": rounds} for case in tiny["cases"]]}
        for case in run["cases"]:
            case["contenders"] = [{**c, "samples": 9} if "failed" not in c else c for c in case["contenders"]]
        changes, left_out = compare.compare(run, run)
        assert len(changes) == len(POINTS)
        assert {change.verdict for change in changes} == {verdict}
        assert not left_out


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operations", "dance"], "--operations should be some of limits"),
        (["--rows", "0"], "--rows should be at least 1"),
        (["--rows", "one"], "whole numbers"),
        (["--ranks", "-1"], "--ranks should be at least 0"),
        (["--shapes", "64"], "--shapes should be weights such as 4096x4096"),
        (["--shapes", "0x64"], "--shapes"),
        (["--dtypes", "int8"], "--dtypes should be some of bfloat16"),
        (["--models", "gpt"], "--models should be some of llama-2-7b"),
        (["--operations", "quantize", "--rows", "4"], "--rows says nothing about quantize"),
        (["--operations", "decode", "--ranks", "0"], "decode needs an adapter"),
        (["--threads", "0"], "--threads should be at least 1"),
        (["--seconds", "0"], "--seconds should be positive"),
        (["--seconds", "nan"], "--seconds should be positive"),
        (["--minutes", "-1"], "--minutes should be positive"),
        (["--retries", "-1"], "--retries should not be negative"),
        (["--out", "/nowhere/at/all.jsonl"], "there is no folder /nowhere/at"),
        (["--out", "."], "is a folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a card")
def test_a_card_that_is_not_there(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "sees no card" in capsys.readouterr().err


def chosen(*arguments: str) -> list[Point]:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.points_of(parser.parse_args(arguments))


def test_points_by_axes():
    assert chosen("--quick") == SWEEPS["quick"]()
    assert chosen("--full") == SWEEPS["full"]()
    only = chosen("--operations", "linear_dx")
    assert [p.operation for p in only] == ["limits", "linear_dx", "linear_dx"]
    paper = chosen("--operations", "gpt2_forward")
    assert [(p.batch, p.m, p.rank) for p in paper[1:]] == [(32, 512, 4), (16, 256, 4), (1, 128, 4)]
    assert chosen("--quick", "--operations", "dequantize,lion_step")[1:] == [
        Point("dequantize", n=4096, k=4096),
        Point("lion_step", "float32", rank=16, model="llama-2-7b"),
    ]
    found = chosen("--shapes", "64x128,32x64", "--rows", "1,2", "--ranks", "0,8", "--dtypes", "float32")
    assert len(found) == 9
    assert found[0] == Point("limits", "float32")
    assert Point("linear_forward", "float32", 32, 64, 2, 8) in found
    assert chosen("--operations", "decode,quantize", "--ranks", "0,4", "--models", "tiny")[1:] == [
        Point("decode", m=1, rank=4, model="tiny"),
        Point("quantize", n=4096, k=4096),
    ]
    assert chosen("--operations", "adamw_step", "--models", "tiny")[1:] == [
        Point("adamw_step", "float32", rank=16, model="tiny")
    ]


def test_list_measures_nothing(capsys):
    assert main(["bench", "--quick", "--list"]) == 0
    assert "linear_step, 4096 x 4096, M = 512, r = 16" in capsys.readouterr().out


@pytest.fixture
def no_processes(monkeypatch):
    """Cases are measured in this process, and the limits at once."""

    class Here:
        prepare_seconds = 0.0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def measure(self, point, settings, progress):
            return limits_case() if point.operation == "limits" else measured(point, replace(TINY, seconds=0.0))

    monkeypatch.setattr(command, "Worker", Here)
    return Here


TINY_ARGUMENTS = [
    "--operations",
    "dequantize,linear_step",
    "--shapes",
    "64x64",
    "--rows",
    "2",
    "--ranks",
    "2",
    "--quiet",
]


@pytest.mark.usefixtures("no_processes")
def test_command_writes_a_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *TINY_ARGUMENTS, "--out", "x.jsonl"]) == 0
    run = results.load("x.jsonl")
    assert run["complete"]
    assert [case["operation"] for case in run["cases"]] == ["limits", "dequantize", "linear_step"]
    shown = capsys.readouterr().out
    assert "the worst first" in shown
    assert shown.endswith("Written: x.jsonl\n")
    assert main(["bench", "--show", "x.jsonl"]) == 0
    assert capsys.readouterr().out.strip() in shown
    assert main(["bench", *TINY_ARGUMENTS]) == 0
    assert [path.name for path in tmp_path.glob("bench-cpu-*.jsonl")]


def test_ctrl_c_leaves_what_was_measured(tmp_path, capsys, monkeypatch, no_processes):
    def interrupted(self, point, settings, progress):
        if point.operation == "linear_step":
            raise KeyboardInterrupt
        return measured(point)

    monkeypatch.setattr(no_processes, "measure", interrupted)
    arguments = [*TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]
    monkeypatch.setattr(options, "points_of", lambda namespace: [POINTS[2], POINTS[12]])
    assert main(["bench", *arguments]) == 130
    run = results.load(tmp_path / "x.jsonl")
    assert not run["complete"]
    assert [case["operation"] for case in run["cases"]] == ["dequantize"]
    assert "interrupted" in capsys.readouterr().err


def test_failure_of_this_package_is_the_commands(tmp_path, capsys, monkeypatch, no_processes):
    monkeypatch.setattr(no_processes, "measure", lambda self, point, *more: worker.failed_case(point, "out of luck"))
    assert main(["bench", *TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "failed in dequantize: out of luck" in capsys.readouterr().err


@pytest.mark.usefixtures("no_processes")
def test_time_is_kept(monkeypatch):
    """What no longer fits is named, not forgotten; and shares of the time become shorter."""
    clock = itertools.chain([0.0], itertools.repeat(59.0))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    cases = list(command.run([POINTS[2], POINTS[3]], TINY, minutes=1.0))
    assert all(case["left_out"] for case in cases)
    assert cases[0]["failed"] == "left out: the 1 minutes were over"


def test_shares_of_the_time(monkeypatch, no_processes):
    given = []

    def measure(self, point, settings, progress):
        given.append((settings.seconds, self.prepare_seconds))
        return measured(POINTS[2])

    monkeypatch.setattr(no_processes, "measure", measure)
    now = iter([0.0, 0.0, 30.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(now))
    list(command.run(POINTS[2:4], replace(TINY, seconds=100.0), minutes=1.0))
    assert given == [(15.0, 60.0), (15.0, 30.0)]


def test_quietest_attempt_counts_whatever_it_says(monkeypatch, no_processes):
    shares = iter([0.4, 0.2, 0.3, 0.0])
    monkeypatch.setattr(
        no_processes, "measure", lambda self, point, *more: {**limits_case(), "other_processes": next(shares)}
    )
    assert next(command.run([POINT], TINY, retries=2))["other_processes"] == 0.2


def test_a_whole_run_by_processes(tmp_path, capsys):
    """The command as it is: a process for each case, forked from one that knows the peers."""
    arguments = ["--operations", "dequantize,linear_forward", "--shapes", "64x128", "--rows", "2", "--ranks", "0"]
    points = chosen(*arguments)[1:]  # the limits take seconds
    run = results.begin(TINY, "usual")
    run["cases"] = list(command.run(points, TINY))
    assert [case["operation"] for case in run["cases"]] == ["dequantize", "linear_forward"]
    for case in run["cases"]:
        assert failed_ours(case) is None
        assert case["rounds"] >= TINY.min_rounds
