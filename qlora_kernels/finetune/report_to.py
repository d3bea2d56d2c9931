"""Losses and rates for TensorBoard and wandb, through the callbacks that transformers has for them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from ..console.quiet import quiet_transformers
from ..errors import InputError, sentence
from .options import Settings

# What a callback's class is called in transformers.integrations, and the package that it needs.
_CALLBACKS = {"tensorboard": ("TensorBoardCallback", "tensorboard"), "wandb": ("WandbCallback", "wandb")}


def check_trackers(settings: Settings) -> None:
    """Checks that what ``--report-to`` names is installed and can be used.

    Raises:
        InputError: naming the package, or the setting, that is in the way.
    """
    for name in settings.trackers():
        package = _CALLBACKS[name][1]
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(f"--report-to {name} needs the package '{package}': pip install {package}") from None
    if "wandb" in settings.trackers() and os.environ.get("WANDB_LOG_MODEL", "false").lower() not in ("false", "0", ""):
        raise InputError(
            "WANDB_LOG_MODEL cannot be used here, since no transformers Trainer holds the model; unset it, and upload "
            "the adapter from the output folder"
        )


class Reporter:
    """Sends scalars to what ``--report-to`` names; does nothing when that is none.

    A tracker that fails while the run goes on is left out from then on, with a note: no training is lost to it.

    Args:
        settings: of the run.
        note: prints a line.
    """

    def __init__(self, settings: Settings, note: Callable[[str], None]) -> None:
        self._note = note
        self._callbacks: dict[str, Any] = {}
        self._open = False
        if not settings.trackers():
            return
        from transformers import TrainerControl, TrainerState

        self._arguments, self._state, self._control = _Arguments(settings), TrainerState(), TrainerControl()
        for name in settings.trackers():
            with quiet_transformers():
                integrations = importlib.import_module("transformers.integrations")
                try:
                    self._callbacks[name] = getattr(integrations, _CALLBACKS[name][0])()
                except Exception as error:
                    raise InputError(f"--report-to {name} cannot be used: {sentence(error)}") from None

    def begin(self, model: nn.Module) -> None:
        """Opens the trackers' runs, before which nothing is sent, with the options and the model's configuration.

        Raises:
            InputError: when one of them cannot, as wandb without a key.
        """
        for name, callback in self._callbacks.items():
            try:
                callback.on_train_begin(self._arguments, self._state, self._control, model=model)
            except Exception as error:
                raise InputError(f"--report-to {name} cannot be used: {sentence(error)}") from None
        self._open = True

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Sends scalars of a step. Names that begin with "eval_" become "eval/…" there, and others "train/…"."""
        if self._callbacks and self._open:
            self._state.global_step = step
            self._call("on_log", logs=scalars)

    def end(self) -> None:
        """Closes what the trackers have open."""
        if self._open:
            self._call("on_train_end")
        self._callbacks = {}

    def _call(self, method: str, **more: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                getattr(callback, method)(self._arguments, self._state, self._control, **more)
            except Exception as error:
                del self._callbacks[name]
                self._note(f"--report-to {name} has failed, and the run goes on without it: {sentence(error)}")


class _Arguments:
    """What the callbacks read of transformers' TrainingArguments, which themselves need accelerate."""

    def __init__(self, settings: Settings) -> None:
        self.output_dir = settings.out
        self.run_name = os.path.basename(os.path.normpath(settings.out))
        self._values = asdict(settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._values)

    def to_json_string(self) -> str:
        return json.dumps(self._values, indent=2)
