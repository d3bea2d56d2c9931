"""What the tests have in common: the instruction sets of this machine, weights, and the numerics contract."""

from __future__ import annotations

import os
import signal

# Before torch is imported. A worker of xdist has one core: a test that wants more threads asks for them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from engines import ENGINES, ISAS, engine_named
from quick_run import choice, collecting, passed


@pytest.fixture(autouse=True)
def _threads():
    """Restores the number of threads after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _signals():
    """Tests and their children react to Ctrl-C and a hangup: a shell without job control, and nohup, start background
    jobs with both ignored."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in heard if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, heard[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    """Runs the test once for each instruction set that this machine has."""
    monkeypatch.setenv("QLORA_KERNELS_CPU_ISA", request.param)
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    """Runs the test once for each instruction set, once for each order of the emulator, and on a card where one is.

    On the card, the tensors that the test makes are there.
    """
    with engine_named(request.param):
        yield request.param


# ------------------------------------------------------------------------------------------- which tests, and where


def pytest_addoption(parser):
    passed.add_option(parser)


def pytest_configure(config):
    """Sets what all workers must share."""
    passed.register(config)
    if hasattr(config, "workerinput"):
        return
    os.environ[choice.VARIABLE] = str(choice.day())
    # A test that is asked for by its name runs, slow or not.
    named = any("::" in argument for argument in config.args)
    if named and not any(argument.startswith("-m") for argument in config.invocation_params.args):
        config.option.markexpr = ""


def pytest_report_header(config):
    if "not slow" in config.option.markexpr:
        return f"a quick run, day {choice.day()}: {choice.VARIABLE}={choice.day()} repeats it, -m '' runs all tests"
    return None


def for_a_card(config):
    return torch.cuda.is_available() or "gpu" in config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config):
    """For -n auto: one worker per core, up to eight; none for a few tests, or for a card, which they would share."""
    few = any("::" in argument for argument in config.args)
    if few or config.option.usepdb or config.option.collectonly or for_a_card(config):
        return 0
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks as slow what a quick run leaves for another day.

    Without a card, its tests are deselected, not skipped, unless -m gpu asks for them.
    """
    choice.leave_out(items, pytest.mark.slow, choice.day())
    if for_a_card(config):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    with collecting.builds_nothing():
        return (yield)


# ---------------------------------------------------------------------------------------------- when a card fails


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """After a failure on a card the run ends if the card no longer responds: every later test would fail too.

    What was reported so far is kept, including the failure.
    """
    result = yield
    if item.stash.get(_FAILED, False) and item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as problem:
            why = str(problem).strip().splitlines()
            pytest.exit(f"the card answers no more after {item.nodeid}: {why[0] if why else type(problem).__name__}")
    return result


def pytest_collectstart(collector):
    """Cases that a module draws on import are the same in every run, whatever else is collected."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
