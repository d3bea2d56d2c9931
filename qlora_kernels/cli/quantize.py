"""qlora-kernels quantize."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator

from ..console.signals import Interrupted, StopSignal
from ..errors import InputError
from ..storage.atomic_folder import new_folder
from ..storage.lock import claim_of, claimed


def run_quantize(namespace: argparse.Namespace, arguments: list[str]) -> int:
    from ..interop.transformers.quantize_folder import quantize_folder

    with StopSignal():  # SIGTERM becomes an exception too, so that the unfinished folder is removed
        try:
            size = parse_size(namespace.max_shard_size)
            with _claimed(os.path.abspath(namespace.out)):
                report = quantize_folder(
                    namespace.model,
                    namespace.out,
                    double_quant=namespace.double_quant,
                    max_shard_size=size,
                    progress=not namespace.quiet,
                )
        except Interrupted as interrupted:
            print("qlora-kernels quantize: interrupted", file=sys.stderr)
            return 128 + interrupted.signum
    print(report)
    return 0


@contextlib.contextmanager
def _claimed(out: str) -> Iterator[None]:
    """Keeps another command from writing the same folder: the one that ends later would have worked for nothing."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(new_folder(os.path.dirname(out)))
            with contextlib.suppress(FileNotFoundError):
                os.lstat(out)  # raises for a name that is too long, now and not after the work
            stack.enter_context(claimed(claim_of(out), out))
        except OSError as error:
            raise InputError(f"the output folder {out} cannot be written: {error.strerror or error}") from None
        yield


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # any case


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB", "500MB" or "1GiB", at least one.

    Raises:
        InputError: for anything else; the sentence says what is taken.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = float(match[1]) * _UNITS.get(match[2].upper(), math.nan) if match else math.nan
    if not 1 <= size < math.inf:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise InputError(
            f"--max-shard-size should be a size of at least one byte, such as 2GB, 500MB or 1.5GiB (units: {units}; "
            f"none for bytes), found {text!r}"
        )
    return int(size)
