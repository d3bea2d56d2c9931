"""The benchmarks: nothing is invented, everybody is verified, and every operation is measured at a tiny size."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from bench_cases import POINT, POINTS, TINY, WEIGHT, contender, fake, limits_case, measured, of_fake
from emulated import emulated

import qlora_kernels
from qlora_kernels.bench import options
from qlora_kernels.bench.case import (
    OURS,
    Case,
    Contender,
    DeviceLost,
    Ready,
    Settings,
    largest_error,
    quantiles_of,
)
from qlora_kernels.bench.contenders import weights
from qlora_kernels.bench.contenders.names import (
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
)
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.operations import CASES, OPERATIONS, begin, gpt2_forward
from qlora_kernels.bench.points import MODELS, SWEEPS, Point, point_of
from qlora_kernels.bench.report import compare, plots, results, table
from qlora_kernels.bench.report.ratios import limits_of
from qlora_kernels.bench.timing import cuda_timing, peak
from qlora_kernels.bench.timing.measure import CudaMeasurement, Measurement, failed_ours
from qlora_kernels.bench.timing.peak import peak_allocated
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.ops import linear as fused
from qlora_kernels.ops.backends import reference


@pytest.fixture(scope="module")
def tiny() -> dict:
    """A run of every operation but the limits and whole runs, at tiny sizes; through its file elsewhere."""
    run = results.begin(TINY, "usual")
    run["cases"] = [limits_case(), *map(measured, POINTS)]
    return {**run, "complete": True}


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


def test_who_fails_in_a_timed_call_leaves_the_others_their_figures():
    """And is dropped from then on, with the reason."""
    calls = itertools.count()

    def call(index):
        if next(calls) > 12:
            raise MemoryError("no more")
        return torch.tensor(2.0)

    other = Ready(call, lambda y: abs(y.item() - 2), 0.1, bytes=8)
    announced = []
    measurement = Measurement(fake(lambda: other), replace(TINY, min_rounds=6), POINT, announce=announced.append)
    assert announced == [OURS, "", BNB, ""]
    assert all(measurement.round() > 0 for _ in range(6))
    ours, bnb = measurement.result()["contenders"]
    assert bnb == {"name": BNB, "failed": "MemoryError: no more"}
    assert ours["samples"] == 6 * Measurement.CALLS
    assert announced[-2:] == [OURS, ""]
    assert next(calls) == 14


def test_a_reason_that_cannot_be_told_is_a_reason():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def prepare():
        raise Mute

    assert of_fake(fake(prepare))["contenders"][1]["failed"] == "Mute: (its message cannot be told)"


def test_where_this_package_fails_in_a_timed_call_others_are_measured():
    case = fake(lambda: Ready(lambda i: torch.tensor(2.0), lambda y: 0.0, 0.1, bytes=8))
    measurement = Measurement(case, TINY, POINT)
    measurement.runners[0].ready = replace(measurement.runners[0].ready, call=lambda i: 1 / 0)
    assert math.isnan(measurement.round())
    found = measurement.result()
    assert failed_ours(found) == "ZeroDivisionError: division by zero"
    assert found["contenders"][1]["samples"] == Measurement.CALLS


def test_where_everybody_fails_each_reason_is_told():
    def absent():
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    case = fake(absent)
    case.contenders[0] = replace(case.contenders[0], prepare=lambda: 1 / 0)
    measurement = Measurement(case, TINY, POINT)
    assert measurement.rounds == 0
    assert math.isnan(measurement.round())
    assert [one["failed"] for one in measurement.result()["contenders"]] == [
        "ZeroDivisionError: division by zero",
        "not installed (bitsandbytes)",
    ]


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
    assert largest_error(right, exact) == 0
    assert largest_error([torch.ones(3), torch.full((2,), 1.5)], exact) == 0.5
    for i in range(2):
        wrong = [one.clone() for one in right]
        wrong[i][0] = math.nan
        assert math.isnan(largest_error(wrong, exact))
    with pytest.raises(ValueError, match="zip"):
        largest_error(right[:1], exact)


@pytest.mark.parametrize(
    ("operation", "what"),
    [("linear_step", "error nan"), ("decode", "error nan"), ("block_step", "adapters' gradients")],
)
def test_a_gradient_or_layer_that_is_wrong_is_not_timed(operation, what, monkeypatch):
    """The last one, behind others that are right."""

    point = next(p for p in POINTS if p.operation == operation and p.rank == 4)
    if operation == "decode":
        original = fused.forward

        def forward(x, *more):
            y, u = original(x, *more)
            return (y * math.nan if tuple(y.shape[1:]) == list(MODELS["tiny"].linears.values())[-1][:1] else y), u

        monkeypatch.setattr(fused, "forward", forward)
    else:
        backward = fused.backward

        def wrong(*arguments):
            dx, dA, dB = backward(*arguments)
            return dx, dA, dB * (math.nan if operation == "linear_step" else 2)

        monkeypatch.setattr(fused, "backward", wrong)
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
            patch.setattr(weights, "_AT_A_TIME", at_a_time)
            assert torch.equal(weights.decoded(weight.pieces, *weight.shape, torch.bfloat16), whole)


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
    assert quantiles_of([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == {0: 1.0, 20: 2.0, 50: 3.5, 80: 5.0, 100: 6.0}


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


def test_peak_memory_that_nobody_records_is_unknown(monkeypatch):
    """And not nothing."""

    class Silent:
        def __init__(self, **options):
            self.profiler = self.kineto_results = self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return []

    monkeypatch.setattr("torch.profiler.profile", Silent)
    peak._recorded.cache_clear()
    assert peak_allocated(lambda: torch.ones(100_000)) is None
    peak._recorded.cache_clear()


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


@pytest.mark.share(2)
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


class FakeCard(cuda_timing.Card):
    """A card whose events are the host's clock, whose graphs are the calls again, and which may be broken."""

    l2_bytes = 1 << 20

    def __init__(self) -> None:
        self.broken: Exception | None = None

    def event(self) -> float:
        return time.perf_counter()

    def microseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def wait(self) -> None:
        if self.broken is not None:
            raise self.broken

    def occupy(self, microseconds: float) -> None:
        pass

    def capture(self, function):
        function()
        return function


def on_a_card(other: Ready, card: FakeCard | None = None, **more) -> CudaMeasurement:
    """A case on a card: this package sleeps for a tenth of a millisecond."""
    ours = Ready(lambda i: time.sleep(1e-4), lambda _: 0.0, 0.1, bytes=8, copies=3)
    case = Case("forward", 2, [Contender(OURS, lambda: ours), Contender(BNB, lambda: other)])
    return CudaMeasurement(case, TINY, POINT, card=card or FakeCard(), **more)


SLEEP = Ready(lambda i: time.sleep(2e-4), lambda _: 0.0, 0.1, bytes=8, copies=3)


@pytest.mark.parametrize("waits", [False, True])
def test_on_a_card_all_are_told_by_one_clock(waits):
    """By graphs that are replayed; or, where somebody's call cannot be captured, by events."""
    measurement = on_a_card(replace(SLEEP, waits=waits))
    assert measurement.rounds == 1
    assert 1e-4 <= measurement.round() < 2e-2
    ours, other = measurement.result()["contenders"]
    assert ours["by"] == other["by"] == ("events" if waits else "graph")
    assert other["no_graph"] == ("the call waits for the device" if waits else None)
    assert (other["graph_ms"] is None) == waits
    assert ours["graph_ms"] >= 0.1
    for one, least in ((ours, 0.1), (other, 0.2)):
        assert least <= one["q20_ms"] <= one["median_ms"] <= one["q80_ms"]
        assert least <= one["event_q20_ms"] <= one["event_ms"] <= one["event_q80_ms"]
        assert one["event_samples"] == 3 * cuda_timing.MIN_ROUNDS
        assert one["samples"] == (3 if waits else 1) * cuda_timing.MIN_ROUNDS
        assert one["copies"] == 3


def failing_after(calls: int) -> Ready:
    """A contender whose calls raise from a certain one on."""
    done = itertools.count()

    def call(index: int) -> None:
        if next(done) >= calls:
            raise RuntimeError("CUDA error: out of luck")

    return replace(SLEEP, call=call)


# Checks and timing before the case, then the warm-up, then samples.
@pytest.mark.parametrize("calls", [1, 10, 60])
def test_on_a_card_who_fails_later_leaves_the_others_their_figures(calls):
    announced = []
    measurement = on_a_card(failing_after(calls), announce=announced.append)
    assert measurement.round() > 0
    ours, other = measurement.result()["contenders"]
    assert other == {"name": BNB, "failed": "RuntimeError: CUDA error: out of luck"}
    assert ours["by"] == "graph"
    assert ours["samples"] == cuda_timing.MIN_ROUNDS
    assert set(announced) == {OURS, BNB, ""}


@pytest.mark.parametrize("calls", [1, 10, 60])
def test_a_card_that_answers_no_more_is_the_end_of_the_process(calls):
    """Whoever was at work did it; to go on would fail everybody else."""
    card, announced = FakeCard(), []
    ready = failing_after(calls)

    def call(index: int) -> None:
        try:
            ready.call(index)
        except RuntimeError as problem:
            card.broken = problem
            raise

    with pytest.raises(DeviceLost, match="out of luck"):
        on_a_card(replace(ready, call=call), card, announce=announced.append).round()
    assert announced[-1] == BNB


def test_on_a_card_on_which_everybody_fails_each_reason_is_told():
    measurement = on_a_card(failing_after(0), without={OURS: "ended its process"})
    assert measurement.rounds == 0
    assert [one["failed"] for one in measurement.result()["contenders"]] == [
        "ended its process",
        "RuntimeError: CUDA error: out of luck",
    ]
    assert [one.get("failed") for one in cuda_timing.measure(FakeCard(), [], 0.0)] == []


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


@pytest.mark.share(3)
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
    assert limits_of(run).share(case, case["contenders"][0]) == pytest.approx(0.5)
    assert limits_of(run).share(case, case["contenders"][2]) == pytest.approx(1.0)
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
