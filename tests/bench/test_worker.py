"""The processes that measure: who ends one, hangs in one or breaks its card is left out, and nothing stays behind."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
from bench_runs.cases import POINT, TINY

from qlora_kernels.bench import worker
from qlora_kernels.bench.case import OURS, DeviceLost
from qlora_kernels.bench.contenders.names import BNB
from qlora_kernels.bench.points import point_of
from qlora_kernels.bench.report import results, table
from qlora_kernels.bench.timing.measure import failed_ours
from qlora_kernels.bench.worker import Lost, OutOfTime, Remote, Worker

CARD = replace(TINY, device="cuda")


class _Instant:
    """A measurement that takes no time; ``fault`` is what its contender does in the second round."""

    rounds = 2

    def __init__(self, without, announce=None, fault=None):
        self.without, self.done, self.announce = without, 0, announce
        self.fault = None if BNB in without else fault

    def round(self):
        self.done += 1
        if self.fault is not None and self.done == 2:
            self.announce(OURS)
            self.announce(BNB)
            self.fault()
        return 0.0

    def result(self):
        return {"without": self.without, "done": self.done, "process": os.getpid(), "other_processes": 0.0}


def _abort():
    os.write(2, b"first words\nlast words\n")
    os.abort()


def _abort_with_child():
    """Whose child holds all that it has open."""
    if os.fork() == 0:
        time.sleep(60)
    os.abort()


def _abort_without_folder():
    shutil.rmtree(tempfile.gettempdir())
    os.abort()


def _lose_device():
    raise DeviceLost("CUDA error: an illegal memory access was encountered")


def _hang():
    time.sleep(60)


def _begin(settings, point, without, announce, fault, when):
    """Begins a measurement in which a contender commits a fault."""
    announce(OURS)
    if when == "prepared" and BNB not in without:
        announce(BNB)
        fault()
    announce("")
    return _Instant(without, announce, fault if when == "timed" else None)


def _begin_instant(settings, point, without, announce):
    return _Instant(without)


def _end_between(settings, point, without, announce):
    announce(OURS)
    announce("")
    os._exit(3)


def _raising(settings, point, without, announce):
    raise ValueError("nothing works")


def _with_children(settings, point, without, announce):
    """Leaves a file, says where and who it is, and waits for a child."""
    announce(BNB)
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(without["where"]).write_text(f"{os.getpid()} {child.pid} {folder}")
        child.wait()


class _Patient(Worker):
    """Waits as long as a busy machine takes, until BNB is at work; from then on as ``at_bnb`` says.

    Args:
        at_bnb: called once with the worker and since when BNB has been at work; sets the limits that a test is about.
    """

    def __init__(self, at_bnb, **more):
        super().__init__(**more)
        self._at_bnb, self._told = at_bnb, False

    def _at_work(self, process, asked):
        who, since, said = super()._at_work(process, asked)
        if who == BNB and not self._told:
            self._told = True
            self._at_bnb(self, since)
        elif who != BNB:
            self.deadline, self.prepare_seconds = (
                None,
                time.monotonic() - since + 0.1,
            )  # never over, and looked at again
        return who, since, said

    def _start(self):
        self.deadline, self.prepare_seconds = None, 60.0
        return super()._start()


def _limit(seconds):
    def at_bnb(one, since):
        one.prepare_seconds = time.monotonic() - since + seconds

    return at_bnb


def _deadline(seconds):
    def at_bnb(one, since):
        one.deadline, one.prepare_seconds = time.monotonic() + seconds, 60.0

    return at_bnb


@pytest.fixture(scope="module", autouse=True)
def _server():
    """One process that all workers here are forked from: it knows this file, but not what benchmarks compare."""
    forkserver._forkserver._stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "PRELOADED", (__name__,))
        # A server that cannot import this file starts all the same, and each process then takes seconds to import it.
        tests = Path(__file__).resolve().parents[1]
        patch.setenv("PYTHONPATH", f"{tests.parent}{os.pathsep}{tests / 'support'}", prepend=os.pathsep)
        with Worker(begin=_begin_instant) as one:
            one.measure(POINT, TINY)
        yield
    forkserver._forkserver._stop()


@pytest.fixture
def left(tmp_path, monkeypatch) -> Path:
    """Where workers' folders are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def short_folder():
    """The server's socket lies in it, and the path of a socket has room for a hundred bytes: tmp_path may be longer."""
    with tempfile.TemporaryDirectory(prefix="b-") as folder:
        yield Path(folder)


_LOST = "ended its process with exit code 1: CUDA error: an illegal memory access was encountered"


@pytest.mark.share(8)
@pytest.mark.parametrize(
    ("fault", "settings", "why"),
    [
        (_abort, TINY, "ended its process: SIGABRT: last words"),
        (_abort, CARD, "ended its process: SIGABRT: last words"),
        (_lose_device, CARD, _LOST),
        (_hang, TINY, "gave no answer within 1 s"),
        (_abort_with_child, TINY, "ended its process: SIGABRT"),
        (_abort_without_folder, TINY, "ended its process: SIGABRT"),
    ],
)
@pytest.mark.parametrize("when", ["prepared", "timed"])
def test_who_takes_the_process_along_is_left_out_of_its_case(when, fault, settings, why, left):
    without = {"somebody else": "before"}
    begin = functools.partial(_begin, fault=fault, when=when)
    with _Patient(_limit(1.0), begin=begin) if fault is _hang else Worker(60.0, begin) as one:
        case = one.measure(POINT, settings, without=without)
    assert case["done"] == 2
    assert case["process"] != os.getpid()
    assert case["without"] == without == {"somebody else": "before", BNB: why}
    assert not list(left.glob("qlora-bench-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "why"), [(_end_between, "ended its process with exit code 3"), (_raising, "ValueError: nothing works")]
)
def test_a_loss_without_anybody_at_work_is_the_cases(begin, why):
    """Nor does anyone else take the blame: this package is not blamed for what it has not done."""
    with Worker(begin=begin) as one:
        case = one.measure(POINT, TINY, without={BNB: "before"})
    assert case["failed"] == failed_ours(case) == why
    assert case["contenders"] == [{"name": BNB, "failed": "before"}]
    assert point_of(case) == POINT
    assert why in table.terminal({**results.begin(TINY, "usual"), "cases": [case]})


@pytest.mark.slow
def test_each_case_has_a_process_of_its_own_on_a_cpu_and_not_on_a_card():
    with Worker(begin=_begin_instant) as one:
        assert one.measure(POINT, TINY)["process"] != one.measure(POINT, TINY)["process"]
        assert one.measure(POINT, CARD)["process"] == one.measure(POINT, CARD)["process"]


def test_after_an_error_even_a_card_has_a_new_process():
    with Worker(begin=_raising) as one:
        assert "failed" in one.measure(POINT, CARD)
        assert one._process is None


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.share(3)
@pytest.mark.parametrize("end", ["too slow", "deadline", "Ctrl-C", "killed"])
def test_nothing_stays_behind(end, left, tmp_path_factory):
    """Neither the process, nor its children, nor their files, however it ends."""
    where = tmp_path_factory.mktemp("where") / "who"

    def soon(do):
        def run():
            while not where.exists() or not where.read_text():
                time.sleep(0.01)
            do()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def wait_for_it(one, since):
        while not where.exists() or len(where.read_text().split()) < 3:
            time.sleep(0.01)
        (_limit if end == "too slow" else _deadline)(0.5)(one, since)

    waits = end in ("too slow", "deadline")
    with _Patient(wait_for_it, begin=_with_children) if waits else Worker(60.0, _with_children) as one:
        thread, without = None, {"where": str(where)}
        if end == "too slow":
            expected = pytest.raises(Lost, match=r"gave no answer within \d+ s")
        elif end == "deadline":
            expected = pytest.raises(OutOfTime)
        elif end == "Ctrl-C":
            expected = pytest.raises(KeyboardInterrupt)
            thread = soon(lambda: os.kill(os.getpid(), signal.SIGINT))
        else:
            expected = pytest.raises(Lost, match=r"SIGKILL \(perhaps out of memory")
            thread = soon(lambda: os.kill(int(where.read_text().split()[0]), signal.SIGKILL))
        with expected as problem:
            Remote(one, TINY, POINT, without)
        if thread is not None:
            thread.join()
        if isinstance(problem.value, Lost):
            assert problem.value.who == BNB
    process, child, folder = where.read_text().split()
    assert Path(folder).is_relative_to(left)
    assert not list(left.glob("qlora-bench-*"))
    wait = time.monotonic() + 5.0
    while (_alive(int(process)) or _alive(int(child))) and time.monotonic() < wait:
        time.sleep(0.01)
    assert not _alive(int(process))
    assert not _alive(int(child))


def test_a_deadline_is_one_for_all_requests():
    """However often somebody else is at work."""
    with _Patient(_deadline(1.0), begin=functools.partial(_begin, fault=_hang, when="timed")) as one:
        with pytest.raises(OutOfTime, match=BNB):
            one.measure(POINT, TINY)
        assert time.monotonic() >= one.deadline
        one.deadline = None
        assert one.measure(POINT, TINY, without={BNB: "before"})["done"] == 2


@pytest.mark.slow
def test_who_hangs_before_a_deadline_is_named(monkeypatch):
    """No contender has more than half of the time that is left."""
    monkeypatch.setattr(worker, "LEAST_SECONDS", 0.5)
    with _Patient(_deadline(2.0), begin=functools.partial(_begin, fault=_hang, when="timed")) as one:
        assert "gave no answer within 1 s" in one.measure(POINT, TINY)["without"][BNB]


def test_a_server_that_dies_of_what_it_imports(monkeypatch, tmp_path):
    """Each process then imports for itself what it needs."""
    (tmp_path / "fatal.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(worker, "PRELOADED", ("fatal",))
    forkserver._forkserver._stop()
    with Worker(begin=_begin_instant) as one:
        assert one.measure(POINT, TINY)["done"] == 2


@pytest.mark.parametrize("end", ["prepare_seconds", "deadline"])
def test_a_server_that_hangs_in_what_it_imports(end, monkeypatch, tmp_path):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(worker, "PRELOADED", ("endless",))
    forkserver._forkserver._stop()
    with Worker(prepare_seconds=1.0, begin=_begin_instant) as one:
        if end == "deadline":
            one.deadline = time.monotonic() + 0.5
            with pytest.raises(OutOfTime):
                one.measure(POINT, TINY)
        else:
            assert one.measure(POINT, TINY)["failed"] == "what is compared was not imported within 1 s"


def test_ctrl_c_while_the_server_starts(monkeypatch, left):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(forkserver, "ensure_running", interrupted)
    with pytest.raises(KeyboardInterrupt), Worker(begin=_begin_instant) as one:
        one.measure(POINT, TINY)
    assert not list(left.glob("qlora-bench-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_in_the_first_seconds_leaves_an_old_result(number, code, tmp_path, short_folder):
    """While the server imports, before anything is measured: one line, and not a trace."""
    out, temporary = tmp_path / "old.jsonl", short_folder
    out.write_text("what was measured yesterday")
    command = [sys.executable, "-m", "qlora_kernels", "bench", "--operations", "linear_dx", "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--quiet"],
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait = time.monotonic() + 60.0
    while not list(temporary.glob("qlora-bench-*")) and process.poll() is None and time.monotonic() < wait:
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(process.pid, number)  # as a terminal does: to all that the command has begun
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == "qlora-kernels bench: interrupted before the first case; nothing is written\n"
    assert out.read_text() == "what was measured yesterday"
    assert not list(temporary.glob("qlora-bench-*"))
