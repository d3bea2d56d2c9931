"""The rank study: what differs between its trainings and what does not, and what is shown of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from bench_runs.cases import TINY, limits_case, measured
from small.runs import cache_fixture  # noqa: F401 - a fixture

from qlora_kernels.bench import command
from qlora_kernels.bench.operations import begin, rank_study
from qlora_kernels.bench.operations.rank_study import TARGETS
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import plots, results, table
from qlora_kernels.bench.report.losses import study_of
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.finetune.train import Trainer
from qlora_kernels.models.adapters import disable_adapters
from qlora_kernels.models.targets import qlora_layers

# The base is the one that the tests of finetune have in their cache, too.
SMALL = {
    **{"tiny_hidden": 64, "tiny_layers": 1, "tiny_seq_len": 32, "pretrain_steps": 6},
    **{"steps": 2, "batch_size": 2, "eval_tokens": 256},
}
RANKS = (1, 4)
# N, K of the layers of that model.
SHAPES = {
    **{f"self_attn.{name}_proj": (64, 64) for name in "qkvo"},
    **{"mlp.gate_proj": (192, 64), "mlp.up_proj": (192, 64), "mlp.down_proj": (64, 192)},
}
ADAPTED = {
    "q_proj": ["self_attn.q_proj"],
    "q_proj and v_proj": ["self_attn.q_proj", "self_attn.v_proj"],
    "all linear layers": list(SHAPES),
}


@pytest.fixture(scope="module", name="small")
def small_fixture(cache):
    """The study with the small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_study, "TRAINING", replace(rank_study.TRAINING, **SMALL))
        patch.setattr(rank_study, "CACHE", cache)
        yield


@pytest.fixture(scope="module", name="whole")
def whole_fixture(small):
    """The result of a study, and each model as seen after its training."""
    seen, original = [], rank_study.held_out_loss

    def watched(model, *rest):
        layers = dict(qlora_layers(model))
        if layers:
            with disable_adapters(model):
                alone = original(model, *rest)
            seen.append(
                {
                    "layers": list(layers),
                    "trained": sorted(name for name, p in model.named_parameters() if p.requires_grad),
                    "alone": alone,
                    "head": type(model.get_submodule("lm_head")).__name__,
                }
            )
        return original(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_study, "held_out_loss", watched)
        cases = [measured(Point("rank_study", rank=rank)) for rank in RANKS]
    count = len(TARGETS) + 1  # the first of each case is the base
    assert len(seen) == count * len(RANKS)
    result = {**results.begin(TINY, "usual"), "complete": True, "cases": [limits_case(), *cases]}
    return result, [model for index, model in enumerate(seen) if index % count]


def trainings(result: dict) -> list[tuple[dict, dict]]:
    """(case, contender) of each."""
    return [(case, one) for case in result["cases"][1:] for one in case["contenders"]]


# -------------------------------------------------------------------------------------------------- the trainings


def test_adapters_sit_where_they_should_and_everything_is_quantized(whole):
    result, seen = whole
    assert [(case["rank"], one["name"]) for case, one in trainings(result)] == [(r, t) for r in RANKS for t in TARGETS]
    for (case, one), model in zip(trainings(result), seen, strict=True):
        prefix = "model.layers.0."
        assert sorted(model["layers"]) == sorted(prefix + name for name in SHAPES)
        assert sorted(case["base"]["quantized_layers"]) == sorted(model["layers"])
        assert model["head"] == "Linear"
        adapted = ADAPTED[one["name"]]
        assert model["trained"] == sorted(f"{prefix}{name}.lora_{ab}.default" for name in adapted for ab in "AB")
        assert one["adapted_layers"] == len(adapted)
        assert one["trainable"] == sum(case["rank"] * sum(SHAPES[name]) for name in adapted)
        assert one["median_ms"] == pytest.approx(1e3 * one["seconds"] / 2)


def test_all_trainings_have_the_same_base(whole):
    result, seen = whole
    first, second = (case["base"] for case in result["cases"][1:])
    assert first == second
    assert first["loss"] != first["loss_16bit"]
    assert first["loss"] == pytest.approx(first["loss_16bit"], rel=0.01)
    # Measured on each model after its training, bit for bit.
    assert {model["alone"] for model in seen} == {first["loss"]}
    assert len({one["loss"] for _, one in trainings(result)}) == 6


def test_a_base_that_is_not_the_same_ends_the_case(small, monkeypatch):
    original = rank_study.held_out_loss
    study = begin(TINY, Point("rank_study", rank=4))

    def changed(model, *rest):
        loss = original(model, *rest)
        dict(qlora_layers(model))["model.layers.0.mlp.up_proj"].weight_packed.data[5] ^= 1
        return loss

    study.round()
    monkeypatch.setattr(rank_study, "held_out_loss", changed)
    with pytest.raises(RuntimeError, match="q_proj and v_proj: the base is not that of the other trainings"):
        study.round()


def test_trainings_differ_in_nothing_but_their_adapters(small, monkeypatch):
    original, phases = Trainer.run, []

    def watched(self, phase, note):
        if phase.name != "pretrain":  # where no earlier test has made the base
            phases.append((self.settings.seed, phase, phase.data.batch(3, 2).inputs.tolist()))
        return original(self, phase, note)

    monkeypatch.setattr(Trainer, "run", watched)
    for rank in RANKS:
        measured(Point("rank_study", rank=rank))
    same = [(seed, p.lr, p.steps, p.batch_size, p.warmup, batch) for seed, p, batch in phases]
    assert len(same) == 6
    assert all(other == same[0] for other in same)
    assert same[0][:4] == (0, 4e-3, 2, 2)


def test_a_rank_that_does_not_fit(small):
    with pytest.raises(InputError, match="rank 65"):
        begin(TINY, Point("rank_study", rank=65))


# ---------------------------------------------------------------------------------------------------- the command


def test_its_points(capsys):
    assert main(["bench", "--operations", "rank_study", "--list"]) == 0
    ranks = [f"rank_study, r = {rank}" for rank in (1, 2, 4, 8, 64)]
    assert capsys.readouterr().out.splitlines() == ["limits", *ranks]
    assert main(["bench", "--operations", "rank_study", "--ranks", "0,3", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["limits", "rank_study, r = 3"]
    assert main(["bench", "--operations", "rank_study", "--ranks", "0"]) == 2
    assert "rank_study needs an adapter" in capsys.readouterr().err


def test_the_command_writes_shows_and_draws_it(whole, tmp_path, capsys, monkeypatch):
    cases = {case["rank"]: case for case in whole[0]["cases"]}

    class Here:
        deadline = None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def measure(self, point, settings, progress, without):
            return cases[point.rank]

    monkeypatch.setattr(command, "Worker", Here)
    path = tmp_path / "x.jsonl"
    assert main(["bench", "--operations", "rank_study", "--ranks", "1,4", "--quiet", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "held-out loss after 2 steps, nats per byte" in shown
    assert "the worst first" not in shown  # this package alone: nothing to compare
    assert results.load(path)["cases"] == json.loads(json.dumps(whole[0]["cases"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-loss.png", "x.jsonl"]
    assert main(["bench", "--show", str(path)]) == 0
    assert capsys.readouterr().out in shown


# ----------------------------------------------------------------------------------------------------- the report


@pytest.fixture(name="made")
def made_fixture(whole) -> dict:
    """A result with figures that are easily checked: the base has 2.0."""
    result = copy.deepcopy(whole[0])
    losses = iter((1.9, 1.7, 1.5, 1.8, 1.6, 1.0))
    for case, one in trainings(result):
        case["base"] |= {"loss": 2.0, "loss_16bit": 1.75}
        one |= {"loss": next(losses), "seconds": 1.25, "tokens_per_second": 4321.0}
    return result


def test_the_terminals_table(made):
    lines = table.terminal(made).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("held-out loss"))
    assert [line.split()[-2:] for line in lines[start + 1 : start + 4]] == [
        ["1.9000", "1.8000"],
        ["1.7000", "1.6000"],
        ["1.5000", "1.0000"],
    ]
    assert lines[start + 4] == "The NF4 base has 2.0000, its 16-bit weights 1.7500."


@pytest.mark.parametrize("change", [{"base": {"digest": "0"}}, {"training": {"lr": 1.0}}])
def test_trainings_that_differ_in_more_are_not_compared(made, change):
    for name, values in change.items():
        made["cases"][1][name] |= values
    with pytest.raises(ValueError, match="differ in more than their adapters"):
        study_of(made)
    assert "No table of losses: the trainings differ in more" in table.terminal(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda case: case.pop("base"), "case 2 has no 'base'"),
        (lambda case: case["base"].update(loss="2"), "case 2, its base: 'loss' should not be"),
        (lambda case: case["training"].pop("steps"), "case 2, its training has no 'steps'"),
        (lambda case: case["contenders"][0].update(loss=None), "'loss' should not be null"),
    ],
)
def test_damaged_losses_are_refused(made, tmp_path, change, words):
    change(made["cases"][1])
    results.save(made, tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=words):
        results.load(tmp_path / "x.jsonl")


def test_what_is_drawn(made, tmp_path, monkeypatch):
    """A line for each set of layers, with its losses over the ranks, and the base."""
    from matplotlib.figure import Figure
    from PIL import Image

    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
    assert plots.draw(made, "loss", tmp_path / "loss.png", "some/file.jsonl")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.text["Source"] == "some/file.jsonl"
    [axes] = figures[0].axes
    assert axes.get_xscale() == "log"
    *drawn, dashed = axes.lines
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn] == [
        ([1, 4], [1.9, 1.8]),
        ([1, 4], [1.7, 1.6]),
        ([1, 4], [1.5, 1.0]),
    ]
    assert dashed.get_linestyle() == "--"
    assert set(dashed.get_ydata()) == {2.0}
    assert len(axes.get_legend().get_texts()) == 4


def test_a_set_of_layers_that_failed_is_shown_as_such(made, tmp_path):
    for case in made["cases"][1:]:
        case["contenders"][1] = {"name": "q_proj and v_proj", "failed": "out of luck"}
    assert plots.draw(made, "loss", tmp_path / "loss.png", "x")
    [line] = [line for line in table.terminal(made).splitlines() if "adapters on q_proj and v_proj" in line]
    assert line.split()[-2:] == ["failed", "failed"]
