"""The rank study: what differs between its cells and what does not, studies that are cut, and its report."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest

pytest.importorskip("transformers")

from small.runs import cache_fixture  # noqa: F401 - a fixture

from bench.studies import ranks
from bench.studies.rank_options import TARGETS
from bench.studies.rank_report import points, with_shares
from qlora_kernels.finetune import source, tiny
from qlora_kernels.finetune.train import Trainer
from qlora_kernels.models.adapters import disable_adapters
from qlora_kernels.models.targets import qlora_layers

# The base is the one that the tests of finetune have in their cache, too.
SMALL = [
    *("--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "32", "--pretrain-steps", "6"),
    *("--steps", "2", "--batch-size", "2", "--eval-tokens", "256", "--ranks", "1,4", "--quiet"),
]
# N, K of the layers of that model.
SHAPES = {
    **{f"self_attn.{name}_proj": (64, 64) for name in "qkvo"},
    **{"mlp.gate_proj": (192, 64), "mlp.up_proj": (192, 64), "mlp.down_proj": (64, 192)},
}
ADAPTED = {
    "q_proj": ["self_attn.q_proj"],
    "q_proj,v_proj": ["self_attn.q_proj", "self_attn.v_proj"],
    "all-linear": list(SHAPES),
}


@pytest.fixture(name="study")
def study_fixture(tmp_path, cache):
    """Runs the command in this process; returns its exit code."""

    def call(*more, out="study.json"):
        return ranks.main([*SMALL, "--cache", cache, "--out", str(tmp_path / out), *more])

    return call


@pytest.fixture(scope="module", name="whole")
def whole_fixture(tmp_path_factory, cache):
    """The result of an uninterrupted study, and each cell's model as seen after its training."""
    path, seen = tmp_path_factory.mktemp("whole") / "study.json", []
    original = ranks.held_out_loss

    def watched(model, *rest):
        layers = dict(qlora_layers(model))
        if layers:
            with disable_adapters(model):
                alone = original(model, *rest)
            trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
            head = type(model.get_submodule("lm_head")).__name__
            seen.append({"layers": list(layers), "trained": trained, "alone": alone, "head": head})
        return original(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "held_out_loss", watched)
        assert ranks.main([*SMALL, "--cache", cache, "--out", str(path)]) == 0
    return json.loads(path.read_text()), seen[1:]  # the first is the base


def without_times(result: dict) -> dict:
    result = {key: value for key, value in result.items() if key != "date"}
    times = ("seconds", "tokens_per_second")
    result["cells"] = [{key: cell[key] for key in cell if key not in times} for cell in result["cells"]]
    return result


# ------------------------------------------------------------------------------------------------------ the cells


def test_adapters_sit_where_they_should_and_everything_is_quantized(whole):
    result, seen = whole
    assert [(c["targets"], c["rank"], c["seed"]) for c in result["cells"]] == [
        (t, r, 0) for t in TARGETS for r in (1, 4)
    ]
    assert result["complete"]
    for cell, model in zip(result["cells"], seen, strict=True):
        prefix = "model.layers.0."
        assert sorted(model["layers"]) == sorted(prefix + name for name in SHAPES)
        assert sorted(result["base"]["quantized_layers"]) == sorted(model["layers"])
        assert model["head"] == "Linear"
        adapted = ADAPTED[cell["targets"]]
        assert model["trained"] == sorted(f"{prefix}{name}.lora_{ab}.default" for name in adapted for ab in "AB")
        assert cell["adapted_layers"] == len(adapted)
        assert cell["trainable"] == sum(cell["rank"] * sum(SHAPES[name]) for name in adapted)


def test_all_cells_have_the_same_base(whole):
    result, seen = whole
    loss = result["base"]["loss"]
    assert loss != result["base"]["loss_16bit"]
    assert loss == pytest.approx(result["base"]["loss_16bit"], rel=0.01)
    # Measured on each cell's model after its training, bit for bit.
    assert {model["alone"] for model in seen} == {cell["loss_before"] for cell in result["cells"]} == {loss}
    assert len({cell["loss"] for cell in result["cells"]}) == 6


def test_a_base_that_is_not_the_same_ends_the_study(study, tmp_path, monkeypatch):
    original = ranks.held_out_loss

    def changed(model, *rest):
        loss = original(model, *rest)
        layers = dict(qlora_layers(model))
        if any(p.requires_grad for p in model.parameters()) and "q_proj, r = 4" in rest[4]:
            layers["model.layers.0.mlp.up_proj"].weight_packed.data[5] ^= 1
        return loss

    monkeypatch.setattr(ranks, "held_out_loss", changed)
    with pytest.raises(RuntimeError, match="q_proj, r = 4: the base is not that of the other cells"):
        study()
    assert len(json.loads((tmp_path / "study.json").read_text())["cells"]) == 1


def test_shares(whole):
    result, _ = whole
    gains = [cell["loss_before"] - cell["loss"] for cell in result["cells"]]
    assert [cell["share"] for cell in result["cells"]] == [gain / max(gains) for gain in gains]
    worse = [{**cell, "loss": cell["loss_before"] + 1} for cell in result["cells"]]
    assert {cell["share"] for cell in with_shares(worse)} == {None}


def test_seeds_repeat_the_study_over_the_same_base(whole, study, tmp_path):
    assert study("--seeds", "2", "--ranks", "4") == 0
    result = json.loads((tmp_path / "study.json").read_text())
    assert result["base"]["digest"] == whole[0]["base"]["digest"]
    losses = {seed: [c["loss"] for c in result["cells"] if c["seed"] == seed] for seed in (0, 1)}
    # A cell's loss is its own: which others there are, and came before, does not change it.
    assert losses[0] == [cell["loss"] for cell in whole[0]["cells"] if cell["rank"] == 4]
    assert not set(losses[0]) & set(losses[1])
    for row, pair in zip(points(result).values(), zip(losses[0], losses[1])):
        assert row[0].loss == pytest.approx(sum(pair) / 2)
        assert row[0].spread == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
    text = ranks.markdown(result, "x.json")
    assert "Means of 2 seeds" in text
    assert text.count(" ± 0.") == 3


def test_cells_differ_in_nothing_but_their_adapters(study, monkeypatch):
    original, phases = Trainer.run, []

    def watched(self, phase, note):
        if phase.name != "pretrain":  # where no earlier test has made the base
            phases.append((self.settings.seed, phase, phase.data.batch(3, 2).inputs.tolist()))
        return original(self, phase, note)

    monkeypatch.setattr(Trainer, "run", watched)
    assert study("--seeds", "2") == 0
    assert [seed for seed, _, _ in phases] == [0] * 6 + [1] * 6
    for seed in (0, 1):
        same = [(p.lr, p.steps, p.batch_size, p.warmup, batch) for s, p, batch in phases if s == seed]
        assert all(other == same[0] for other in same)
        assert same[0][:3] == (4e-3, 2, 2)
    assert phases[0][2] != phases[-1][2]


# ---------------------------------------------------------------------------------------------- to be gone on with


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_was_cut_ends_with_the_same_result(study, whole, tmp_path, monkeypatch, capsys, signum):
    step, run, titles = Trainer._step, Trainer.run, []

    def interrupted(self, phase, *rest):
        if phase.title.startswith("3 of 6"):
            os.kill(os.getpid(), signum)
        return step(self, phase, *rest)

    def counted(self, phase, note):
        titles.append(phase.title)
        return run(self, phase, note)

    path = tmp_path / "study.json"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert study() == 128 + signum
    error = capsys.readouterr().err
    assert f"{signum.name}: stopped; {path} keeps 2 of 6 cells, and the same command goes on" in error
    cut = json.loads(path.read_text())
    assert not cut["complete"]
    assert len(cut["cells"]) == 2
    assert ranks.markdown(cut, "x.json").endswith("Unfinished: 2 of 6 cells.")
    monkeypatch.setattr(Trainer, "run", counted)
    assert study() == 0
    assert [title.partition(":")[0] for title in titles] == ["3 of 6", "4 of 6", "5 of 6", "6 of 6"]
    result = json.loads(path.read_text())
    assert without_times(result) == without_times(whole[0])
    assert [cell["seconds"] for cell in result["cells"][:2]] == [cell["seconds"] for cell in cut["cells"]]
    assert os.listdir(tmp_path) == ["study.json"]


def test_a_study_that_starts_over_and_is_cut_says_how_to_go_on(study, whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "study.json").write_text(json.dumps(whole[0]))
    step = Trainer._step

    def interrupted(self, phase, *rest):
        if phase.title.startswith("2 of 6"):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, phase, *rest)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    assert study("--restart") == 130
    assert "keeps 1 of 6 cells, and the same command without --restart goes on" in capsys.readouterr().err


def test_a_finished_study_is_not_run_again(study, whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "study.json").write_text(json.dumps(whole[0]))
    monkeypatch.setattr(source.Source, "load", lambda _: pytest.fail("the base was loaded"))
    assert study() == 0
    assert capsys.readouterr().out.strip() == ranks.markdown(whole[0], str(tmp_path / "study.json"))


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (("--steps", "3"), "steps was 2 and is 3"),
        (("--ranks", "1,2,4"), "ranks was [1, 4] and is [1, 2, 4]"),
        (("--alpha", "16", "--lr", "1e-3"), "alpha was 32.0 and is 16.0; lr was 0.004 and is 0.001"),
        (("--rslora",), "rslora was False and is True"),
    ],
)
def test_other_settings_are_refused(study, whole, tmp_path, capsys, flags, phrase):
    path = tmp_path / "study.json"
    path.write_text(json.dumps(whole[0]))
    before = path.read_bytes()
    assert study(*flags) == 2
    error = capsys.readouterr().err
    assert f"{path} holds cells that were made otherwise: {phrase}; name another file, or start over" in error
    assert error.count("\n") == 1
    assert path.read_bytes() == before


def test_cells_of_another_base_are_refused_unless_the_study_starts_over(study, whole, tmp_path, capsys):
    other = copy.deepcopy(whole[0])
    other["base"]["digest"], other["complete"] = "0", False
    del other["cells"][3:]
    path = tmp_path / "study.json"
    path.write_text(json.dumps(other))
    assert study() == 2
    assert f"--out {path} holds cells of another base" in capsys.readouterr().err
    assert json.loads(path.read_text()) == other
    assert study("--restart") == 0
    assert without_times(json.loads(path.read_text())) == without_times(whole[0])


def test_cells_of_another_commit_or_machine_are_refused(study, whole, tmp_path, capsys):
    other = copy.deepcopy(whole[0])
    other["commit"], other["machine"]["cpu"], other["versions"]["torch"] = "abc", "Z80", "1.0"
    (tmp_path / "study.json").write_text(json.dumps(other))
    assert study() == 2
    error = capsys.readouterr().err
    assert all(phrase in error for phrase in ("commit was abc and is", "cpu was Z80 and is", "torch was 1.0 and is"))


@pytest.mark.parametrize("text", ["{}", "[1]", "not JSON", '{"study": "rank_study", "format": 1, "cells": [{}]}'])
def test_files_of_others_are_left_alone(study, tmp_path, capsys, text):
    path = tmp_path / "study.json"
    path.write_text(text)
    assert study("--restart") == 2
    assert f"--out {path} is there and no result of this study" in capsys.readouterr().err
    assert path.read_text() == text


# ------------------------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (("--ranks", "1,x"), "--ranks should be numbers with commas between them, found 1,x"),
        (("--ranks", "0,1"), "--ranks should be numbers from 1 on, each of them once, found 0,1"),
        (("--ranks", "2,2"), "found 2,2"),
        (("--ranks", "1,65"), "rank 65"),
        (("--seeds", "0"), "--seeds should be at least 1, found 0"),
        (("--steps", "0"), "--steps should be positive, found 0"),
        (("--tiny-hidden", "65"), "--tiny-hidden should be a multiple of 64"),
        (("--cache", "/dev/null"), "the folder /dev/null cannot be written"),
        (("--out", "/dev/null/x/y"), "the folder /dev/null/x cannot be written"),
        (("--out", os.sep), "it should be a file, and is a folder"),
        (("--plot", "/nowhere/x.png"), "--plot /nowhere/x.png cannot be written: there is no such folder"),
    ],
)
def test_wrong_arguments_are_one_sentence(study, tmp_path, monkeypatch, capsys, flags, phrase):
    monkeypatch.setattr(tiny, "pretrain", lambda *_: pytest.fail("pretraining has begun"))
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("training has begun"))
    assert study(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("rank_study: ")
    assert phrase in error
    assert error.count("\n") == 1
    assert not os.listdir(tmp_path)


# --------------------------------------------------------------------------------------------------- the report


@pytest.fixture(name="made")
def made_fixture(whole) -> dict:
    """A result with figures that are easily checked: the base has 2.0."""
    result = copy.deepcopy(whole[0])
    result["base"]["loss"], result["base"]["loss_16bit"] = 2.0, 1.75
    for cell, loss in zip(result["cells"], (1.9, 1.8, 1.7, 1.6, 1.5, 1.0), strict=True):
        cell["loss_before"], cell["loss"], cell["seconds"], cell["tokens_per_second"] = 2.0, loss, 1.25, 4321.0
    return result


def test_the_table_and_what_it_says(made):
    text = ranks.markdown(made, "some/file.json")
    assert "([raw figures](some/file.json))" in text
    assert "after 2 steps" in text
    assert "One seed; learning rate 0.004 and scaling alpha / r with alpha = 32 for all." in text
    assert "The NF4 base has 2.0000, its 16-bit weights 1.7500." in text
    table = [
        "| adapters on | r = 1 | r = 4 |",
        "|---|---|---|",
        "| q_proj | 1.9000 (128) | 1.8000 (512) |",
        "| q_proj and v_proj | 1.7000 (256) | 1.6000 (1,024) |",
        "| all linear layers | 1.5000 (1,280) | **1.0000** (5,120) |",
    ]
    assert "\n".join(table) in text
    assert (
        "The lowest loss is that of all linear layers with r = 4, 1.0000 below the NF4 base; of that reduction r = 1 "
        "reaches 10.0% on q_proj, 30.0% on q_proj and v_proj, 50.0% on all linear layers; r = 4 reaches 20.0%, 40.0%, "
        "100.0%.\nTraining took 1.2 to 1.2 s a cell, at 4,321 to 4,321 tokens/s."
    ) in text


def test_adapters_that_do_not_help_are_not_praised(made):
    for cell in made["cells"]:
        cell["loss"] = 2.5
    assert ranks.markdown(made, "x").endswith("No adapter lowers the held-out loss of the NF4 base.")
    made["cells"], made["complete"] = [], False
    assert ranks.markdown(made, "x").endswith("| all linear layers |  |  |\n\nUnfinished: 0 of 6 cells.")


@pytest.mark.parametrize("cells", [6, 3, 0])
def test_the_plot_names_its_source(made, tmp_path, cells):
    from PIL import Image

    made["cells"] = made["cells"][:cells]
    ranks.plot(made, tmp_path / "ranks.png", "some/file.json")
    with Image.open(tmp_path / "ranks.png") as image:
        assert image.text["Source"] == f"some/file.json {made['date']}"
        assert image.size[0] > 600


def test_what_is_drawn(made, tmp_path, monkeypatch):
    """A line for each set of layers, with its losses over the ranks, and the base."""
    from matplotlib.figure import Figure

    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
    ranks.plot(made, tmp_path / "ranks.png", "x.json")
    [axes] = figures[0].axes
    assert axes.get_xscale() == "log"
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for c in axes.containers for line in c.lines[:1]]
    assert drawn == [([1, 4], [1.9, 1.8]), ([1, 4], [1.7, 1.6]), ([1, 4], [1.5, 1.0])]
    [dashed] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert set(dashed.get_ydata()) == {2.0}
    assert len(axes.get_legend().get_texts()) == 4
