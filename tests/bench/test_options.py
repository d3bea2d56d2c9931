"""Which points the flags choose."""

from __future__ import annotations

from bench_runs.cases import parsed

from qlora_kernels.bench import options
from qlora_kernels.bench.case import Settings
from qlora_kernels.bench.points import SWEEPS, Point
from qlora_kernels.cli.main import main


def chosen(*arguments: str) -> list[Point]:
    return options.points_of(parsed(*arguments))


def test_points_by_axes():
    assert chosen("--quick") == SWEEPS["quick"]()
    assert chosen("--full") == SWEEPS["full"]()
    only = chosen("--operations", "linear_dx")
    assert [p.operation for p in only] == ["limits", "linear_dx", "linear_dx"]
    paper = chosen("--operations", "gpt2_forward")
    assert [(p.batch, p.m, p.rank) for p in paper[1:]] == [(32, 512, 4), (16, 256, 4), (1, 128, 4)]
    assert chosen("--quick", "--operations", "dequantize,lion_step")[1:] == [
        Point("dequantize", n=4096, k=4096),
        Point("lion_step", "float32", rank=16, model="llama-2-7b"),
    ]
    points = chosen("--shapes", "64x128,32x64", "--rows", "1,2", "--ranks", "0,8", "--dtypes", "float32")
    assert len(points) == 9
    assert points[0] == Point("limits", "float32")
    assert Point("linear_forward", "float32", 32, 64, 2, 8) in points
    assert chosen("--operations", "decode,quantize", "--ranks", "0,4", "--models", "tiny")[1:] == [
        Point("decode", m=1, rank=4, model="tiny"),
        Point("quantize", n=4096, k=4096),
    ]
    assert chosen("--operations", "adamw_step", "--models", "tiny")[1:] == [
        Point("adamw_step", "float32", rank=16, model="tiny")
    ]


def test_float32_where_bfloat16_is_slow(monkeypatch, capsys):
    monkeypatch.setattr(options, "slow_bfloat16", lambda device: f"the {device} is from 1999")

    def listed(*arguments: str) -> tuple[list[str], str]:
        assert main(["bench", "--list", "--device", "cpu", *arguments]) == 0
        out, err = capsys.readouterr()
        return out.splitlines(), err

    for sweep in ("--quick", "--full", "--rivals"):
        points, said = listed(sweep)
        assert ("limits" in points) == (sweep == "--full")  # which has three dtypes
        assert "linear_forward, 4096 x 4096, M = 512, r = 0, float32" in points
        assert "measuring in float32, which is faster here than bfloat16: the cpu is from 1999; --dtypes" in said
    assert "linear_forward, 4096 x 4096, M = 1, r = 0" in listed("--full")[0]
    assert listed("--operations", "linear_dx", "--rows", "3")[0][1:] == ["linear_dx, 4096 x 4096, M = 3, float32"]
    assert listed("--operations", "gpt2_forward")[0][1].endswith("float32")
    for chosen in (["--bars"], ["--quick", "--dtypes", "bfloat16"], ["--card", "--device", "cuda"]):
        points, said = listed(*chosen)
        assert "limits" in points
        assert not said
    for sweep in ("--quick", "--rivals"):  # what the sentence advises changes nothing else
        assert listed(sweep, "--dtypes", "bfloat16")[0] == list(map(str, SWEEPS[sweep[2:]]()))
    assert "finetune, r = 16" in listed("--quick")[0]  # which chooses by itself


def test_list_measures_nothing(capsys):
    assert main(["bench", "--quick", "--list"]) == 0
    assert "linear_step, 4096 x 4096, M = 512, r = 16" in capsys.readouterr().out


def test_more_seconds_are_more_rounds():
    rounds = [options.settings_of(parsed(*words)).max_rounds for words in (["--quick"], [], ["--seconds=60"])]
    assert rounds == [Settings.max_rounds, Settings.max_rounds, 10 * Settings.max_rounds]
