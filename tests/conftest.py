"""What the tests have in common: the instruction sets of this machine, weights, and the numerics contract."""

from __future__ import annotations

import contextlib
import math
import os
import signal

import pytest
import torch
from emulated import emulated

from qlora_kernels import backends, quantize

ISAS = tuple(backends.native().build_info()["isas_available"].split(","))


@pytest.fixture(autouse=True)
def _threads():
    """What a test says about threads is over with it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _signals():
    """Ctrl-C and a hangup are heard, by a test and what it starts: a shell without job control, and nohup, ignore them
    in what they run in the background."""
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


#: The CUDA kernels on the emulator, by the order in which their threads run.
ORDERS = ("forward", "reverse", "random")
ENGINES = (
    *ISAS,
    *(f"emulated-{order}" for order in ORDERS),
    pytest.param("cuda", marks=pytest.mark.gpu),
)


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    """Runs the test once for each instruction set, once for each order of the emulator, and on a card where one is.

    On the card, the tensors that the test makes are there.
    """
    with engine_named(request.param):
        yield request.param


@contextlib.contextmanager
def engine_named(name: str):
    if name == "cuda":
        before = torch.get_default_device()
        torch.set_default_device("cuda")
        try:
            yield
        finally:
            torch.set_default_device(before)
    elif name.startswith("emulated-"):
        with emulated(name.removeprefix("emulated-"), seed=7):
            yield
    else:
        with forced(name):
            yield


@contextlib.contextmanager
def on_the_cpu():
    """Within a test of another engine: tensors and operations of the CPU again."""
    before, backends.forced = backends.forced, None
    try:
        with torch.device("cpu"):
            yield
    finally:
        backends.forced = before


def pytest_collection_modifyitems(config, items):
    """Tests of a card are left out, not skipped, where none is and none was asked for with -m gpu."""
    if torch.cuda.is_available() or "gpu" in config.getoption("-m"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """After a failure on a card the run ends where the card answers nothing more: all that came after would fail, too.

    What was reported until then is kept, the failure included.
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
    """Cases that a module draws as it is imported are the same in every run, whatever else is collected."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def forced(isa: str):
    """A context in which the kernels use one instruction set."""
    patch = pytest.MonkeyPatch.context()

    class Context:
        def __enter__(self):
            self.patch = patch.__enter__()
            self.patch.setenv("QLORA_KERNELS_CPU_ISA", isa)

        def __exit__(self, *error):
            return patch.__exit__(*error)

    return Context()


def make_weight(n: int, k: int, double_quant: bool = True, dtype: torch.dtype = torch.float32):
    """A quantized weight [n, k] whose rows differ in scale."""
    weight = torch.randn(n, k) * torch.logspace(-2, 1, n).unsqueeze(1)
    return quantize(weight.to(dtype), double_quant)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error; NaN when anything is NaN."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def worst_tile_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of any 64 x 64 tile, relative to the root mean square of the whole."""
    error = (actual.double() - exact).square()
    rows, columns = exact.shape
    padded = exact.new_zeros((rows + 63) // 64 * 64, (columns + 63) // 64 * 64, dtype=torch.float64)
    count = padded.clone()
    padded[:rows, :columns] = error
    count[:rows, :columns] = 1

    def tiles(t):
        return t.view(t.shape[0] // 64, 64, t.shape[1] // 64, 64).sum((1, 3))

    return (tiles(padded) / tiles(count)).max().sqrt().item() / exact.square().mean().sqrt().item()


def assert_within_contract(actual: torch.Tensor, dense: torch.Tensor, exact: torch.Tensor, case: str) -> None:
    """DESIGN's contract: at most 1.10 times the error of torch's dense layer, over all and in the worst tile."""
    assert actual.shape == exact.shape, case
    for metric in (relative_error, worst_tile_error):
        ours, theirs = metric(actual, exact), metric(dense, exact)
        # An ulp or two of float32 remain allowed, where torch happens to round nothing; more of them for a handful of
        # outputs, all there are or those of the smallest tile, whose errors depend on the order of the sum by chance.
        few = math.prod(n if metric is relative_error else (n - 1) % 64 + 1 for n in exact.shape)
        slack = 1.5e-7 if few >= 64 else 1e-6
        assert ours <= 1.10 * theirs + slack, f"{case}: {metric.__name__} {ours:.3e}, dense {theirs:.3e}"


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
