"""What a test runs on: an instruction set, the emulator in one of its orders, a card."""

from __future__ import annotations

import contextlib

import pytest
import torch
from emulated import emulated

from qlora_kernels.native import extension
from qlora_kernels.ops import backends

ISAS = tuple(extension.native().build_info()["isas_available"].split(","))

#: The CUDA kernels on the emulator, by the order in which their threads run.
ORDERS = ("forward", "reverse", "random")
ENGINES = (
    *ISAS,
    *(f"emulated-{order}" for order in ORDERS),
    pytest.param("cuda", marks=pytest.mark.gpu),
)


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
    """Within a test of another engine: back to tensors and operations of the CPU."""
    with backends.forced(None), torch.device("cpu"):
        yield


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
