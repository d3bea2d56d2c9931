"""Running a program of random cases (any_tensor.py, any_state.py) so that a crash is that process's alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import qlora_kernels


def attack(program: ModuleType, seed: int, first: int, last: int) -> str:
    """Runs the cases ``first`` to ``last - 1`` of a seed; returns what went wrong, or an empty string."""
    command = [sys.executable, str(program.__file__), str(seed), str(first), str(last)]
    environment = os.environ | {"PYTHONPATH": str(Path(qlora_kernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    if done.returncode not in (0, 1):
        wrong.append(f"a crash ({done.returncode}) in {lines[-1] if lines else 'the start'}\n{done.stderr[-2000:]}")
    elif done.returncode == 1 and not wrong:
        wrong.append(done.stderr[-2000:])
    return "\n".join(wrong)
