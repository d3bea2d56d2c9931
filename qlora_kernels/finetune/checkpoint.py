"""The checkpoint of a run: one file, replaced atomically, so that a kill leaves the old one or the new one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..errors import InputError, sentence
from ..storage.digest import digest
from ..storage.formats import save_torch
from ..storage.regular_file import open_regular
from ..storage.torch_file import ForeignContents, load_torch
from .options import Settings

NAME = "checkpoint.pt"
_FORMAT = "qlora_kernels.finetune/2"
_PARAMETERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Checkpoint:
    """Where a run stands.

    Attributes:
        options: the settings that decide its numbers.
        identity: digests of the data and the base model.
        phase: the phase in progress or just finished.
        step: optimizer steps done in it, from which the position in the data follows.
        total: its number of steps.
        losses: training loss of each step done.
        tensors: trainable tensors by name.
        optimizer: the optimizer's state_dict.
        rng: states of torch's generators.
        seconds: time spent in this phase.
        results: results of finished phases.
    """

    options: dict[str, Any]
    identity: dict[str, str]
    phase: str
    step: int
    total: int
    losses: list[float]
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, torch.Tensor]
    seconds: float
    results: dict[str, Any] = field(default_factory=dict)


_FIELDS = {f.name for f in fields(Checkpoint)}


def path_in(out: str) -> str:
    return os.path.join(out, NAME)


def save(checkpoint: Checkpoint, out: str) -> None:
    """Writes ``out/checkpoint.pt``, whole or not at all."""
    value = dict(vars(checkpoint))
    save_torch({"format": _FORMAT, "sha256": digest(value), **value}, path_in(out))


def load(out: str) -> Checkpoint:
    """Reads ``out/checkpoint.pt``.

    Raises:
        InputError: when there is none, or the file is damaged or foreign.
    """
    path = path_in(out)
    if not os.path.isfile(path):
        finished = os.path.isfile(os.path.join(out, "metrics.json"))
        why = "the run there has finished" if finished else "no run was interrupted there"
        raise InputError(f"--resume: there is no {path}; {why}")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            value = load_torch(file)
    except ForeignContents as error:
        raise InputError(f"--resume: {path} holds what no run saves ({sentence(error)})") from None
    except Exception as error:  # of a damaged file the unpickler raises whatever its bytes happen to lead to
        raise InputError(f"--resume: {path} is not a whole checkpoint ({sentence(error)})") from None
    if not isinstance(value, dict) or value.pop("format", None) != _FORMAT or set(value) != _FIELDS | {"sha256"}:
        raise InputError(f"--resume: {path} is not a checkpoint of this command")
    saved_digest = value.pop("sha256")
    try:
        intact = saved_digest == digest(value, size)
    except Exception as error:  # tensors without memory, lists that hold themselves: whatever was put into the file
        raise InputError(f"--resume: {path} holds what no run saves ({sentence(error)})") from None
    if not intact:
        raise InputError(f"--resume: {path} is damaged: its contents do not have the digest that was written with them")
    checkpoint = Checkpoint(**value)
    wrong = [name for name, fits in _fits(checkpoint).items() if not fits]
    if wrong:
        raise InputError(f"--resume: {path} is not a checkpoint of this command: {wrong[0]} is not what a run saves")
    return checkpoint


def _fits(checkpoint: Checkpoint) -> dict[str, bool]:
    """Whether each field is one that a run could have saved. A digest says that a file is whole, not who wrote it."""
    c = checkpoint
    return {
        "options": _is_dict(c.options, (str, int, float, bool, list, tuple, type(None))),
        "identity": _is_dict(c.identity, str),
        "phase": isinstance(c.phase, str),
        "step": _is_count(c.step) and isinstance(c.losses, list) and c.step == len(c.losses),
        "total": _is_count(c.total) and _is_count(c.step) and c.step <= c.total,
        "losses": _are_losses(c.losses),
        "tensors": _is_dict(c.tensors, torch.Tensor) and all(map(_is_parameter, c.tensors.values())),
        "optimizer": isinstance(c.optimizer, dict),
        "rng": _is_dict(c.rng, torch.Tensor) and all(map(_is_dense, c.rng.values())),
        "seconds": _is_amount(c.seconds),
        "results": _is_dict(c.results, dict)
        and all(_is_result(name, result) for name, result in c.results.items())
        and ("qlora" not in c.results or "nf4" in c.results),
    }


def _is_result(name: str, result: dict[Any, Any]) -> bool:
    """Whether a phase's result has what the rest of the run and its report read."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "loss": _is_number,
        "seconds": _is_amount,
        "peak": lambda value: value is None or _is_amount(value),
    }
    if name in ("qlora", "lora16", "full"):
        kinds |= {
            "losses": _are_losses,
            "steps": _is_count,
            "trainable": _is_count,
            "tokens_per_second": _is_amount,
            "memory_method": _is_text,
        }
    if name in ("nf4", "qlora"):
        kinds["sample"] = _is_text
    whole = all(key in result and fits(result[key]) for key, fits in kinds.items())
    return whole and ("steps" not in kinds or result["steps"] == len(result["losses"]))


def _is_dict(value: Any, of: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, of) for k, v in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_amount(value)


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(loss) and math.isfinite(loss) for loss in value)


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a trained parameter could be this tensor."""
    return tensor.dtype in _PARAMETERS and _is_dense(tensor) and bool(tensor.isfinite().all())


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.is_contiguous()


def check_same_run(checkpoint: Checkpoint, settings: Settings, identity: dict[str, str]) -> None:
    """Refuses to resume with other settings, data or model than the run began with.

    Raises:
        InputError: naming the differences.
    """
    differences = settings.differences(checkpoint.options)
    differences += [
        f"the {name} differs" for name, digest in identity.items() if checkpoint.identity.get(name, digest) != digest
    ]
    if differences:
        raise InputError(f"--resume: this is not the run that was interrupted: {'; '.join(differences)}")


def restore_tensors(checkpoint: Checkpoint, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Copies the saved tensors into a model's parameters, after checking that each fits.

    Raises:
        InputError: when they are another model's.
    """
    saved = checkpoint.tensors
    odd = sorted(set(saved) ^ set(parameters))
    if odd:
        where = "the checkpoint" if odd[0] in saved else "the model"
        raise InputError(f"--resume: the checkpoint is of another model: only {where} has {odd[0]}")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise InputError(
                f"--resume: the checkpoint is of another model: {name} is {list(saved[name].shape)} there "
                f"and {list(parameter.shape)} here"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def rng_state(device: str) -> dict[str, torch.Tensor]:
    """The states of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, torch.Tensor], device: str) -> None:
    """Sets torch's generators to saved states.

    Raises:
        InputError: when these are not states of a generator.
    """
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and device.startswith("cuda"):
            torch.cuda.set_rng_state(states["cuda"], device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"--resume: the checkpoint's random state cannot be used ({sentence(error)})") from None
