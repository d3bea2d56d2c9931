"""The documents' table of ranks: what it says of a result, also of one from before this was a bench operation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent.parent
if not (ROOT / "bench" / "readme" / "ranks.py").is_file():
    pytest.skip("the tables come with the source tree only", allow_module_level=True)

pytest.importorskip("transformers")

from bench.readme import ranks  # noqa: E402
from qlora_kernels.bench.report import results  # noqa: E402

EARLIER = ROOT / "bench" / "results" / "ranks-cpu-amx-2cores.json"


@pytest.fixture(name="made")
def made_fixture() -> dict:
    """Two ranks with figures that are easily checked: the base has 2.0."""
    result = copy.deepcopy(ranks.load(EARLIER))
    result["cases"] = [case for case in result["cases"] if case["rank"] in (1, 4)]
    losses = iter((1.9, 1.7, 1.5, 1.8, 1.6, 1.0))
    for case in result["cases"]:
        case["base"] |= {"loss": 2.0, "loss_16bit": 1.75}
        for one in case["contenders"]:
            one |= {"loss": next(losses), "seconds": 1.25, "tokens_per_second": 4321.0}
    return result


def test_an_earlier_result_keeps_its_figures():
    cells = json.loads(EARLIER.read_text())["cells"]
    result = ranks.load(EARLIER)
    figures = {(case["rank"], one["targets"]): one for case in result["cases"] for one in case["contenders"]}
    assert len(figures) == len(cells) == 15
    for cell in cells:
        one = figures[cell["rank"], cell["targets"]]
        assert all(one[key] == cell[key] for key in ("loss", "train_loss", "trainable", "seconds"))


def test_an_earlier_result_of_several_seeds_is_refused(tmp_path):
    earlier = json.loads(EARLIER.read_text())
    earlier["settings"]["seeds"] = 2
    path = tmp_path / "ranks-x.json"
    path.write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="has 2 seeds"):
        ranks.load(path)


def test_a_result_of_the_command_is_read(made, tmp_path):
    for case in made["cases"]:
        case |= {"flops": None, "rounds": 3}
        for one in case["contenders"]:
            one |= {"samples": 1, "copies": 1, "error": None, "q20_ms": 1.0, "median_ms": 1.0, "q80_ms": 1.0}
    path = tmp_path / "ranks-x.jsonl"
    results.save({"format": results.FORMAT, **made}, path)
    assert ranks.table(ranks.load(path), "x") == ranks.table(made, "x")


def test_the_table_and_what_it_says(made):
    text = ranks.table(made, "some/file.json")
    assert "([raw figures](some/file.json))" in text
    assert "after 150 steps" in text
    assert "One seed; learning rate 0.004 and scaling alpha / r with alpha = 32 for all." in text
    assert "The NF4 base has 2.0000, its 16-bit weights 1.7500." in text
    rows = [
        "| adapters on | r = 1 | r = 4 |",
        "|---|---|---|",
        "| q_proj | 1.9000 (2,048) | 1.8000 (8,192) |",
        "| q_proj and v_proj | 1.7000 (4,096) | 1.6000 (16,384) |",
        "| all linear layers | 1.5000 (19,712) | **1.0000** (78,848) |",
    ]
    assert "\n".join(rows) in text
    assert (
        "The lowest loss is that of all linear layers with r = 4, 1.0000 below the NF4 base; of that reduction r = 1 "
        "reaches 10.0% on q_proj, 30.0% on q_proj and v_proj, 50.0% on all linear layers; r = 4 reaches 20.0%, 40.0%, "
        "100.0%.\nA training took 1.2 to 1.2 s, at 4,321 to 4,321 tokens/s."
    ) in text


def test_half_a_table_says_nothing_of_it(made):
    made["cases"][0]["contenders"][1] = {"name": "q_proj and v_proj", "failed": "out of luck"}
    text = ranks.table(made, "x")
    assert "| q_proj and v_proj | failed | 1.6000 (16,384) |" in text
    assert text.endswith("\n\n5 of 6 trainings.")
    with pytest.raises(ValueError, match="x lacks rank_study"):
        ranks.table({**made, "cases": []}, "x")


def test_adapters_that_do_not_help_are_not_praised(made):
    for case in made["cases"]:
        for one in case["contenders"]:
            one["loss"] = 2.5
    assert ranks.table(made, "x").endswith("No adapter lowers the held-out loss of the NF4 base.")
