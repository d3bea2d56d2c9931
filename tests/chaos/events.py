"""One event after another: a command begins, something happens to it, and what is left is judged."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked

from .mischief import Mischief, limit_file_size, watch
from .targets import TARGETS

_NONE = Mischief("none")
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_NEED_MODEL = ("finetune", "quantize")
_PATIENCE = 120.0  # seconds that a command may take


class Broken(AssertionError):
    """What an event left is not as it should be."""


@dataclass(frozen=True)
class Usual:
    """An undisturbed run: its seconds, its calls of the system, the bytes of its files, and its outcome."""

    seconds: float
    calls: int
    nbytes: int
    largest: int
    result: Any


def _perform(
    run: Callable[[str, str], int], folder: str, given: str, mischief: Mischief, usual: tuple[int, int], state: str
) -> int:
    """In a process of its own. ``state`` says how far it is; the count of calls goes there at the end."""
    import torch

    torch.set_num_threads(1)
    calls, largest = usual
    if mischief.kind == "file size":
        limit_file_size(max(int(mischief.at * largest), 4096))  # stderr, which is a file, needs some too
    count = watch(folder, mischief, calls)
    with open(f"{state}.begun", "w"):
        pass
    code = run(folder, given)
    for number in _SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    if mischief.kind == "none":
        Path(f"{state}.calls").write_text(str(count[0]))
    return code


class Chaos:
    """Makes events for a seed.

    Args:
        root: an empty folder for everything.
        seed: decides what happens.
        only: the names of targets; all by default.
    """

    def __init__(self, root: str | os.PathLike, seed: int, only: tuple[str, ...] = ()) -> None:
        self.root, self.seed = os.fspath(root), seed
        self.targets = only or tuple(TARGETS)
        self.given = os.path.join(self.root, "given")
        self.usual: dict[str, Usual] = {}
        self._processes = 0

    # --------------------------------------------------------------------------------------------- processes

    def _start(self, target: str, folder: str, mischief: Mischief) -> tuple[BaseProcess, str]:
        self._processes += 1
        state = os.path.join(self.root, f"state-{self._processes}")
        usual = self.usual.get(target)
        known = (usual.calls, usual.largest) if usual else (0, 0)
        process = forked.start(
            _perform, TARGETS[target].run, folder, self.given, mischief, known, state, errors=Path(f"{state}.stderr")
        )
        while not os.path.exists(f"{state}.begun") and process.is_alive():
            time.sleep(0.002)
        return process, state

    def _end(self, process: BaseProcess, state: str) -> tuple[int, str]:
        process.join(_PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise Broken(f"it hangs; it said: {Path(f'{state}.stderr').read_text()}")
        return process.exitcode, Path(f"{state}.stderr").read_text()

    def _run(self, target: str, folder: str) -> str:
        """An undisturbed run, which must succeed."""
        process, state = self._start(target, folder, _NONE)
        code, said = self._end(process, state)
        if code or "Traceback" in said:
            raise Broken(f"an undisturbed run ends with {code}: {said}")
        return state

    def learn(self, target: str) -> Usual:
        """What an undisturbed run does, once per target."""
        if target not in self.usual:
            if target in _NEED_MODEL and not os.path.exists(self.given):
                _make_model(os.path.join(self.given, "model"))
            folder = os.path.join(self.root, "folder")
            os.mkdir(folder)
            began = time.monotonic()
            state = self._run(target, folder)
            sizes = [p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()]
            self.usual[target] = Usual(
                seconds=time.monotonic() - began,
                calls=int(Path(f"{state}.calls").read_text()),
                nbytes=sum(sizes),
                largest=max(sizes),
                result=json.loads(json.dumps(TARGETS[target].result(folder))),
            )
            assert self.usual[target].result is not None
            shutil.rmtree(folder)
        return self.usual[target]

    # --------------------------------------------------------------------------------------------- events

    def draw(self, number: int) -> tuple[str, list[Mischief]]:
        """What happens in an event, from the seed alone: up to three attempts are disturbed, then one is not."""
        chance = random.Random(f"{self.seed}/{number}")
        target = chance.choice(self.targets)
        kinds = ("signal", "signal at", "signal at", "error at", "error at", "file size", "full disk", "two")
        several = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            kind = chance.choice(kinds)
            of = _SIGNALS if "signal" in kind else _ERRORS
            several.append(Mischief(kind, int(chance.choice(of)), chance.random(), chance.random() < 0.3))
        return target, several

    def event(self, target: str, several: list[Mischief]) -> list[str]:
        """Lets it happen, and judges; returns a word for each attempt.

        Raises:
            Broken: when something is not as it should be.
        """
        usual = self.learn(target)
        folder = os.path.join(self.root, "folder")
        os.mkdir(folder)
        mounted, words = False, []
        try:
            if any(mischief.kind == "full disk" for mischief in several):
                mounted = _mount(folder, usual.nbytes * 8 + (4 << 20))
            for mischief in several:
                words.append(self._attempt(target, folder, mischief, mounted))
            if mounted:
                _resize(folder, usual.nbytes * 8 + (4 << 20))
            self._run(target, folder)
            found = json.loads(json.dumps(TARGETS[target].result(folder)))
            if found != usual.result:
                raise Broken(f"another outcome than undisturbed: {found} and not {usual.result}")
            left = [str(p) for p in Path(folder).rglob("*") if p.name.startswith((".", "tmp"))]
            if left:
                raise Broken(f"left behind: {left}")
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)
            shutil.rmtree(folder)
        return words

    def _attempt(self, target: str, folder: str, mischief: Mischief, mounted: bool) -> str:
        usual = self.usual[target]
        if mischief.kind == "full disk":
            if mounted:
                _resize(folder, _used(folder) + 4096 + int(mischief.at * 1.5 * usual.nbytes))
            else:
                mischief = Mischief("file size", at=mischief.at)
        started = [self._start(target, folder, mischief)]
        if mischief.kind == "two":
            time.sleep(mischief.at * usual.seconds * 0.5)
            started.append(self._start(target, folder, mischief))
        elif mischief.kind == "signal":
            time.sleep(mischief.at * usual.seconds)
            for _ in range(1 + mischief.again):
                _send(started[0][0], mischief.number)
                time.sleep(0.005)
        codes = []
        for process, state in started:
            code, said = self._end(process, state)
            codes.append(code)
            self._judge(target, mischief, code, said)
        if mischief.kind == "two" and 0 not in codes:
            raise Broken(f"of two at once, none succeeds: {codes}")
        try:
            TARGETS[target].check(folder)
        except Exception as error:
            raise Broken(f"not whole: {type(error).__name__}: {error}") from error
        if mounted:
            _resize(folder, usual.nbytes * 8 + (4 << 20))
        return f"{mischief}: {codes[0] if len(codes) == 1 else codes}"

    def _judge(self, target: str, mischief: Mischief, code: int, said: str) -> None:
        lines = [line for line in said.splitlines() if line.strip()]
        allowed = {0}
        if "signal" in mischief.kind:
            allowed |= {-mischief.number, 128 + mischief.number}
        else:
            allowed |= {2}
        if code not in allowed:
            raise Broken(f"ends with {code}: {said}")
        if "Traceback" in said:
            raise Broken(f"a traceback: {said}")
        if code == 2 and len(lines) != 1:
            raise Broken(f"no single sentence: {said}")

    def run(self, number: int) -> str:
        """The event of a number; returns what happened, in a line."""
        target, several = self.draw(number)
        try:
            return f"{number} {target}: {'; '.join(self.event(target, several))}"
        except Broken as problem:
            told = "; ".join(map(str, several))
            raise Broken(
                f"event {number}, {target}, {told}: {problem}\n"
                f"again: python -m tests.chaos --seed {self.seed} --event {number}"
            ) from problem


def _send(process: BaseProcess, number: int) -> None:
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


def _make_model(folder: str) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from qlora_kernels.finetune import tiny
    from qlora_kernels.finetune.options import Options

    torch.manual_seed(0)
    LlamaForCausalLM(tiny.config(Options(tiny_hidden=64, tiny_layers=1))).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- a full disk


def _mount(folder: str, nbytes: int) -> bool:
    """A small disk of its own at the folder; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", folder]
    try:
        return sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _resize(folder: str, nbytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={nbytes}", folder], check=True)


def _used(folder: str) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize
