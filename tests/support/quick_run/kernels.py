"""That a quick run executes every CUDA kernel on the emulator: each instance of each template, on any day."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bench import emulator

#: A kernel in `nm --demangle`: its address, and its name with the template's arguments.
_KERNEL = re.compile(r"^([0-9a-f]+) [tTwW] (?:void )?qlk::cuda::(\w+_kernel(?:<.*>)?)\([^()]*\)$", re.MULTILINE)


def compiled(module: str) -> dict[int, str]:
    """The CUDA kernels in a built emulator, by address."""
    symbols = subprocess.run(["nm", "--demangle", module], check=True, capture_output=True, text=True).stdout
    return {int(address, 16): name.replace("qlk::cuda::", "") for address, name in _KERNEL.findall(symbols)}


def seen_here() -> dict[str, bool]:
    """Whether this process has run each kernel; nothing if it has not loaded the emulator."""
    if emulator.module.cache_info().currsize == 0:
        return {}
    module = emulator.module()
    run = set(module.kernels_run())
    return {name: address in run for address, name in compiled(module.__file__).items()}


def missed(processes: Iterable[dict[str, bool]]) -> list[str]:
    """The kernels that none of the processes has run."""
    processes = list(processes)
    names = {name for seen in processes for name in seen}
    if not names:
        return ["all: no test has loaded the emulator"]
    return sorted(name for name in names if not any(seen.get(name) for seen in processes))


def runs_all_tests(config, folder: Path) -> bool:
    """Whether a run takes all tests of the folder, or all but the slow ones: no part that an argument chooses."""
    option = config.option
    narrowed = ("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly")
    paths = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    return (
        paths == [folder]
        and option.markexpr in ("", "not slow")
        and not any(getattr(option, name, None) for name in narrowed)
    )
