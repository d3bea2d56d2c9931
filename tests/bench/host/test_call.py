"""bench/host/call.py: every call is timed, launches are counted and not executed, and the backend is put back."""

from __future__ import annotations

import json

from bench.host import call
from qlora_kernels.ops import backends


def test_all_calls_are_timed(tmp_path, capsys):
    assert call.main(["--out", str(tmp_path / "host.json"), "--repeats", "1", "--number", "1"]) == 0
    assert backends.forced_backend() is None
    cases = json.loads((tmp_path / "host.json").read_text())["cases"]
    assert len(cases) == len(call.ADAPTERS) * 9
    assert all(case["us"] > 0 for case in cases)
    launches = {(case["call"], case["adapter"]): case["launches"] for case in cases}
    # The product; u before it. In backward dx; v and dB with their sum, and dA.
    assert launches["forward, no_grad", "none"] == launches["backward alone", "none"] == 1
    assert launches["forward, no_grad", "bfloat16"] == 2
    # Of adapters in float32, copies; of those in another type, their gradients.
    assert launches["forward, no_grad", "float32"] == 3
    assert launches["backward alone", "float32"] == launches["backward alone", "bfloat16"] >= 5
    table = capsys.readouterr().out
    assert table.count("\n| forward") == 8
    assert table.count("\n| backward") == 1
