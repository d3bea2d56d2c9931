"""``python -m tests.chaos [--seed S] [--minutes M]``: lets accidents happen to everything that writes.

``--event N`` repeats one event of a seed. A "signal" comes after a time, so it hits the same moment only roughly; all
else is repeated exactly.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    from .events import Broken, Chaos
    from .targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="decides what happens (default: a new one, which is printed)")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default 1)")
    parser.add_argument("--event", type=int, help="only the event of this number")
    parser.add_argument("--only", choices=TARGETS, action="append", default=[], help="only this; may be repeated")
    parser.add_argument("--keep-going", action="store_true", help="to the end, though something broke")
    namespace = parser.parse_args()
    seed = secrets.randbelow(10**9) if namespace.seed is None else namespace.seed
    print(f"python -m tests.chaos --seed {seed} --minutes {namespace.minutes:g}", flush=True)
    broken = 0
    with tempfile.TemporaryDirectory() as root:
        chaos = Chaos(root, seed, tuple(namespace.only))
        end = time.monotonic() + 60 * namespace.minutes
        for number in itertools.count() if namespace.event is None else [namespace.event]:
            try:
                print(chaos.run(number), flush=True)
            except Broken as problem:
                broken += 1
                print(f"BROKEN {problem}", flush=True)
                if not namespace.keep_going:
                    break
            if time.monotonic() > end:
                break
    print(f"{broken} broken" if broken else "nothing broke")
    return 1 if broken else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
    sys.exit(main())
