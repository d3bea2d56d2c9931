"""The cases, benchmarks and tables of bench.card.check: on the emulator, and with a clock of their own."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys

import pytest
import torch
from emulated import counters, emulated, module
from steady_card import FakeCard, SteadyCard

from bench.card import kernels, quantize, report
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB, CHECKED, EQUAL_COPY
from qlora_kernels.bench.timing import cuda_timing
from qlora_kernels.native import dispatch

# -------------------------------------------------------------------------------------------------------------- cases


@pytest.mark.slow
def test_the_cases_on_the_emulator(capsys):
    with emulated("random", seed=5):
        module().reset_counters()
        assert kernels.main([], device="cpu") == 0
        launches = counters()["launches"]
    total = sum(1 for _ in kernels.cases())
    assert capsys.readouterr().out == kernels.verdict(total, total) + "\n"
    # One each, and two for the nested ones: the kernels ran, not the CPU's.
    assert launches >= total
    assert {case.kernel for case in kernels.cases()} == {
        "quantize",
        "quantize_nested",
        "quantize_absmax",
        "dequantize",
        "linear",
        "optimizer_step",
        "optimizer_norm",
    }


def test_scratch_that_is_poisoned_changes_nothing(capsys):
    seen = []
    with emulated(), kernels.poisoned_scratch():
        poisoned = kernels.backends.CUDA._scratch
        forced, x = kernels.backends.forced_backend(), torch.zeros(20, 1088).bfloat16()
        seen.append(forced._scratch(x, 72).view(torch.uint8))
        assert forced._scratch(x, 0) is None
    assert (seen[0] == 255).all()
    assert len(seen[0]) > 0
    assert kernels.backends.CUDA._scratch is not poisoned
    calls = []
    with emulated(), pytest.MonkeyPatch.context() as patch:
        # Zeros, where the emulator itself would give NaN: the option's bytes are what the kernels see.
        plain = kernels.backends.CUDA._scratch

        def zeros(*arguments):
            scratch = plain(*arguments)
            calls.append(scratch)
            return None if scratch is None else scratch.zero_()

        patch.setattr(kernels.backends.CUDA, "_scratch", zeros)
        assert kernels.main(["--poison-scratch", "--only", "linear bfloat16"], device="cpu") == 0
        assert kernels.backends.CUDA._scratch is zeros
    assert any(scratch is not None and (scratch.view(torch.uint8) == 255).any() for scratch in calls)
    out, err = capsys.readouterr()
    assert out == kernels.verdict(12, 12) + "\n"
    assert err.startswith("card kernels: 0 s, case 1 of 12, linear, bfloat16, 3 rows by [72, 192]")


def test_progress_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "PROGRESS_SECONDS", 0.0)
    with emulated():
        assert kernels.main(["--only", "quantize_absmax 25"], device="cpu") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("case ")[2] for line in lines][1] == (
        "2 of 6, quantize_absmax, 255 constants, an irregular table"
    )
    assert len(lines) == 6


def test_the_layers_and_the_optimizers_tables_stand_in_the_report():
    results = finished(sample())
    about = {"operation": "forward", "m": 1, "n": 4096, "k": 4096, "dtype": "bfloat16"}
    measured = {"cases": [{**about, "contenders": [contender(OURS, 4.0), contender("torch dense", 9.6)]}]}
    results["steps"].append({"name": "bench_linear", "status": "failed", "found": measured})
    results["steps"].append({"name": "bench_optimizer", "status": "failed", "found": {"nvidia_smi_after": "unknown"}})
    text = report.markdown(results)
    assert "## The layer's products\n\n### Bars" in text
    assert "forward M = 1, 4096 x 4096: torch dense" in text
    assert "## Optimizers" not in text


def test_the_cases_reach_every_kernel_of_the_table(monkeypatch):
    card = dispatch.CARDS[90]
    found = set()
    for dtype in kernels.DTYPES:
        for (n, k), m, _, _, names in kernels.LINEAR_SHAPES:
            for backward, kernel in enumerate(names if kernels.can_be_forced(dtype, "cpu") else ("", "")):
                with kernels.forced_kernel(kernel):
                    found.add(dispatch.choose(card, m, n, k, dtype, bool(backward))["kernel"])
    assert kernels.KERNEL not in os.environ
    monkeypatch.setenv(kernels.KERNEL, "?")
    with pytest.raises(RuntimeError) as problem:
        dispatch.choose(card, 1, 64, 64, torch.bfloat16, False)
    names = str(problem.value).rpartition("there are ")[2].partition(" (")[0]
    assert found == set(names.split(", "))


@pytest.mark.parametrize("wrong", [0, torch.nan])
def test_a_wrong_row_of_a_product_is_found(monkeypatch, capsys, wrong):
    right = kernels.ops.linear_forward

    def lazy(*arguments):
        y, u = right(*arguments)
        if kernels.backends.forced_backend() is not None:
            y[-1] = wrong
        return y, u

    monkeypatch.setattr(kernels.ops, "linear_forward", lazy)
    with emulated():
        assert kernels.main(["--only", "linear bfloat16, 50"], device="cpu") == 1
    assert "card kernels: 0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["quantize", "quantize_nested", "quantize_absmax"])
def test_a_wrong_bit_is_found(monkeypatch, capsys, operation):
    right = getattr(kernels.ops, operation)

    def wrong(*arguments):
        results = right(*arguments)
        if kernels.backends.forced_backend() is not None:
            results[-1].view(-1)[-1:].view(torch.uint8)[0] ^= 1
        return results

    monkeypatch.setattr(kernels.ops, operation, wrong)
    with emulated():
        assert kernels.main(["--only", f"{operation} "], device="cpu") == 1
    out = capsys.readouterr().out
    assert f"{operation}, " in out
    assert "1 of " in out
    assert "card kernels: 0 of " in out


@pytest.mark.parametrize("what", ["parameter", "exp_avg_code", "exp_avg_absmax", "master", "step", "norm"])
def test_a_wrong_step_is_found(monkeypatch, capsys, what):
    right = kernels.PagedLion.step

    def wrong(self):
        right(self)
        if kernels.backends.forced_backend() is None:
            return
        p = self.param_groups[0]["params"][0]
        found = {**self.state[p], "parameter": p.detach(), "norm": self._engine._norm}[what]
        found.reshape(-1)[-1:].view(torch.uint8)[0] ^= 1

    monkeypatch.setattr(kernels.PagedLion, "step", wrong)
    with emulated():
        case = "optimizer_step PagedLion 8 bits, bfloat16, clipped, scaled"
        assert kernels.main(["--only", case], device="cpu") == 1
    assert "card kernels: 0 of 1" in capsys.readouterr().out


def test_optimizer_cases_reach_every_path():
    """Steps are taken and left out, norms clipped and not, and a norm is of every gradient."""
    with kernels.cpu_kernels():
        results = {case.name: case.run("cpu") for case in kernels.cases() if case.kernel.startswith("optimizer")}
    assert len(results) == 20 + 2 * len(kernels.OPTIMIZER_EXTRAS) + 3
    plain = next(found for name, found in results.items() if name.startswith("PagedAdamW 32"))
    params = len(kernels.OPTIMIZER_COUNTS)
    assert [found.item() for found in plain[params + 2 : -2 : 3]] == [3, 2, 3, 3, 3, 3, 0]
    for extra, more, scaler in kernels.OPTIMIZER_EXTRAS:
        norm, skipped = (one.item() for one in results[f"PagedAdamW 32 bits, float32, {extra}"][-2:])
        assert skipped == (3 if scaler and scaler[1] else 1 if "skip_nonfinite" in more else 0)
        assert (norm > 0.5) == bool(more), extra
    for dtype in ("float32", "bfloat16", "float16"):
        assert results[f"of {dtype} gradients"][0].item() > 0


def test_an_element_that_is_not_written_is_found(monkeypatch):
    right = kernels.NF4Weight.dequantize

    def lazy(self, *arguments, out, **more):
        if kernels.backends.forced_backend() is None:
            return right(self, *arguments, out=out, **more)
        out.view(-1)[:-1] = right(self, *arguments, **more).view(-1)[:-1]
        return out

    monkeypatch.setattr(kernels.NF4Weight, "dequantize", lazy)
    with emulated():
        problems = [kernels.check(case, "cpu") for case in kernels.cases() if case.kernel == "dequantize"]
    assert len(problems) == 72
    assert all(problem is not None and "bytes of result 0 differ" in problem for problem in problems)


# ------------------------------------------------------------------------------------------------ times and benchmarks


def test_times_are_those_of_one_call():
    card = FakeCard()
    order = []

    def costing(name, microseconds):
        def call(i):
            order.append((name, i))
            card.now += microseconds
            return object()

        return call

    contenders = [
        cuda_timing.Timed("a", costing("a", 10.0), 4, 1000),
        cuda_timing.Timed("b", costing("b", 30.0), 3, 3000),
        cuda_timing.Timed("c", costing("c", 8.0), 3, 1000, waits=True),
    ]
    a, b, c = cuda_timing.measure(card, contenders, 0.0)
    assert [one["graph_us"] and one["graph_us"]["median"] for one in (a, b, c)] == [5.0, 15.0, None]
    assert [one["event_us"]["median"] for one in (a, b, c)] == [10.0, 30.0, 8.0]
    assert (a["us"], c["us"]) == (5.0, 8.0)
    assert a["gb_per_s"] == pytest.approx(1000 / 5e-6 / 1e9)
    assert c["no_graph"] == "the call waits for the device"
    assert (a["graph_calls"] * 10.0, b["graph_calls"] * 30.0) >= (cuda_timing.SAMPLE_US, cuda_timing.SAMPLE_US)
    assert a["event_us"]["samples"] == 4 * cuda_timing.MIN_ROUNDS
    assert a["graph_us"]["samples"] == cuda_timing.MIN_ROUNDS
    assert all(one["host_us"]["median"] > 0 for one in (a, b, c))
    # The copies take turns, and so do the contenders.
    for name, copies in (("a", 4), ("b", 3), ("c", 3)):
        used = [i for other, i in order if other == name]
        assert all((i + 1) % copies == j for i, j in itertools.pairwise(used))
    names = [name for name, _ in order]
    blocks = "".join(name for i, name in enumerate(names) if i == 0 or names[i - 1] != name)
    # Set up one after the other, then rounds that begin with a, b, c, a, ...
    assert blocks.startswith("abc" + "abc" + "bca" + "cab" + "abc"), blocks


def test_results_stay_until_their_turn_comes_again():
    # What is kept cannot be written over: memory comes back only after as many calls as there are copies.
    numbers = iter(range(100))
    runner = cuda_timing._Runner(cuda_timing.Timed("a", lambda i: (i, next(numbers)), 3, 1))
    for _ in range(5):
        runner.once()
    assert runner.kept == [(0, 3), (1, 4), (2, 2)]


def test_a_call_that_cannot_be_captured_is_timed_by_events():
    class Refusing(SteadyCard):
        def capture(self, function):
            function()
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    found = cuda_timing.measure(Refusing(), [cuda_timing.Timed("a", lambda i: None, 3, 1000)], 0.0)[0]
    assert found["no_graph"] == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert found["graph_us"] is None
    assert found["us"] == found["event_us"]["median"] == 1.0


def test_copies_exceed_the_cache_several_times():
    for size in (10, 100, 30_000, 10**6):
        assert cuda_timing.copies_for(size, 50_000) * size >= cuda_timing.TIMES_L2 * 50_000
    assert cuda_timing.copies_for(10**9, 50_000) == 3


SHAPES = ((64, 128), (33, 65))


@functools.cache
def measured(bitsandbytes: bool) -> dict:
    """The benchmark at small sizes on the emulator, timed by a clock that stands still but for events."""
    saved = []
    with pytest.MonkeyPatch.context() as patch, emulated():
        for name, few in (("MOST_CALLS", 3), ("MIN_ROUNDS", 2)):
            patch.setattr(cuda_timing, name, few)
        if not bitsandbytes:
            for name in ("bitsandbytes", "bitsandbytes.functional"):
                patch.setitem(sys.modules, name, None)
        bench = quantize.Bench(SteadyCard(l2_bytes=0), "cpu")
        result = quantize.run(bench, 0.0, lambda r: saved.append(json.loads(json.dumps(r))), SHAPES, 4096)
    # On disk after the copy, after each case, and at the end.
    assert [len(one["cases"]) for one in saved] == [*range(11), 10]
    assert [one["complete"] for one in saved] == [False] * 11 + [True]
    return result


@pytest.mark.share(2)
def test_missing_bitsandbytes_leaves_empty_columns():
    result = measured(False)
    for case in result["cases"]:
        assert case["contenders"][-1] == {"name": BNB, "failed": "not installed (bitsandbytes)"}
        ours = case["contenders"][0]
        assert (ours["name"], ours["us"] > 0) == (OURS, True)
        assert case["contenders"][1]["name"] == EQUAL_COPY
        assert abs(case["contenders"][1]["bytes"] - ours["bytes"]) <= 1
    assert sum(any(c["name"] == CHECKED for c in case["contenders"]) for case in result["cases"]) == 4
    text = report.markdown(finished(result))
    assert "- bitsandbytes: not installed (bitsandbytes) (all cases)" in text
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    head = next(line for line in lines if "bnb us" in line)
    rows = [dict(zip(head, line)) for line in lines if line[1:2] in (["quantize"], ["dequantize"])]
    assert len(rows) == 10
    for row in rows:
        assert row["us"]
        assert row["bnb us"] == row["bnb / ours"] == row["bnb host us"] == ""


def test_bytes_are_those_that_must_be_moved():
    case = measured(False)["cases"][0]
    assert (case["operation"], case["dtype"], case["n"], case["k"]) == ("dequantize", "bfloat16", 64, 128)
    blocks = 64 * 128 // 64
    assert case["contenders"][0]["bytes"] == 64 * 128 * 2 + 64 * 128 // 2 + blocks + 4 + 4


def test_bitsandbytes_computes_the_same():
    pytest.importorskip("bitsandbytes")
    for case in measured(True)["cases"]:
        assert "failed" not in case["contenders"][-1], case
        assert case["contenders"][-1]["us"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = quantize.ops.quantize_nested

    def wrong(*arguments):
        packed, *rest = right(*arguments)
        if kernels.backends.forced_backend() is not None:  # not in the CPU's result, which is the truth
            packed[-1] ^= 1
        return packed, *rest

    monkeypatch.setattr(quantize.ops, "quantize_nested", wrong)
    with emulated():
        bench = quantize.Bench(SteadyCard(l2_bytes=0), "cpu")
        about, makers = next(c for c in bench.cases(SHAPES) if c[0]["operation"] == "quantize")
        case = bench.run_case(about, makers, 0.0)
    assert case["failed"] == "wrong result: quantize differs from the CPU's"
    assert case["contenders"] == []


# ------------------------------------------------------------------------------------------------------------- tables


def finished(bench: dict) -> dict:
    """A result with this benchmark."""
    counts = {"passed": 3, "failed": 1, "skipped": 1, "failures": [["t::a", "why"]], "skips": [["t::b", "one card"]]}
    found = {
        "facts": {"device": "a card", "nvidia_smi": "unknown"},
        "tests": counts,
        "sanitizers": {"memcheck": {"errors": 0, "cases": 154}, "initcheck": {"seconds": 9.0}},
        "bench": bench,
    }
    steps = [{"name": n, "status": "passed", "seconds": 3.0, "limit_s": 9.0, "found": f} for n, f in found.items()]
    steps[1].update(status="failed", reason="1 tests failed", tail="the end")
    return {"schema": 1, "date": "2026-01-02T03:04:05+00:00", "complete": True, "passed": False, "steps": steps}


def contender(name: str, us: float, gb_per_s: float = 0.0, graph: bool = True) -> dict:
    times = {"median": us, "q20": us - 0.5, "q80": us + 0.5, "samples": 9}
    return {
        "name": name,
        "us": us,
        "gb_per_s": gb_per_s,
        "graph_us": times if graph else None,
        "event_us": {**times, "median": 2 * us},
        "host_us": {**times, "median": 7.0},
        "no_graph": None if graph else "not captured: RuntimeError: no",
        "waits": False,
    }


def dequantize(n: int, dtype: str, *contenders: dict) -> dict:
    return {"operation": "dequantize", "n": n, "k": n, "dtype": dtype, "contenders": list(contenders)}


def sample() -> dict:
    missing, failing = {"name": BNB, "failed": "not installed (bitsandbytes)"}, {"name": BNB, "failed": "x"}
    at_8192, at_4096 = contender(EQUAL_COPY, 39.0), contender(EQUAL_COPY, 9.0)
    return {
        "complete": True,
        "roof": contender("copy", 500.0, 4000.0),
        "cases": [
            dequantize(8192, "bfloat16", contender(OURS, 40.0, 3800.0), at_8192, contender(BNB, 90.0)),
            dequantize(8192, "float16", contender(OURS, 50.0, 3000.0), at_8192, failing),
            dequantize(4096, "bfloat16", contender(OURS, 10.0, 3600.0), at_4096, contender(BNB, 19.0)),
            dequantize(4096, "float16", contender(OURS, 10.0, 3600.0), at_4096, missing),
            {**dequantize(4096, "float32"), "failed": "wrong result: dequantize differs from the CPU's"},
        ],
    }


def test_bars_worst_first():
    verdicts = report.verdicts(finished(sample()))
    assert [one.share for one in verdicts] == sorted(one.share for one in verdicts)
    by_title = {one.title: (one.word, one.reached, one.reason) for one in verdicts}
    copy = "dequantize 8192 x 8192 to {}, of a copy's bandwidth"
    bnb = "dequantize 4096 x 4096 to {}, bitsandbytes' time over this package's"
    assert by_title == {
        copy.format("bfloat16"): ("met", 0.95, ""),
        copy.format("float16"): ("missed", 0.75, ""),
        copy.format("float32"): ("not measured", None, "the case was not run"),
        bnb.format("bfloat16"): ("missed", 1.9, ""),
        bnb.format("float16"): ("not measured", None, "not installed (bitsandbytes)"),
        bnb.format("float32"): ("not measured", None, "wrong result: dequantize differs from the CPU's"),
    }
    nothing = report.verdicts({"steps": []})
    assert [one.word for one in nothing] == ["not measured"] * 6


def test_times_are_compared_like_with_like():
    case = dequantize(4096, "bfloat16", contender(OURS, 10.0), contender(BNB, 60.0, graph=False))
    assert report.times_ours(case, BNB) == 6.0  # events: 120 / 20; by graph against events it would be 12 or 6
    case["contenders"][1]["event_us"]["median"] = 100.0
    assert report.times_ours(case, BNB) == 5.0


def test_the_tables():
    text = report.markdown(finished(sample()))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    times = [row for row in rows if row[0] == "dequantize"]
    assert [(row[1], row[2], row[6]) for row in times] == [
        ("4096 x 4096", "float32", ""),
        ("8192 x 8192", "float16", "75%"),
        ("4096 x 4096", "bfloat16", "90%"),
        ("4096 x 4096", "float16", "90%"),
        ("8192 x 8192", "bfloat16", "95%"),
    ]
    assert times[-1][3:] == ["40.0", "39.5-40.5", "3800", "95%", "98%", "90.0", "2.25", "80.0", "7.0", "", "7.0"]
    assert times[1][8:10] == ["", ""]
    assert "- bitsandbytes: not installed (bitsandbytes) (dequantize 4096 x 4096 float16)" in text
    assert "- t::a: why" in text
    assert "- t::b: one card" in text
    assert "    the end" in text
    assert ["sanitizers", "passed", "3.0", "9", "memcheck: 0 errors, 154 cases; initcheck: 9.0 seconds"] in rows
    # Columns stand under each other.
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) <= 1
