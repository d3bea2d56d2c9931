"""The figures in README and docs/ come from result files, and every bar has its verdict."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent.parent
if not (ROOT / "bench" / "readme" / "tables.py").is_file():
    pytest.skip("the tables come with the source tree only", allow_module_level=True)

from bench import bench_operations  # noqa: E402
from bench.readme import headlines, tables  # noqa: E402
from qlora_kernels.bench.case import OURS, Settings  # noqa: E402
from qlora_kernels.bench.contenders.names import BNB, DENSE, EQUAL_COPY, PEFT  # noqa: E402
from qlora_kernels.bench.points import SWEEPS, Point, point_of  # noqa: E402
from qlora_kernels.bench.report import plots, results  # noqa: E402
from qlora_kernels.bench.report.bars import BARS_SINCE, CPU_LAYER_BARS, OPTIMIZER_BARS, Bar, judge  # noqa: E402
from qlora_kernels.bench.worker import failed_case  # noqa: E402


@pytest.fixture(scope="module")
def newest() -> dict:
    return results.load(tables.newest())


def test_the_documents_show_the_newest_results():
    texts = tables.read_documents()
    filled = tables.filled(texts)
    stale = [tables.relative(path) for path in texts if filled[path] != texts[path]]
    assert not stale, f"{', '.join(stale)}: out of date; run: python -m bench.readme.tables"
    for pattern, page in tables.PAGES.items():
        path = tables.newest(pattern)
        result = page.load(path)
        for name, table in page.tables.items():
            document = tables.page_of(name, texts)
            assert table(result, tables.link(path, document)) in texts[document]
        assert result["complete"]
        assert result["modified"] is False, "a result that is quoted is of a commit"


def test_readme_has_the_headline_and_no_other_table():
    assert re.findall(r"<!-- table: (\S+) -->", (ROOT / "README.md").read_text()) == ["headline"]


def test_the_documents_show_every_plot_and_each_is_of_the_newest_result():
    from PIL import Image

    texts = tables.read_documents()
    shown = {name for page in tables.PAGES.values() for name in page.plots}
    assert shown == {*(f"cpu-{name}.png" for name in plots.PLOTS if name != "loss"), "ranks.png"}
    for pattern, page in tables.PAGES.items():
        path = tables.newest(pattern)
        for name in page.plots:
            plot = tables.FOLDER / name
            assert any(f"]({tables.link(plot, document)})" in text for document, text in texts.items())
            with Image.open(plot) as image:
                assert image.text["Source"] == f"{tables.relative(path)} {page.load(path)['date']}"


def test_newest_goes_by_the_date_inside(tmp_path):
    run = results.begin(Settings(), "usual")

    def save(name: str, year: int, complete: bool = True, modified: bool | None = False) -> None:
        made = {"date": f"{year}-01-01T00:00:00+00:00", "complete": complete, "modified": modified}
        results.save({**run, **made}, tmp_path / f"{name}.jsonl")

    save("cpu-unfinished", 2022, complete=False)
    save("cpu-changed", 2023, modified=True)
    save("cpu-unknown", 2024, modified=None)
    with pytest.raises(FileNotFoundError, match="no complete run of an unmodified commit"):
        tables.newest(folder=tmp_path)
    save("cpu-z", 2020)
    save("cpu-a", 2021)
    assert tables.newest(folder=tmp_path).name == "cpu-a.jsonl"
    with pytest.raises(FileNotFoundError, match="qlora-kernels bench --out"):
        tables.newest(folder=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="--operations rank_study --out"):
        tables.newest("ranks-*.json*", tmp_path)


def test_table_needs_its_markers():
    with pytest.raises(ValueError, match="markers"):
        tables.replace_table("no markers", "table", "cpu")
    text = "<!-- table: a -->\nold\n<!-- /table -->\nbetween\n<!-- table: b -->\nold\n<!-- /table -->\n"
    assert tables.replace_table(text, "new", "a") == text.replace("old", "new", 1)
    with pytest.raises(ValueError, match="no other table between them"):
        tables.replace_table(text.replace("<!-- /table -->", "", 1), "new", "a")


def test_a_table_stands_in_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    marked = "<!-- table: a -->\n<!-- /table -->\n"
    texts = {tmp_path / "README.md": marked, tmp_path / "docs" / "a.md": "no markers"}
    assert tables.page_of("a", texts) == tmp_path / "README.md"
    with pytest.raises(ValueError, match="found none"):
        tables.page_of("b", texts)
    with pytest.raises(ValueError, match=r"found README.md, docs/a.md"):
        tables.page_of("a", {**texts, tmp_path / "docs" / "a.md": marked})


def test_the_headline_needs_each_of_its_cases(newest):
    point = headlines.HEADLINE[0]
    without = {**newest, "cases": [case for case in newest["cases"] if point_of(case) != point]}
    with pytest.raises(ValueError, match="lacks what a table shows: linear_forward"):
        headlines.table(without, "x.jsonl")


def changed(run: dict, point: Point, name: str, **contender) -> dict:
    """A run in which one contender of one case is another; without figures for it, it is removed."""
    cases = []
    for case in run["cases"]:
        if point_of(case) == point:
            others = [c for c in case["contenders"] if c["name"] != name]
            case = {**case, "contenders": [*others, *([{"name": name, **contender}] if contender else [])]}
        cases.append(case)
    return {**run, "cases": cases}


@pytest.mark.parametrize("bars", [*CPU_LAYER_BARS.values(), OPTIMIZER_BARS])
def test_every_bar_has_its_verdict(newest, bars):
    verdicts = judge(newest, bars)
    assert {v.bar for v in verdicts} == set(bars)
    assert [v.share for v in verdicts] == sorted(v.share for v in verdicts)
    for v in verdicts:
        assert v.word == ("not measured" if v.ratio is None else "pass" if v.ratio >= v.bar.at_least else "miss")
    assert {bar.point for bar in bars} <= set(SWEEPS["usual"]())


def test_missing_bar_is_an_error(newest):
    point = Point("linear_forward", n=4096, k=4096, m=16, rank=0)
    without = {**newest, "cases": [case for case in newest["cases"] if point_of(case) != point]}
    with pytest.raises(ValueError, match="lack linear_forward, 4096 x 4096, M = 16"):
        tables.bar_rows({**without, "bars": BARS_SINCE}, (Bar(point, DENSE, 1.3),))
    assert "more targets were set after this run" in tables.layer_table({**without, "bars": BARS_SINCE - 1}, "x.jsonl")
    step = Point("linear_step", n=4096, k=4096, m=16, rank=16)
    with pytest.raises(ValueError, match="PEFT"):
        tables.bar_rows({**changed(newest, step, PEFT), "bars": BARS_SINCE}, (Bar(step, PEFT, 8),))


def test_misses_and_failures_are_shown_as_such(newest):
    point = Point("linear_forward", n=4096, k=4096, m=1, rank=0)
    assert judge(newest, (Bar(point, DENSE, 1e9),))[0].word == "miss"
    run = changed(newest, point, BNB, failed="not installed (bitsandbytes)")
    first = judge(run, (Bar(point, BNB, 30),))[0]
    assert (first.word, first.reason, first.ratio) == ("not measured", "not installed (bitsandbytes)", None)
    text = "\n".join(tables.bar_rows(run, (Bar(point, BNB, 30),)))
    assert "| forward, M = 1 | bitsandbytes | 30× | not installed (bitsandbytes) | not measured |" in text


def failed_as_a_whole(run: dict, points: set[Point], why: str) -> dict:
    """The run, with cases that could not be set up."""
    return {
        **run,
        "cases": [failed_case(point_of(c), why) if point_of(c) in points else c for c in run["cases"]],
    }


def test_cases_that_failed_as_a_whole_have_their_reason(newest):
    """In every table; and a | in it ends no cell."""
    bars = (*CPU_LAYER_BARS["amx"], *OPTIMIZER_BARS)
    points = {bar.point for bar in bars}
    run = failed_as_a_whole(newest, points, "a|b")
    of_the_run = {point_of(case) for case in run["cases"]}
    verdicts = [v for v in judge(run, bars) if v.bar.point in of_the_run]
    assert {(v.word, v.reason) for v in verdicts} == {("not measured", "a|b")}
    for table in (tables.layer_table(run, "x.jsonl"), tables.optimizer_table(run, "x.jsonl")):
        assert "a\\|b | not measured |" in table
        assert "a|b" not in table
    latency = results.load(tables.newest("latency-*.jsonl"))
    [*points] = (point_of(case) for case in latency["cases"] if case["operation"] == "gpt2_forward")
    text = tables.latency_table(failed_as_a_whole(latency, {points[0]}, "a|b"), "x.jsonl")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len([row for row in rows if row.split(" | ")[1] == "a\\|b"]) == 7
    assert not any("a\\|b" in row.split(" | ", 2)[2] for row in rows)
    with pytest.raises(ValueError, match=r"x.jsonl lacks gpt2_forward"):
        tables.latency_table({**latency, "cases": []}, "x.jsonl")


def test_a_bar_without_this_packages_figure_has_its_reason(newest):
    point = Point("linear_forward", n=4096, k=4096, m=1, rank=0)
    [verdict] = judge(changed(newest, point, OURS, failed="out of luck"), (Bar(point, DENSE, 1.0),))
    assert (verdict.word, verdict.reason) == ("not measured", "out of luck")


def test_nothing_is_replaced_when_a_plot_cannot_be_drawn(tmp_path, monkeypatch, newest):
    """The document and all plots stay as they were, and nothing is printed that says otherwise."""
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    text = "".join(
        f"<!-- table: {name} -->\nold\n<!-- /table -->\n"
        for name in ("cpu-sets", *(name for page in tables.PAGES.values() for name in page.tables))
    )
    readme.write_text(text)
    without = {**newest, "cases": [case for case in newest["cases"] if case["operation"] != "block_step"]}
    results.save(without, folder / "cpu-x.jsonl")
    for pattern in set(tables.PAGES) - {"cpu-*.jsonl"}:
        path = tables.newest(pattern)
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "cpu-memory.png").write_text("old")
    monkeypatch.setattr(headlines, "HEADLINE", headlines.HEADLINE[:1])  # which needs none of the cases that are missing
    monkeypatch.setattr(tables, "FOLDER", folder)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables.newest, "__defaults__", ("cpu-*.jsonl", folder))
    with pytest.raises(ValueError, match="lacks what the plot 'memory' shows"):
        tables.main([])
    assert readme.read_text() == text
    assert (folder / "cpu-memory.png").read_text() == "old"
    assert not (folder / "cpu-speed.png").exists()
    results.save(newest, folder / "cpu-x.jsonl")
    assert tables.main([]) == 0
    assert "old" not in readme.read_text()
    assert {path.name for path in folder.glob("*.png")} == {n for page in tables.PAGES.values() for n in page.plots}


def test_figures_are_the_files(newest):
    """A median that differs in the file differs in the table."""
    point = Point("adamw_step", "float32", rank=16, model="llama-2-7b")
    case = next(case for case in newest["cases"] if point_of(case) == point)
    ours = next(c for c in case["contenders"] if c["name"] == OURS)
    run = changed(newest, point, OURS, **{k: v for k, v in {**ours, "median_ms": 123.4}.items() if k != "name"})
    text = tables.optimizer_table(run, "x.jsonl")
    assert "| AdamW | **123** |" in text
    assert text != tables.optimizer_table(newest, "x.jsonl")
    assert EQUAL_COPY in text or "a copy of as many bytes" in text


def test_under_pytest_benchmark():
    """pytest-benchmark is given this package's times, not those of a whole round."""

    class Fixture:
        def __init__(self):
            self.extra_info, self.seconds = {}, []

        def pedantic(self, target, rounds, iterations):
            assert iterations == 1
            for _ in range(rounds):
                begin = bench_operations.CLOCK()
                target()
                self.seconds.append(bench_operations.CLOCK() - begin)

    class Worker:
        def ask(self, what, *arguments):
            return {"begin": 3, "round": 0.25, "result": {"title": "forward"}}[what]

    fixture = Fixture()
    case = bench_operations.measure(fixture, Worker(), Settings(), Point("quantize"))
    assert fixture.extra_info == case == {"title": "forward"}
    assert fixture.seconds == [0.25] * 3
