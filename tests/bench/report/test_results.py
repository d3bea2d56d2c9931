"""Result files, tables, plots and comparisons."""

from __future__ import annotations

import pytest
import torch
from bench_runs.cases import POINT, POINTS, TINY, contender, limits_case, measured

from qlora_kernels.bench.case import (
    OURS,
)
from qlora_kernels.bench.contenders.names import (
    BNB,
    COPY,
    DENSE,
)
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import compare, plots, results, table
from qlora_kernels.bench.report.ratios import limits_of
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError


@pytest.fixture(scope="module")
def tiny() -> dict:
    """A run of every operation but the limits and whole runs, at tiny sizes; through its file elsewhere."""
    run = results.begin(TINY, "usual")
    run["cases"] = [limits_case(), *map(measured, POINTS)]
    return {**run, "complete": True}


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
            contender(COPY, 2.0, bytes=int(20e6)),
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


def test_a_plot_shows_the_dtype_of_most_cases():
    def cases(dtype: str, *rows: int) -> list[dict]:
        return [Point("linear_forward", dtype, 4096, 4096, m, 0).as_dict() for m in rows]

    slow = cases("bfloat16", 1, 16) + cases("float32", 64, 1, 16)
    assert [(c["dtype"], c["m"]) for c in plots.speed_cases({"cases": slow})] == [("float32", m) for m in (1, 16, 64)]
    equal = cases("float32", 1) + cases("bfloat16", 1)
    assert [c["dtype"] for c in plots.speed_cases({"cases": equal})] == ["bfloat16"]


def test_whole_table_and_plots(tiny, tmp_path):
    text = table.terminal(tiny)
    assert "decode, seven layers of a block, tiny, M = 1, r = 4" in text
    assert "not completed" not in text
    assert "not completed" in table.terminal({**tiny, "complete": False})
    forward = [case for case in tiny["cases"] if (case["operation"], case["rank"]) == ("linear_forward", 0)]
    steps = [case for case in tiny["cases"] if case["operation"] == "linear_step"]
    others = [case for case in tiny["cases"] if case not in forward + steps]
    full_size = [{**case, "n": 4096, "k": 4096, "dtype": "bfloat16"} for case in forward[:2] + steps]
    without = set(plots.PLOTS) - {"loss"}  # which is of other cases
    drawn = {name: plots.draw({**tiny, "cases": others + full_size}, name, tmp_path / name, "x") for name in without}
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
