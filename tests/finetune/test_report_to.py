"""--report-to: what goes to TensorBoard and wandb."""

from __future__ import annotations

import json
import sys
import types

import pytest

pytest.importorskip("transformers")

from small.runs import SMALL, cache_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures
from transformers.integrations import integration_utils

from qlora_kernels.errors import InputError
from qlora_kernels.finetune import report_to
from qlora_kernels.finetune.options import Options


class Writer:
    """Stands in for tensorboard's SummaryWriter."""

    made: list[Writer]

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.scalars, self.texts, self.closed = log_dir, [], {}, False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step, value))

    def add_text(self, name, text, step=None):
        self.texts[name] = text

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    """The writers that are made, in place of tensorboard's."""
    Writer.made = []
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Writer.made


def test_losses_and_rates_go_out(run, writers, tmp_path):
    assert run("--report-to", "tensorboard", "--compare") == 0
    [writer] = writers
    assert writer.closed
    assert writer.log_dir.startswith(str(tmp_path / "out" / "runs"))
    assert json.loads(writer.texts["args"])["rank"] == 4
    assert json.loads(writer.texts["model_config"])["model_type"] == "llama"
    results = metrics(tmp_path / "out")["results"]

    def sent(name: str) -> list[tuple[int, float]]:
        return [(step, value) for key, step, value in writer.scalars if key == name]

    assert sent("train/loss") == list(enumerate(losses(tmp_path / "out")["qlora"], 1))
    assert sent("train/full_loss") == list(enumerate(results["full"]["losses"], 1))
    assert sent("eval/loss") == [(6, results["qlora"]["loss"])]
    assert sent("eval/nf4_loss") == [(0, results["nf4"]["loss"])]
    assert sent("eval/base16_loss") == [(0, results["base16"]["loss"])]
    rates = [value for _, value in sent("train/learning_rate")]
    assert len(rates) == 6
    assert max(rates) == pytest.approx(4e-3, rel=0.2)
    assert all(value > 0 for _, value in sent("train/tokens_per_second"))


def test_a_tracker_that_fails_stops_no_run(run, writers, tmp_path, monkeypatch, capsys):
    def add_scalar(self, name, value, step):
        if step == 3:
            raise OSError("no space left")
        self.scalars.append((name, step, value))

    monkeypatch.setattr(Writer, "add_scalar", add_scalar)
    small = [word for word in SMALL if word != "--quiet"]
    assert run("--report-to", "tensorboard", small=small) == 0
    assert len(losses(tmp_path / "out")["qlora"]) == 6
    assert (
        "--report-to tensorboard has failed, and the run goes on without it: no space left" in capsys.readouterr().out
    )
    assert max(step for _, step, _ in writers[0].scalars) == 2


def test_off_by_default(run, writers):
    assert run() == 0
    assert writers == []


def test_what_is_not_installed_is_named_before_anything_happens(run, tmp_path, monkeypatch, capsys):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        assert run("--report-to", name) == 2
        assert f"--report-to {name} needs the package '{name}': pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["", ",", "mlflow", "none,wandb"])
def test_names_that_are_not_known(value):
    with pytest.raises(InputError, match="--report-to should be none, or names among tensorboard, wandb"):
        Options(report_to=value).resolve()


def test_models_are_not_uploaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(InputError, match="WANDB_LOG_MODEL cannot be used here"):
        report_to.check_trackers(Options(report_to="wandb").resolve())


def test_the_real_tensorboard(run, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert run("--report-to", "tensorboard") == 0
    [folder] = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    sent = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert sent == [(step, pytest.approx(loss)) for step, loss in enumerate(losses(tmp_path / "out")["qlora"], 1)]


@pytest.mark.slow
def test_the_real_wandb(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_LOG_MODEL", raising=False)
    assert run("--report-to", "wandb") == 0
    assert wandb.run.name == "out"
    assert wandb.run.config["rank"] == 4
    last = losses(tmp_path / "out")["qlora"][-1]
    assert wandb.run.summary["train/loss"] == pytest.approx(last)
    wandb.finish()
