"""The bench: README's figures come from its files, nothing is invented, and a tiny run goes from end to end."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "run.py").is_file():
    pytest.skip("the bench comes with the source tree only", allow_module_level=True)
sys.path.append(str(ROOT))  # bench is no part of the installed package

from bench import results, run, tables  # noqa: E402
from bench.bars import BARS, OPTIMIZER_BARS, SUITE_BARS, Bar, judge  # noqa: E402
from qlora_kernels.bench import common  # noqa: E402
from qlora_kernels.bench.common import OURS, Case, Contender, Measurement, Ready, Settings  # noqa: E402
from qlora_kernels.bench.contenders import BNB, DENSE, EQUAL_COPY, FOREACH, FUSED, PEFT, Lab  # noqa: E402

TINY = Settings(n=256, k=256, threads=1, seconds=0.0, min_rounds=2)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """A whole run at a tiny size, through its file."""
    path = tmp_path_factory.mktemp("bench") / "cpu-tiny.json"
    results.save(run.run(TINY, show=False), path)
    return results.load(path)


@pytest.fixture(scope="module")
def tiny_optimizer() -> dict:
    """The optimizers' suite, for the adapters of a model with 256 columns."""
    return run.run(TINY, show=False, suite="optimizer")


def fake(prepare_other, name: str = BNB) -> Case:
    """A case in which this package doubles a number, against one other contender."""
    ours = Ready(lambda i: torch.tensor(2.0), lambda y: abs(y.item() - 2), 0.1, bytes=8)
    return Case("linear_forward", "forward", 1, 2, [Contender(OURS, lambda: ours), Contender(name, prepare_other)])


# ------------------------------------------------------------------------------------------------------- README


def test_readme_shows_the_newest_results():
    text = (ROOT / "README.md").read_text()
    assert text == tables.filled(text), "README.md is out of date; run: python -m bench.tables"
    path = results.newest()
    assert tables.markdown(results.load(path), tables.relative(path)) in text


def test_readme_has_a_table_for_each_suite(tmp_path, monkeypatch, tiny, tiny_optimizer):
    text = "<!-- table: cpu -->\nold\n<!-- /table -->\nmiddle\n<!-- table: optimizer -->\nold\n<!-- /table -->\n"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(results.newest, "__defaults__", (tmp_path, "linear"))
    results.save(tiny, tmp_path / "cpu-x.json")
    linear = tables.markdown(tiny, "cpu-x.json")
    without = tables.filled(text)
    assert without == tables.replace_table(tables.replace_table(text, linear), tables.NOT_MEASURED, "optimizer")
    results.save(tiny_optimizer, tmp_path / "optimizer-x.json")
    table = tables.markdown(tiny_optimizer, "optimizer-x.json")
    assert "| | this package | torch fused | torch foreach | bitsandbytes |" in table
    assert "a copy of as many bytes" in table
    assert tables.filled(text) == without.replace(tables.NOT_MEASURED, table)


def test_plot_is_of_the_newest_result():
    from PIL import Image

    path = results.newest()
    with Image.open(tables.PLOT) as image:
        assert image.text["Source"] == tables.source_note(results.load(path), tables.relative(path))


def test_newest_goes_by_the_date_inside(tmp_path):
    for name, date in (("cpu-z", "2020-01-01T00:00:00+00:00"), ("cpu-a", "2021-01-01T00:00:00+00:00")):
        results.save({"format": results.FORMAT, "date": date}, tmp_path / f"{name}.json")
    assert results.newest(tmp_path).name == "cpu-a.json"
    with pytest.raises(FileNotFoundError, match=r"bench\.run --suite linear --out bench/results/cpu-NAME"):
        results.newest(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="--suite optimizer"):
        results.newest(tmp_path, "optimizer")


def test_table_needs_its_markers():
    with pytest.raises(ValueError, match="markers"):
        tables.replace_table("no markers", "table")


def test_foreign_result_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 1, found 99"):
        results.load(tmp_path / "x.json")


# --------------------------------------------------------------------------------------------------------- bars


@pytest.mark.parametrize(("fixture", "bars"), [("tiny", BARS), ("tiny_optimizer", OPTIMIZER_BARS)])
def test_every_bar_of_a_run_has_its_verdict(fixture, bars, request):
    verdicts = judge(request.getfixturevalue(fixture))
    assert len(verdicts) == len(bars)
    assert {v.bar for v in verdicts} == set(bars)
    assert [v.share for v in verdicts] == sorted(v.share for v in verdicts)
    for v in verdicts:
        assert v.word == ("not measured" if v.ratio is None else "pass" if v.ratio >= v.bar.at_least else "miss")


def test_suites_are_those_that_have_bars_and_files():
    assert set(run.SUITES) == set(SUITE_BARS) == set(results.PREFIXES)


@pytest.mark.parametrize("table", [judge, tables.terminal, lambda r: tables.markdown(r, "x.json")])
def test_missing_bar_is_an_error(tiny, table):
    without = copy.deepcopy(tiny)
    without["cases"] = [c for c in without["cases"] if (c["operation"], c["m"]) != ("linear_forward", 16)]
    with pytest.raises(ValueError, match="lack linear_forward, M = 16"):
        table(without)
    without = copy.deepcopy(tiny)
    for case in without["cases"]:
        case["contenders"] = [c for c in case["contenders"] if c["name"] != PEFT]
    with pytest.raises(ValueError, match="PEFT"):
        table(without)


def test_misses_are_shown_as_misses(tiny):
    verdict = judge(tiny, (Bar("linear_forward", 1, DENSE, 1e9),))[0]
    assert verdict.word == "miss"
    assert verdict.share < 1


# ---------------------------------------------------------------------------------------------------- contenders


def test_missing_contender_is_reported_not_invented(tiny):
    def prepare():
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    case = common.measure(fake(prepare), TINY)
    assert case["contenders"][1] == {"name": BNB, "failed": "not installed (bitsandbytes)"}
    assert case["contenders"][0]["samples"] > 0

    changed = {**tiny, "cases": [c for c in tiny["cases"] if (c["operation"], c["m"]) != ("linear_forward", 1)]}
    dense = {**case["contenders"][0], "name": DENSE}
    changed["cases"] = [{**case, "contenders": [*case["contenders"], dense]}, *changed["cases"]]
    first = judge(changed)[0]
    assert (first.word, first.reason, first.ratio) == ("not measured", "not installed (bitsandbytes)", None)
    for text in (tables.terminal(changed), tables.markdown(changed, "x.json")):
        assert "not installed (bitsandbytes)" in text
        assert "not measured" in text


def test_failing_contender_is_reported_with_its_reason():
    def prepare():
        raise RuntimeError("no kernel\nfor this processor")

    failed = common.measure(fake(prepare), TINY)["contenders"][1]
    assert failed == {"name": BNB, "failed": "RuntimeError: no kernel for this processor"}


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_wrong_result_is_not_timed(value):
    wrong = Ready(lambda i: torch.tensor(value), lambda y: abs(y.item() - 2), 0.1, bytes=8)
    failed = common.measure(fake(lambda: wrong), TINY)["contenders"][1]
    assert failed["failed"].startswith("wrong result: error")
    assert "median_ms" not in failed


def test_wrong_result_of_this_package_ends_the_run():
    case = fake(lambda: None)
    wrong = Ready(lambda i: torch.tensor(0.0), lambda y: abs(y.item() - 2), 0.1, bytes=8)
    with pytest.raises(common.WrongResult):
        Measurement(Case(case.operation, case.title, 1, 2, [Contender(OURS, lambda: wrong)]), TINY)


def test_contenders_alternate_and_copies_rotate():
    calls = []

    def ready(name):
        return Ready(lambda i: calls.append((name, i)), lambda _: 0.0, 0.1, bytes=8)

    contenders = [Contender(OURS, lambda: ready("a")), Contender(BNB, lambda: ready("b"))]
    measurement = Measurement(Case("linear_forward", "forward", 1, 2, contenders), TINY)
    calls.clear()
    measurement.round()
    measurement.round()
    order = [name for name, _ in calls]
    changes = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    assert changes == ["a", "b", "a"], "the second round starts with the other one"
    for name in "ab":
        indices = [i for other, i in calls if other == name]
        assert all((i + 1) % TINY.copies == j for i, j in itertools.pairwise(indices))


def test_quantiles():
    assert common.quantiles_of([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == {0: 1.0, 20: 2.0, 50: 3.5, 80: 5.0, 100: 6.0}


def test_quietest_attempt_counts_whatever_it_says(monkeypatch):
    shares = iter([0.4, 0.2, 0.3, 0.0])
    monkeypatch.setattr(common.OtherProcesses, "share", property(lambda self: next(shares)))
    ready = Ready(lambda i: torch.tensor(2.0), lambda y: abs(y.item() - 2), 0.1, bytes=8)
    assert common.measure(fake(lambda: ready), TINY, retries=2)["other_processes"] == 0.2


# ---------------------------------------------------------------------------------------------------- end to end


def test_tiny_run_measures_every_case(tiny):
    expected = [(case.operation, case.m) for case in run.all_cases(Lab(TINY))]
    assert [(case["operation"], case["m"]) for case in tiny["cases"]] == expected
    for case in tiny["cases"]:
        ours = case["contenders"][0]
        assert ours["name"] == OURS
        assert 0 < ours["q0_ms"] <= ours["q20_ms"] <= ours["median_ms"] <= ours["q80_ms"] <= ours["q100_ms"]
        assert ours["gb_per_s"] > 0
        for contender in case["contenders"]:
            assert ("failed" in contender) != ("median_ms" in contender)
            if contender["name"] == DENSE:
                assert "failed" not in contender
    assert tiny["machine"]["cpu"]
    assert tiny["versions"]["torch"] == torch.__version__
    assert tiny["settings"]["n"] == 256
    assert "M = 2048" in tables.terminal(tiny)


def test_tiny_run_of_the_optimizers(tiny_optimizer):
    """All compute the same, on 448 tensors; and the bytes are those of what a step reads and writes."""
    found = {case["operation"]: case["contenders"] for case in tiny_optimizer["cases"]}
    assert list(found) == ["adamw_step", "adamw_clipped_step", "adamw_8bit_step", "lion_step"]
    tensors = Lab(TINY).adapter_tensors
    assert len(tensors.parameters) == 448
    assert tensors.count == 16 * 32 * (4 * 512 + 3 * (256 + 688))
    bytes_each = {"adamw_step": 28, "adamw_clipped_step": 32, "adamw_8bit_step": 16.0625, "lion_step": 20}
    for operation, contenders in found.items():
        ours = contenders[0]
        assert ours["name"] == OURS
        assert ours["gb_per_s"] == pytest.approx(bytes_each[operation] * tensors.count / ours["median_ms"] / 1e6)
        for contender in contenders:
            assert ("failed" in contender) != ("median_ms" in contender)
            assert "wrong result" not in contender.get("failed", "")
            if contender["name"] in (FUSED, FOREACH, EQUAL_COPY):
                assert "failed" not in contender
    text = tables.terminal(tiny_optimizer)
    assert "hidden size 256, r = 16" in text
    assert "AdamW with clipping" in text


@pytest.mark.parametrize(
    ("case", "options"),
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
def test_an_optimizer_that_does_something_else_is_not_timed(case, options, monkeypatch):
    from qlora_kernels.bench.operations import optimizer as bench_optimizer

    name = "PagedLion" if case == "lion" else "PagedAdamW"
    original = getattr(bench_optimizer, name)
    monkeypatch.setattr(bench_optimizer, name, lambda params, **given: original(params, **{**given, **options}))
    lab = Lab(Settings(n=64, k=64, threads=1, seconds=0.0, min_rounds=1))
    with pytest.raises(common.WrongResult):
        Measurement(getattr(bench_optimizer, case)(lab), lab.settings)


def test_dequantizing_into_a_given_tensor_is_a_row_of_its_own(tiny):
    """And no bar's: those are for a new tensor."""
    given = [c["contenders"][0] for c in tiny["cases"] if c["operation"] == "dequantize_out"]
    assert len(given) == 1
    assert given[0]["error"] < 0.003
    assert not [bar for bar in BARS if bar.operation == "dequantize_out"]
    assert "| dequantize to bf16 into a given tensor | **" in tables.markdown(tiny, "x.json")


def test_command_writes_a_result_and_a_plot(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "run", lambda settings, retries, suite: tiny)
    assert run.main(["--out", str(tmp_path / "new" / "cpu-x.json"), "--size", "256"]) == 0
    assert "bars" in capsys.readouterr().out
    assert results.load(tmp_path / "new" / "cpu-x.json") == tiny
    tables.plot(tiny, tmp_path / "cpu.png", "cpu-x.json")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_under_pytest_benchmark():
    """pytest-benchmark is given this package's times, not those of a whole round."""

    class Fixture:
        def __init__(self):
            self.extra_info, self.seconds = {}, []

        def pedantic(self, target, rounds, iterations):
            assert iterations == 1
            for _ in range(rounds):
                begin = common.CLOCK()
                target()
                self.seconds.append(common.CLOCK() - begin)

    def slow():
        return Ready(lambda i: time.sleep(0.02), lambda _: 0.0, 0.1, bytes=8)

    fixture = Fixture()
    result = common.run_under_pytest(fixture, fake(slow), TINY)
    assert fixture.extra_info == result
    assert len(fixture.seconds) == result["rounds"]
    assert 0 < max(fixture.seconds) < 0.02
