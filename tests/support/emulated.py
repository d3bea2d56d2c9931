"""The CUDA kernels on the emulator, as a backend like any other: built from the sources when it is first asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
from collections.abc import Callable

import torch

from bench.emulator import ROOT, VARIANT, build, load, module
from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import cuda

__all__ = ["ROOT", "VARIANT", "Emulated", "build", "counters", "emulated", "instances", "load", "module", "paging"]

#: A kernel in `nm --demangle`: its address, its name, and the template's arguments.
SYMBOL = re.compile(r"^([0-9a-f]+) [tTwW] (?:void )?qlk::cuda::(\w+_kernel)(<.*>)?\([^()]*\)$", re.MULTILINE)


class Emulated(backends.CUDA):
    """CPU tensors, CUDA kernels. What a kernel does not write stays NaN, and so does scratch."""

    def _empty(self, shape, dtype, device):
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(255)
            self.kernels.made.append(tensor)  # until the next call, which has to keep within it
        return tensor

    def _like(self, tensor, *sizes, dtype=None):
        return self._empty(sizes, dtype or tensor.dtype, "cpu")

    def __init__(self, kernels, ordinal: int = 1):
        super().__init__(kernels)
        #: The device that everything is to run on. Device 0 is current, so that a missing guard is an error.
        self.ordinal = ordinal

    def queue(self, device):
        return self.ordinal, 0

    def capturing(self, device):
        return self.captures

    def pin(self, table):
        return table.clone()

    def send(self, pinned, device):
        return pinned.clone()

    def wait(self, device):
        self.waits += 1

    def expose(self, owner, address, count, dtype, device):
        return cuda.host_memory(owner, address, count, dtype)

    #: Whether the caller's stream counts as capturing.
    captures = False
    #: How often the host has waited for the device.
    waits = 0


@contextlib.contextmanager
def emulated(order: str = "forward", landing: str = "latest", **options):
    """A context in which the operations run on the emulator."""
    module().configure(order=order, landing=landing, **options)
    try:
        with backends.forced(Emulated(module())):
            yield
    finally:
        module().configure()


@functools.cache
def instances() -> dict[int, tuple[str, str]]:
    """The compiled kernels by address: name and template arguments."""
    command = ["nm", "--demangle", module().__file__]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(address, 16): (name, arguments) for address, name, arguments in SYMBOL.findall(symbols)}


def paging() -> dict:
    """Pages moved since reset_paging(), and where they are (tests/emulator/managed.h)."""
    return json.loads(module().paging())


def counters() -> dict:
    """The counts since reset_counters()."""
    return json.loads(module().counters())


def counted(call: Callable[[], object], **options) -> dict:
    """The counts of a call on the emulator with these options."""
    with emulated(**options):
        module().reset_counters()
        call()
        return counters()


def lines(traffic: dict, file: str, kind: str) -> dict:
    """The part of counted traffic that one file's loads or stores cause, by place."""
    return {place: t for place, t in traffic.items() if place.startswith(f"{file}:") and place.endswith(kind)}
