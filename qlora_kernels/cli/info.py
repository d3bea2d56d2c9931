"""qlora-kernels info."""

from __future__ import annotations

import argparse
import json
import os

from ..errors import InputError


def run_info(namespace: argparse.Namespace, arguments: list[str]) -> int:
    if namespace.dispatch:
        return _dispatch(namespace)
    if namespace.arch is not None:
        raise InputError("--arch goes with --dispatch N K")
    from ..native.build_info import build_info, describe

    info = build_info()
    print(json.dumps(info, indent=2) if namespace.json else describe(info))
    return 0


def _dispatch(namespace: argparse.Namespace) -> int:
    from ..native import dispatch

    n, k = namespace.dispatch
    if min(n, k) < 1 or max(n, k) >= 2**31:
        raise InputError(f"--dispatch: N and K should be from 1 to 2^31 - 1, not {n} and {k}")
    card, remark = dispatch.CARDS.get(namespace.arch), ""
    if namespace.arch is None:
        card = dispatch.seen()
        if card is None:
            card, remark = dispatch.CARDS[90], " (no GPU is seen here; --arch picks another)"
    elif card is None:
        known = ", ".join(map(str, dispatch.CARDS))
        raise InputError(f"--arch {namespace.arch}: there are figures for {known}")
    forced = os.environ.pop("QLORA_KERNELS_CUDA_KERNEL", None)  # the table shows what runs without it
    try:
        if namespace.json:
            table = [
                {"dtype": name, "backward": backward, "from": first, "to": last, **plan}
                for backward in (False, True)
                for name, dtype in dispatch.DTYPES.items()
                for first, last, plan in dispatch.ranges(card, n, k, dtype, backward)
            ]
            print(json.dumps({"n": n, "k": k, "card": vars(card), "table": table}, indent=2))
        else:
            print(dispatch.describe(n, k, card, remark))
            if forced:
                print(f"QLORA_KERNELS_CUDA_KERNEL={forced} is set: that one runs, or the call fails.")
    finally:
        if forced is not None:
            os.environ["QLORA_KERNELS_CUDA_KERNEL"] = forced
    return 0
