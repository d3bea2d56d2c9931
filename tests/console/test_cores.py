"""Threads that sleep where other programs use the cores."""

from __future__ import annotations

import math
import os
import sys

import pytest

from qlora_kernels.cli.main import main
from qlora_kernels.console import cores


def test_threads_sleep_where_other_programs_use_the_cores(monkeypatch):
    class Restarted(Exception):
        pass

    def execve(path, arguments, environment):
        assert arguments == sys.orig_argv
        raise Restarted(environment["OMP_WAIT_POLICY"])

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["qlora-kernels", "finetune", "--rank", "0"])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    assert 0 <= cores.free_cores() <= os.cpu_count()
    monkeypatch.setattr(cores, "free_cores", lambda: math.inf)
    assert main() == 2
    monkeypatch.setattr(cores, "free_cores", lambda: 0.0)
    with pytest.raises(Restarted, match="passive"):
        main()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # what the user says, holds; and no restart without end
    assert main() == 2
