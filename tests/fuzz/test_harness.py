"""The fuzzer notices planted faults, of every kind it looks for."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fuzzing import campaign as fuzz
from fuzzing import mutations, torch_mutations
from fuzzing.files import Special
from fuzzing.targets import TARGETS, Target, Wrong

from qlora_kernels.models import adapter_files, peft_config
from qlora_kernels.storage import torch_file

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


def _raise(error):
    raise error


def _write(path):
    with open(path, "w"):
        pass


def _connect():
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", 9))


def _swallowed(function):
    try:
        function()
    except Exception:
        raise ValueError("text.txt is damaged") from None


#: What a parser does with a folder, and how the outcome begins.
BEHAVIOURS = {
    "good": (lambda folder: None, "accepted"),
    "good refusal": (lambda folder: _raise(ValueError(f"{folder}: damaged")), "refused"),
    "names the file": (lambda folder: _raise(ValueError("text.txt is damaged")), "refused"),
    "names nothing": (lambda folder: _raise(ValueError("damaged")), "nameless ValueError"),
    "says nothing": (lambda folder: _raise(ValueError("  ")), "silent ValueError"),
    "another exception": (lambda folder: _raise(KeyError("text.txt")), "undocumented KeyError"),
    "exit": (lambda folder: sys.exit(0), "undocumented SystemExit"),
    "recursion": (lambda folder: _raise(RecursionError("text.txt")), "undocumented RecursionError"),
    "wrong": (lambda folder: _raise(Wrong("has changed it", "text.txt")), "wrong: has changed it"),
    "crash": (lambda folder: faulthandler._sigsegv(), "crash SIGSEGV"),
    "abort": (lambda folder: os.abort(), "crash SIGABRT"),
    "gone": (lambda folder: os._exit(0), "crash exit code 0"),
    "memory": (lambda folder: bytearray(4 << 30), "undocumented MemoryError"),
    "memory of torch": (lambda folder: torch.empty(4 << 30, dtype=torch.uint8), "undocumented RuntimeError"),
    "waits": (lambda folder: time.sleep(60), "timeout"),
    "computes": (lambda folder: re.match("(a|a)*b", "a" * 60), "timeout"),
    "writes": (lambda folder: _write(folder / "new"), "forbidden: writes"),
    "writes elsewhere": (lambda folder: _write("ran"), "forbidden: writes"),
    "removes": (lambda folder: os.unlink(folder / "text.txt"), "forbidden: os.remove"),
    "runs": (lambda folder: os.system("true"), "forbidden: os.system"),
    "starts": (lambda folder: subprocess.run(["true"], check=False), "forbidden: subprocess.Popen"),
    "asks": (lambda folder: _swallowed(input), "forbidden: builtins.input"),
    "connects": (lambda folder: _swallowed(_connect), "forbidden: socket.connect"),
    "reads outside": (lambda folder: (folder / ".." / "outside.safetensors").read_bytes(), "forbidden: reads"),
}


def _target(call) -> Target:
    return Target(
        "planted", "", lambda: [{"text.txt": b"hello"}], [(1, mutations.raw("text.txt"))], call, (ValueError,)
    )


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_what_a_parser_did_is_noticed(name):
    call, begins = BEHAVIOURS[name]
    outcome = fuzz.outcome_of(_target(call), {"text.txt": b"hello"}, seconds=0.5)
    assert outcome.signature.startswith(begins), outcome
    assert outcome.good == (begins in ("accepted", "refused"))
    assert not os.path.exists("ran")


def test_cases_go_on_after_a_crash_and_a_hang():
    def call(folder):
        text = (folder / "text.txt").read_bytes()
        if text == b"2":
            os.abort()
        if text == b"4":
            time.sleep(60)

    outcomes = fuzz.run(_target(call), lambda n: {"text.txt": str(n).encode()}, count=7, seconds=0.5)
    kinds = [(number, outcome.kind) for number, outcome in outcomes]
    bad = {2: "crash SIGABRT", 4: "timeout"}
    assert kinds == [(n, bad.get(n, "accepted")) for n in range(7)]


def test_a_run_ends_at_its_time():
    began = time.monotonic()
    call = lambda folder: time.sleep(0.01)  # noqa: E731
    tally = fuzz.campaign(_target(call), 0, until=began + 0.5)
    assert 5 < tally.cases < 60
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_check_that_is_left_out_is_found_and_made_small(monkeypatch, tmp_path):
    """adapter_config.json without its checks."""
    monkeypatch.setattr(peft_config, "check", lambda config, path: None)
    tally = fuzz.campaign(TARGETS["adapter"], seed=1, count=120, seconds=2)
    planted = [f for f in tally.findings.values() if f.outcome.kind.startswith("undocumented")]
    assert {f.outcome.where for f in planted} & {"models/adapter_files.py:_fit", "models/peft_config.py:value_for"}
    # One change is enough for most; some faults need several at once.
    assert sum(len(f.notes) == 1 for f in planted) > len(planted) / 2, [f.notes for f in planted]
    planted.sort(key=lambda f: len(f.notes))
    folder = fuzz.keep(planted[0], tmp_path)
    assert [name for name, _ in fuzz.corpus_cases(tmp_path)] == ["adapter"]
    files = fuzz.corpus_case("adapter", folder)
    assert files == planted[0].files
    assert fuzz.outcome_of(TARGETS["adapter"], files).signature == planted[0].outcome.signature
    monkeypatch.undo()
    assert fuzz.outcome_of(TARGETS["adapter"], files).good


@pytest.mark.slow
def test_a_loader_that_runs_code_is_found(monkeypatch):
    """A checkpoint read as a pickle like any other."""
    load = torch.load
    monkeypatch.setattr(torch_file, "check_pickle", lambda *_: None)
    monkeypatch.setattr(torch, "load", lambda *args, **more: load(*args, **{**more, "weights_only": False}))
    target = dataclasses.replace(TARGETS["checkpoint"], mutations=[(1, torch_mutations.torch_archive("checkpoint.pt"))])
    tally = fuzz.campaign(target, seed=1, count=60, seconds=2)
    assert any(signature.startswith("forbidden: ") for signature in tally.findings), tally.findings.keys()


@pytest.mark.slow
def test_a_load_that_changes_the_model_and_fails_is_found(monkeypatch):
    real = adapter_files._fit

    def early(layers, *rest):
        next(iter(layers.values())).delete_adapter("default")
        return real(layers, *rest)

    monkeypatch.setattr(adapter_files, "_fit", early)
    tally = fuzz.campaign(TARGETS["adapter"], seed=2, count=120, seconds=2)
    assert any("a failed load has changed the model" in signature for signature in tally.findings), (
        tally.findings.keys()
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_key_builds_the_same_case_again(name):
    for number in range(20):
        key = fuzz.key_of(7, name, number)
        seed, files, notes = fuzz.built(key)
        assert fuzz.built(key) == (seed, files, notes)
        assert all(len(content) < 1 << 20 for content in files.values() if isinstance(content, bytes))
    assert fuzz.built(fuzz.key_of(7, name, 1)) != fuzz.built(fuzz.key_of(8, name, 1))


@pytest.mark.parametrize("name", TARGETS)
def test_every_mutation_changes_something(name):
    target = TARGETS[name]
    for _, mutation in target.mutations:
        for number in range(60):
            rng = random.Random(number)
            seed = rng.choice(target.seeds())
            files = dict(seed)
            if mutation(files, rng) and files != seed:
                break
        else:
            pytest.fail(f"{mutation} changes nothing")


def test_a_case_is_stored_by_what_differs(tmp_path):
    seed = {"a": b"1", "b": b"2", "c": b"3", "d": b"4"}
    files = {"a": b"1", "b": Special("fifo"), "c": b"\0"}
    fuzz.store(files, seed, tmp_path / "case")
    assert sorted(path.name for path in (tmp_path / "case").iterdir()) == ["c", "special.json"]
    assert fuzz.stored(tmp_path / "case", seed) == {**files, "d": Special("absent")}


@pytest.mark.slow
def test_the_program(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "fuzz"), "--seconds", "3", "--target", "safetensors", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 1, 3 seconds for safetensors")
    assert re.search(r"safetensors: \d\d+ cases, \d+ accepted", done.stdout)
    command[-4:] = ["--case", "1:safetensors:3"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode == 0
