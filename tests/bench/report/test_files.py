"""What the benchmarks read and write: files that are no results, statistics of two runs, plots, options."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable

import pytest
from bench_runs.cases import parsed

from qlora_kernels.bench import command, options
from qlora_kernels.bench.case import OURS, Settings, quantiles_of
from qlora_kernels.bench.contenders.names import BNB, DENSE
from qlora_kernels.bench.points import SWEEPS, Point
from qlora_kernels.bench.report import compare, plots, results, table
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError

HEADER = results.begin(Settings(), "usual")
POINT = Point("linear_forward", n=64, k=64, m=1, rank=0)


def contender(name: str, median: float, spread: float = 0.01, **more) -> dict:
    """A measured contender, with quantiles around its median."""
    return {
        "name": name,
        "samples": 160,
        "median_ms": median,
        "q20_ms": median * (1 - spread),
        "q80_ms": median * (1 + spread),
        "error": 0.0,
        "bytes": 8,
        "copies": 4,
        "peak_allocated": 0,
        **more,
    }


def case_of(*contenders: dict, point: Point = POINT, rounds: int = 40) -> dict:
    about = {"title": point.operation, "flops": 2, "rounds": rounds, "other_processes": 0.0}
    return {**point.as_dict(), **about, "contenders": list(contenders)}


def run_of(*cases: dict, **header) -> dict:
    return {**HEADER, **header, "complete": True, "cases": list(cases)}


def compared(first: dict, second: dict) -> compare.Change:
    """The one change between two runs of one case."""
    changes, left_out = compare.compare(run_of(first), run_of(second))
    assert not left_out
    [change] = changes
    return change


# -------------------------------------------------------------------------------------------------- what is noise


def test_a_steady_difference_is_found_in_many_rounds():
    """6% is less than the spread of single samples, and more than that of the median of 40 rounds."""
    steady = contender(DENSE, 5.0, 0.02)
    first, slow, fast = (case_of(contender(OURS, ms, 0.08), steady) for ms in (1.0, 1.06, 1 / 1.06))
    assert compared(first, slow).verdict == "slower"
    assert compared(first, fast).verdict == "faster"
    assert compared({**first, "rounds": 10}, {**slow, "rounds": 10}).verdict == "within the noise"
    assert compared(first, case_of(contender(OURS, 1.02, 0.0001), steady)).verdict == "within the noise"  # below LEAST


def test_the_rivals_spread_counts():
    """A rival without a verdict neither hides a larger difference nor makes one."""
    first, second = (case_of(contender(OURS, ours), contender(DENSE, 5.0, 0.5)) for ours in (1.0, 1.1))
    assert compared(first, second).verdict == "within the noise"
    first, second = (case_of(contender(OURS, 1.0), contender(DENSE, other, 0.5)) for other in (5.0, 4.0))
    assert compared(first, second).verdict == "within the noise"
    first, second = (case_of(contender(OURS, ours), contender(DENSE, 5.0, 0.5)) for ours in (1.0, 1.6))
    assert compared(first, second).verdict == "slower"


def sampled(noise: Callable[[], float], name: str, median: float, rounds: int, calls: int, shared: bool) -> dict:
    """A contender with samples of some noise about the median; it may be the same for all calls of a round."""
    seconds = []
    for _ in range(rounds):
        noises = [noise()] * calls if shared else [noise() for _ in range(calls)]
        seconds += [median * (1 + one) for one in noises]
    q = quantiles_of(seconds)
    return contender(name, q[50], samples=len(seconds), q20_ms=q[20], q80_ms=q[80])


@pytest.mark.parametrize(("rounds", "calls", "shared"), [(40, 4, False), (40, 4, True), (8, 4, True), (5, 1, False)])
@pytest.mark.parametrize("rivals", [0, 1])
def test_runs_of_the_same_are_not_called_different(rounds, calls, shared, rivals):
    """With 20% of the samples 8% below the median, and 20% as far above."""
    generator = random.Random(0)

    def case() -> dict:
        names, noise = (OURS, *[DENSE] * rivals), lambda: generator.gauss(0.0, 0.095)
        return case_of(*(sampled(noise, name, 3.0, rounds, calls, shared) for name in names), rounds=rounds)

    called = [compared(case(), case()).verdict for _ in range(300)]
    assert called.count("within the noise") >= 0.95 * len(called)


def test_a_difference_between_samples_is_found():
    """6%, with samples within 8% of the median, and a rival's within 3%."""
    generator = random.Random(0)

    def case(ms: float) -> dict:
        ours = sampled(lambda: generator.uniform(-0.08, 0.08), OURS, ms, 40, 4, False)
        return case_of(ours, sampled(lambda: generator.uniform(-0.03, 0.03), DENSE, 5.0, 40, 4, False))

    verdicts = [compared(case(1.0), case(1.06)).verdict for _ in range(50)]
    assert verdicts.count("slower") >= 0.95 * len(verdicts)


@pytest.mark.parametrize(("samples", "rounds"), [(1, 1), (3, 3), (160, 4), (4, 40)])
def test_of_few_samples_nothing_is_said(samples, rounds):
    few, many = (case_of(contender(OURS, 1.0, samples=s), rounds=r) for s, r in ((samples, rounds), (160, 40)))
    slow = case_of(contender(OURS, 9.0, samples=160), rounds=40)
    assert compared(few, slow).verdict == "too few samples"
    assert compared(slow, few).verdict == "too few samples"
    assert compared(many, slow).verdict == "slower"
    assert "0 within the noise, 1 too few samples" in compare.terminal(run_of(few), run_of(slow))


def test_samples_on_a_card_are_a_round_each_by_graph_and_not_by_events():
    def verdict(**more) -> str:
        first, second = (case_of(contender(OURS, ms, 0.01, copies=8, **more), rounds=1) for ms in (1.0, 1.2))
        return compared(first, second).verdict

    assert verdict(by="graph", samples=8) == "slower"
    assert verdict(by="events", samples=8 * 8) == "slower"
    assert verdict(by="events", samples=8 * 4) == "too few samples"


def test_own_variants_of_training_are_no_judges():
    """They step with this package's optimizer: what slows it down slows them down."""
    names = (OURS, "LoRA on 16-bit weights", "full fine-tuning")
    point = Point("finetune", rank=16)
    first, second = (case_of(*(contender(name, ms) for name in names), point=point) for ms in (1.0, 1.2))
    change = compared(first, second)
    assert (change.verdict, change.drift) == ("slower", None)


@pytest.mark.parametrize("library", ["torch", "bitsandbytes", "peft", "transformers", "kernels"])
def test_other_libraries_are_no_judges(library):
    first, second = (run_of(case_of(contender(OURS, ms), contender(DENSE, ms))) for ms in (1.0, 1.2))
    assert compare.compare(first, second)[0][0].verdict == "within the noise"
    second["versions"] = {**second["versions"], library: "0.1"}
    assert compare.compare(first, second)[0][0].verdict == "slower"
    assert f"the versions of {library} differ" in compare.terminal(first, second)


def test_student():
    """Against tables of the distribution."""
    for freedom, quantile in ((4, 2.776), (8, 2.306), (39, 2.023), (1e9, 1.960)):
        assert compare._student(freedom) == pytest.approx(quantile, abs=0.01)


def test_a_point_that_was_measured_twice_is_compared_once():
    twice = run_of(case_of(contender(OURS, 1.0)), case_of(contender(OURS, 1.0)))
    changes, left_out = compare.compare(twice, twice)
    assert (len(changes), left_out) == (1, [])


# ------------------------------------------------------------------------------------------------------- clocks


def test_times_of_a_card_are_compared_by_one_clock():
    graph = contender(OURS, 1.0, by="graph", event_ms=3.0, no_graph=None)
    events = contender(OURS, 3.1, by="events", event_ms=3.1, no_graph="not captured: RuntimeError: no")
    change = compared(case_of(graph), case_of(events))
    assert (change.before, change.after) == (3.0, 3.1)
    assert change.where.endswith(", by events")
    assert change.verdict == "too few samples", "of the first run's events there is only the median"
    more = {"event_q20_ms": 2.99, "event_q80_ms": 3.01}
    for factor, samples, verdict in (
        (1, 9, "slower"),
        (8, 9, "too few samples"),
        (8, 72, "slower"),
        (1, 4, "too few samples"),
    ):
        known = contender(OURS, 1.0, by="graph", event_ms=3.0, event_samples=samples, **{**more, "copies": factor})
        slower = contender(OURS, 3.3, by="events", event_ms=3.3, samples=72)
        assert compared(case_of(known), case_of(slower)).verdict == verdict
    text = table.terminal(run_of(case_of({**graph, "name": OURS}, {**events, "name": BNB})))
    assert text.splitlines()[-1].split()[-3:] == ["1.03", "3", "3.1"]


def test_table_shows_by_which_clock():
    graph = contender(OURS, 1.0, by="graph", event_ms=3.0, no_graph=None)
    events = contender(BNB, 3.1, by="events", event_ms=3.1, no_graph="not captured: RuntimeError: no")
    lines = table.terminal(run_of(case_of(graph, events))).splitlines()
    assert next(line for line in lines if line.startswith(f"  {OURS}")).endswith(" graph")
    at = next(i for i, line in enumerate(lines) if line.startswith(f"  {BNB}"))
    assert lines[at].endswith(" events")
    assert lines[at + 1] == "    no graph: not captured: RuntimeError: no"
    assert not any(word in table.terminal(run_of(case_of(contender(OURS, 1.0)))) for word in (" by", "graph"))


# -------------------------------------------------------------------------------------------------------- files


def lines_of(run: dict, tmp_path) -> list[dict]:
    results.save(run, tmp_path / "good.jsonl")
    return [json.loads(line) for line in (tmp_path / "good.jsonl").read_text().splitlines()]


def _without(*path):
    def change(lines):
        value = lines
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


def _with(value, *path):
    def change(lines):
        where = lines
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value

    return change


OURS_OF = (1, "contenders", 0)
DAMAGES = {
    "no machine": _without(0, "machine"),
    "no date": _without(0, "date"),
    "another date": _with(5, 0, "date"),
    "no versions": _without(0, "versions"),
    "no torch": _without(0, "versions", "torch"),
    "no settings": _without(0, "settings"),
    "another gpu": _with({"name": 5}, 0, "machine", "gpu"),
    "no complete": _without(2, "complete"),
    "no contenders": _without(1, "contenders"),
    "contenders of another kind": _with([5], 1, "contenders"),
    "nameless": _without(*OURS_OF, "name"),
    "no n": _without(1, "n"),
    "n of another kind": _with([4], 1, "n"),
    "batch of another kind": _with([4], 1, "batch"),
    "reason of another kind for all": _with([4], 1, "failed"),
    "title of another kind": _with(None, 1, "title"),
    "no median": _without(*OURS_OF, "median_ms"),
    "zero": _with(0, *OURS_OF, "median_ms"),
    "NaN": _with(math.nan, *OURS_OF, "median_ms"),
    "infinite": _with(math.inf, *OURS_OF, "q80_ms"),
    "negative": _with(-1.0, *OURS_OF, "q20_ms"),
    "text": _with("1.0", *OURS_OF, "median_ms"),
    "huge": _with(10**400, *OURS_OF, "median_ms"),
    "descending": _with(1e-3, *OURS_OF, "q80_ms"),
    "no samples": _with(0, *OURS_OF, "samples"),
    "bytes of another kind": _with("8", *OURS_OF, "bytes"),
    "zero by events": _with(0.0, *OURS_OF, "event_ms"),
    "reason of another kind": _with(5, *OURS_OF, "failed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_values_that_are_none_are_one_sentence(damage, tmp_path, capsys):
    lines = lines_of(run_of(case_of(contender(OURS, 1.0), contender(DENSE, 2.0))), tmp_path)
    assert main(["bench", "--show", str(tmp_path / "good.jsonl")]) == 0
    DAMAGES[damage](lines)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    for arguments in (["--show", bad], ["--compare", bad, tmp_path / "good.jsonl"]):
        assert main(["bench", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert "bad.jsonl is damaged" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "run", "format": 2}\n{"kind": "end", "complete": true, "cases": 0}\n',
        '{"kind": "run", "format": 2}\n{"kind": "case"}\n{"kind": "end", "complete": true, "cases": 1}\n',
        "[" * 100_000,
    ],
)
def test_files_of_something_else_are_one_sentence(text, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert main(["bench", "--show", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_was_cut_off_is_refused_wherever(tmp_path):
    results.save(run_of(case_of(contender(OURS, 1.0))), tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    for size in range(0, len(whole) - 1, 97):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(InputError):
            results.load(tmp_path / "x")


# -------------------------------------------------------------------------------------------------------- plots


def block_step(*peaks: int | None) -> dict:
    parts = {"weights": 4_000_000, "adapters": 10, "gradients": 10, "optimizer states": 40}
    contenders = [contender(f"{i}", 1.0, peak_allocated=peak, parts=parts) for i, peak in enumerate(peaks)]
    return run_of(case_of(*contenders, point=Point("block_step", m=16, rank=4, model="tiny")))


class Axes:
    """Notes what is drawn."""

    def __init__(self):
        self.texts, self.bars = [], {}

    def text(self, x, y, text, **more):
        self.texts.append(text)

    def bar(self, x, heights, label, **more):
        self.bars[label] = heights

    def __getattr__(self, name):
        return lambda *arguments, **more: None


def test_memory_without_a_peak(tmp_path):
    """A step that is too long to be called once more for its peak is drawn with what is known of it."""
    axes = Axes()
    assert plots.memory(block_step(1_000_010, None), axes)
    assert axes.texts == ["5", "> 4"]
    assert axes.bars["activations and temporaries"] == [1.0, 0.0]
    axes = Axes()
    assert plots.memory(block_step(None), axes)
    assert "activations and temporaries" not in axes.bars
    pytest.importorskip("matplotlib")
    assert plots.draw(block_step(None, 5_000_000), "memory", tmp_path / "x.png", "x")
    assert command._plots(block_step(None), str(tmp_path / "y.jsonl")) == [str(tmp_path / "y-memory.png")]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_plot_that_cannot_be_written_leaves_the_old_one(fault, tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "x-memory.png"
    path.write_text("old")

    def half(self, target, **more):
        with open(target, "w") as file:
            file.write("ha")
        raise fault

    monkeypatch.setattr(figure.Figure, "savefig", half)
    assert command._plots(block_step(1_000_000), str(tmp_path / "x.jsonl")) == []
    assert f"No plot {path}: {fault.strerror}" in capsys.readouterr().err
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x-memory.png"]

    def interrupted(self, target, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(figure.Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command._plots(block_step(1_000_000), str(tmp_path / "x.jsonl"))
    assert path.read_text() == "old"


def test_a_folder_in_the_way_of_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "x-memory.png").mkdir()
    assert command._plots(block_step(1_000_000), str(tmp_path / "x.jsonl")) == []
    assert "No plot" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x-memory.png"]


# ------------------------------------------------------------------------------------------------------ options


def test_no_point_is_measured_twice():
    for arguments in (["--rows", "1,1"], ["--shapes", "64x64,64X64"], ["--operations", "linear_dx,linear_dx"]):
        points = options.points_of(parsed(*arguments))
        assert len(points) == len(set(points)) > 1
    assert options.points_of(parsed("--rows", "1,1")) == options.points_of(parsed("--rows", "1"))
    for name, sweep in SWEEPS.items():
        assert options.points_of(parsed(*([] if name == "usual" else [f"--{name}"]))) == list(dict.fromkeys(sweep()))


@pytest.mark.parametrize("flag", ["--operations", "--shapes", "--rows", "--ranks", "--dtypes", "--models"])
def test_an_empty_choice_is_no_choice_of_everything(flag, capsys):
    assert main(["bench", flag, "", "--list"]) == 2
    error = capsys.readouterr().err
    assert flag in error
    assert "found nothing" in error


@pytest.mark.parametrize("shape", ["4²x64", "٤x64", "+4x64", "4_0x64", f"{'9' * 5000}x4", "x", "4x4x4", "4x-1"])
def test_shapes_that_are_none(shape, capsys):
    assert main(["bench", "--shapes", shape, "--list"]) == 2
    assert "--shapes should be weights" in capsys.readouterr().err


def test_what_was_chosen_is_recorded():
    assert options.sweep_of(parsed()) == "usual"
    assert options.sweep_of(parsed("--quick")) == "quick"
    chosen = parsed("--full", "--operations", "linear_dx", "--rows", "1,2")
    assert options.sweep_of(chosen) == "full --operations linear_dx --rows 1,2"
    assert options.minutes_of(chosen, "cuda") == options.minutes_of(parsed("--full"), "cuda")
