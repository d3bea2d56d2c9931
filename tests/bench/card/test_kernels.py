"""The small cases of bench.card.kernels on the emulator: all are equal, and whatever is wrong is found."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from emulated import counters, emulated, module

from bench.card import kernels
from qlora_kernels.native import dispatch


@pytest.fixture
def a_third(monkeypatch):
    """Of the products, which take longest, each shape in one dtype."""
    products = itertools.count()
    few = [c for c in kernels.cases() if c.kernel != "linear" or _turn(next(products))]
    assert {c.name.partition(",")[0] for c in few if c.kernel == "linear"} == {"float32", "bfloat16", "float16"}
    monkeypatch.setattr(kernels, "cases", lambda: iter(few))


def _turn(number: int) -> bool:
    """Whether it is the turn of a product, which come dtype by dtype, shape by shape."""
    dtype, shape = divmod(number, len(kernels.LINEAR_SHAPES))
    return shape % len(kernels.DTYPES) == dtype


@pytest.mark.usefixtures("a_third")
def test_the_cases_on_the_emulator(capsys):
    check_all(capsys)


@pytest.mark.slow
def test_all_cases_on_the_emulator(capsys):
    check_all(capsys)


def check_all(capsys) -> None:
    with emulated("random", seed=5):
        module().reset_counters()
        assert kernels.main([], device="cpu") == 0
        launches = counters()["launches"]
    total = sum(1 for _ in kernels.cases())
    assert capsys.readouterr().out == kernels.verdict(total, total) + "\n"
    # One each, and two for the nested ones: the kernels ran, not the CPU's.
    assert launches >= total
    assert {case.kernel for case in kernels.cases()} == {
        "quantize",
        "quantize_nested",
        "quantize_absmax",
        "dequantize",
        "linear",
        "linear_grouped",
        "optimizer_step",
        "optimizer_norm",
    }


def test_scratch_that_is_poisoned_changes_nothing(capsys):
    seen = []
    with emulated(), kernels.poisoned_scratch():
        poisoned = kernels.backends.CUDA._scratch
        forced, x = kernels.backends.forced_backend(), torch.zeros(20, 1088).bfloat16()
        seen.append(forced._scratch(x, 72).view(torch.uint8))
        assert forced._scratch(x, 0) is None
    assert (seen[0] == 255).all()
    assert len(seen[0]) > 0
    assert kernels.backends.CUDA._scratch is not poisoned
    calls = []
    with emulated(), pytest.MonkeyPatch.context() as patch:
        # Zeros, where the emulator itself would give NaN: the option's bytes are what the kernels see.
        own_scratch = kernels.backends.CUDA._scratch

        def zeros(*arguments):
            scratch = own_scratch(*arguments)
            calls.append(scratch)
            return None if scratch is None else scratch.zero_()

        patch.setattr(kernels.backends.CUDA, "_scratch", zeros)
        assert kernels.main(["--poison-scratch", "--only", "linear bfloat16"], device="cpu") == 0
        assert kernels.backends.CUDA._scratch is zeros
    assert any(scratch is not None and (scratch.view(torch.uint8) == 255).any() for scratch in calls)
    out, err = capsys.readouterr()
    count = len(kernels.LINEAR_SHAPES)
    assert out == kernels.verdict(count, count) + "\n"
    assert err.startswith(f"card kernels: 0 s, case 1 of {count}, linear, bfloat16, 3 rows by [72, 192]")


def test_progress_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "PROGRESS_SECONDS", 0.0)
    with emulated():
        assert kernels.main(["--only", "quantize_absmax 25"], device="cpu") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("case ")[2] for line in lines][1] == (
        "2 of 6, quantize_absmax, 255 constants, an irregular table"
    )
    assert len(lines) == 6


def test_the_cases_reach_every_kernel_of_the_table(monkeypatch):
    card = dispatch.CARDS[90]
    chosen = set()
    for dtype in kernels.DTYPES:
        for (n, k), m, _, _, names in kernels.LINEAR_SHAPES:
            for backward, kernel in enumerate(names if kernels.can_be_forced(dtype, "cpu") else ("", "")):
                with kernels.forced_kernel(kernel):
                    chosen.add(dispatch.choose(card, m, n, k, dtype, bool(backward))["kernel"])
    assert kernels.KERNEL not in os.environ
    monkeypatch.setenv(kernels.KERNEL, "?")
    with pytest.raises(RuntimeError) as problem:
        dispatch.choose(card, 1, 64, 64, torch.bfloat16, False)
    names = str(problem.value).rpartition("there are ")[2].partition(" (")[0]
    assert chosen == set(names.split(", "))


@pytest.mark.parametrize("wrong", [0, torch.nan])
def test_a_wrong_row_of_a_product_is_found(monkeypatch, capsys, wrong):
    right = kernels.ops.linear_forward

    def lazy(*arguments):
        y, u = right(*arguments)
        if kernels.backends.forced_backend() is not None:
            y[-1] = wrong
        return y, u

    monkeypatch.setattr(kernels.ops, "linear_forward", lazy)
    with emulated():
        assert kernels.main(["--only", "linear bfloat16, 50"], device="cpu") == 1
    assert "card kernels: 0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["quantize", "quantize_nested", "quantize_absmax"])
def test_a_wrong_bit_is_found(monkeypatch, capsys, operation):
    right = getattr(kernels.ops, operation)

    def wrong(*arguments):
        results = right(*arguments)
        if kernels.backends.forced_backend() is not None:
            results[-1].view(-1)[-1:].view(torch.uint8)[0] ^= 1
        return results

    monkeypatch.setattr(kernels.ops, operation, wrong)
    with emulated():
        assert kernels.main(["--only", f"{operation} "], device="cpu") == 1
    out = capsys.readouterr().out
    assert f"{operation}, " in out
    assert "1 of " in out
    assert "card kernels: 0 of " in out


@pytest.mark.parametrize("what", ["parameter", "exp_avg_code", "exp_avg_absmax", "master", "step", "norm"])
def test_a_wrong_step_is_found(monkeypatch, capsys, what):
    right = kernels.PagedLion.step

    def wrong(self):
        right(self)
        if kernels.backends.forced_backend() is None:
            return
        p = self.param_groups[0]["params"][0]
        changed = {**self.state[p], "parameter": p.detach(), "norm": self._engine._norm}[what]
        changed.reshape(-1)[-1:].view(torch.uint8)[0] ^= 1

    monkeypatch.setattr(kernels.PagedLion, "step", wrong)
    with emulated():
        case = "optimizer_step PagedLion 8 bits, bfloat16, clipped, scaled"
        assert kernels.main(["--only", case], device="cpu") == 1
    assert "card kernels: 0 of 1" in capsys.readouterr().out


def test_optimizer_cases_reach_every_path():
    """Steps are taken and left out, norms clipped and not, and a norm is of every gradient."""
    with kernels.cpu_kernels():
        results = {case.name: case.run("cpu") for case in kernels.cases() if case.kernel.startswith("optimizer")}
    assert len(results) == 20 + 2 * len(kernels.OPTIMIZER_EXTRAS) + 3
    adamw32 = next(values for name, values in results.items() if name.startswith("PagedAdamW 32"))
    params = len(kernels.OPTIMIZER_COUNTS)
    assert [value.item() for value in adamw32[params + 2 : -2 : 3]] == [3, 2, 3, 3, 3, 3, 0]
    for extra, more, scaler in kernels.OPTIMIZER_EXTRAS:
        norm, skipped = (one.item() for one in results[f"PagedAdamW 32 bits, float32, {extra}"][-2:])
        assert skipped == (3 if scaler and scaler[1] else 1 if "skip_nonfinite" in more else 0)
        assert (norm > 0.5) == bool(more), extra
    for dtype in ("float32", "bfloat16", "float16"):
        assert results[f"of {dtype} gradients"][0].item() > 0


def test_an_element_that_is_not_written_is_found(monkeypatch):
    right = kernels.NF4Weight.dequantize

    def lazy(self, *arguments, out, **more):
        if kernels.backends.forced_backend() is None:
            return right(self, *arguments, out=out, **more)
        out.view(-1)[:-1] = right(self, *arguments, **more).view(-1)[:-1]
        return out

    monkeypatch.setattr(kernels.NF4Weight, "dequantize", lazy)
    with emulated():
        problems = [kernels.check(case, "cpu") for case in kernels.cases() if case.kernel == "dequantize"]
    assert len(problems) == 72
    assert all(problem is not None and "bytes of result 0 differ" in problem for problem in problems)
