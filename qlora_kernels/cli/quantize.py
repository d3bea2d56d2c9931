"""qlora-kernels quantize."""

from __future__ import annotations

import argparse
import math
import re
import sys

from ..console.signals import Interrupted, StopSignal
from ..errors import InputError


def run_quantize(namespace: argparse.Namespace, arguments: list[str]) -> int:
    from ..interop.transformers.quantize_folder import quantize_folder

    with StopSignal():  # SIGTERM becomes an exception too, so that the unfinished folder is removed
        try:
            report = quantize_folder(
                namespace.model,
                namespace.out,
                double_quant=namespace.double_quant,
                max_shard_size=parse_size(namespace.max_shard_size),
                progress=not namespace.quiet,
            )
        except Interrupted as interrupted:
            print("qlora-kernels quantize: interrupted", file=sys.stderr)
            return 128 + interrupted.signum
    print(report)
    return 0


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
