"""Every operation, measured at a tiny size; and contenders that do something else are found out."""

from __future__ import annotations

import math
import subprocess
from importlib.util import find_spec

import pytest
import torch
from bench_runs.cases import POINT, POINTS, TINY, WEIGHT, limits_case, measured, small_point

import qlora_kernels
from qlora_kernels.bench import options
from qlora_kernels.bench.case import (
    OURS,
    Case,
)
from qlora_kernels.bench.contenders import weights
from qlora_kernels.bench.contenders.names import (
    BNB,
    DENSE,
    DENSE_F32,
    EQUAL_COPY,
    FOREACH,
    FUSED,
    GGML,
    INT4,
    PEFT,
)
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.operations import CASES, OPERATIONS, begin, gpt2_forward
from qlora_kernels.bench.points import CARD_OPERATIONS, MODELS, SWEEPS, Point, point_of
from qlora_kernels.bench.report import results
from qlora_kernels.bench.timing.measure import Measurement
from qlora_kernels.ops import linear as fused
from qlora_kernels.ops.backends import reference


@pytest.fixture(scope="module")
def tiny() -> dict:
    """A run of every operation but the limits and whole runs, at tiny sizes; through its file elsewhere."""
    run = results.begin(TINY, "usual")
    run["cases"] = [limits_case(), *map(measured, POINTS)]
    return {**run, "complete": True}


@pytest.mark.parametrize(
    ("operation", "what"),
    [("linear_step", "error nan"), ("decode", "error nan"), ("block_step", "adapters' gradients")],
)
def test_a_gradient_or_layer_that_is_wrong_is_not_timed(operation, what, monkeypatch):
    """The last one, behind others that are right."""

    point = next(p for p in POINTS if p.operation == operation and p.rank == 4)
    if operation == "decode":
        original = fused.forward

        def forward(x, *more):
            y, u = original(x, *more)
            return (y * math.nan if tuple(y.shape[1:]) == list(MODELS["tiny"].linears.values())[-1][:1] else y), u

        monkeypatch.setattr(fused, "forward", forward)
    else:
        backward = fused.backward

        def wrong(*arguments):
            dx, dA, dB = backward(*arguments)
            return dx, dA, dB * (math.nan if operation == "linear_step" else 2)

        monkeypatch.setattr(fused, "backward", wrong)
    case = measured(point)
    assert what in case["contenders"][0]["failed"]
    assert all("failed" not in one for one in case["contenders"][1:] if "bitsandbytes" not in one["name"])


def test_an_optimizer_that_does_nothing_is_not_timed(monkeypatch):
    monkeypatch.setattr(qlora_kernels.PagedAdamW, "step", lambda self: None)
    case = measured(next(p for p in POINTS if p.operation == "block_step"))
    assert "of the optimizer's step" in case["contenders"][0]["failed"]
    assert "failed" not in case["contenders"][1]


def test_weights_decode_as_reference_does():
    """Over the boundaries of what is decoded at a time, too."""
    weight = qlora_kernels.quantize(torch.randn(3, 64 * 7 + 24))
    whole = reference.decode(weight.pieces, *weight.shape, torch.bfloat16)
    for at_a_time in (64, 128, 1 << 22):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "_AT_A_TIME", at_a_time)
            assert torch.equal(weights.decoded(weight.pieces, weight.shape, torch.bfloat16), whole)


def test_every_operation_is_measured_and_verified(tiny):
    assert {p.operation for p in POINTS} == set(CASES) - {"limits", *CARD_OPERATIONS}
    for point, case in zip(POINTS, tiny["cases"][1:], strict=True):
        assert point_of(case) == point
        ours = case["contenders"][0]
        assert ours["name"] == OURS
        assert 0 < ours["q0_ms"] <= ours["q20_ms"] <= ours["median_ms"] <= ours["q80_ms"] <= ours["q100_ms"]
        for one in case["contenders"]:
            assert ("failed" in one) != ("median_ms" in one), one
            assert "wrong result" not in one.get("failed", ""), one
            needed = next((name for name in ("bitsandbytes", "ggml") if name in one["name"]), None)
            if needed is None or find_spec(needed):
                assert ("failed" in one) == (point.operation == "dequantize_out" and one["name"] == BNB), one


def test_contenders_of_each_operation(tiny):
    named = {(c["operation"], c["rank"]): [one["name"] for one in c["contenders"]] for c in tiny["cases"]}
    first = ["qlora_kernels", "torch dense", "dequantize, then dense"]
    others = ["torch dense float32", "torch int4", "ggml Q4_0"]
    of_bf16 = [c for c in tiny["cases"] if point_of(c) == small_point("linear_forward", rank=0)]
    assert [one["name"] for one in of_bf16[0]["contenders"]] == [
        *(*first[:2], *others, first[2]),
        *("bitsandbytes", "bitsandbytes, eval-mode layer"),
    ]
    # That of float32, which comes last:
    assert named["linear_forward", 0] == [
        *(*first[:2], *others[1:], first[2]),
        *("bitsandbytes", "bitsandbytes, eval-mode layer"),
    ]
    assert named["linear_dx", None] == [*first, "bitsandbytes"]
    assert named["linear_step", 4] == [*first, "PEFT + bitsandbytes"]
    assert named["linear_step", 0] == [*first, "bitsandbytes"]
    assert named["block_step", 4] == [OURS, DENSE, PEFT]
    assert named["adamw_step", 4] == [OURS, FUSED, FOREACH, BNB, EQUAL_COPY]


def test_bytes_are_what_the_work_must_move(tiny):
    n, k = WEIGHT["n"], WEIGHT["k"]
    cases = {point_of(case): case for case in tiny["cases"]}
    stored = qlora_kernels.quantize(torch.randn(n, k)).nbytes
    forward = {c["name"]: c.get("bytes") for c in cases[POINT]["contenders"]}
    assert forward[OURS] == stored + 2 * (n + k)
    assert forward[DENSE] == 2 * n * k + 2 * (n + k)
    assert forward[DENSE_F32] == 4 * n * k + 4 * (n + k)
    assert forward[INT4] == n * k // 2 + 4 * n * k // 64 + 2 * (n + k)
    assert forward[GGML] == (18 * n * k // 32 + 4 * (n + k) if find_spec("ggml") else None)
    assert cases[POINT]["flops"] == 2 * n * k
    step = cases[Point("linear_step", m=20, rank=4, **WEIGHT)]
    assert step["flops"] == 4 * 20 * n * k + 6 * 20 * 4 * (n + k)
    dequantized = {c["name"]: c.get("bytes") for c in cases[Point("dequantize", **WEIGHT)]["contenders"]}
    assert dequantized[OURS] == stored + 2 * n * k
    tensors = Lab(TINY, Point("adamw_step", "float32", rank=4, model="tiny")).adapter_tensors
    assert len(tensors.parameters) == 2 * 7 * MODELS["tiny"].layers
    each = {"adamw_step": 28, "adamw_clipped_step": 32, "adamw_8bit_step": 16.0625, "lion_step": 20}
    for case in tiny["cases"]:
        if case["operation"] in each:
            assert case["contenders"][0]["bytes"] == each[case["operation"]] * tensors.count


def test_a_format_is_held_against_the_weight_before_quantization(tiny):
    """Beside the error of the product by itself; what is not quantized has none."""
    case = next(case for case in tiny["cases"] if point_of(case) == POINT)
    figures = {c["name"]: c for c in case["contenders"] if "failed" not in c}
    for name in (OURS, INT4, *([GGML] if GGML in figures else [])):
        assert figures[name]["error"] < 0.02 < 0.05 < figures[name]["format_error"] < 0.15
    assert "format_error" not in figures[DENSE]
    assert figures[DENSE_F32]["error"] < 1e-6


def test_memory_by_part_of_a_block(tiny):
    """Weights by their storage, moments as each optimizer keeps them; the 4-bit blocks allocate the least."""
    case = next(case for case in tiny["cases"] if case["operation"] == "block_step")
    ours, dense = case["contenders"][:2]
    count = sum(4 * (n + k) for n, k in MODELS["tiny"].linears.values())
    weights = sum(n * k for n, k in MODELS["tiny"].linears.values())
    assert dense["parts"] == {
        "weights": 2 * weights,
        "adapters": 2 * count,
        "gradients": 2 * count,
        "optimizer states": 4 * count,  # torch's have the parameters' dtype
    }
    assert ours["parts"] == {**dense["parts"], "weights": ours["parts"]["weights"], "optimizer states": 8 * count}
    assert 4.1 < 8 * ours["parts"]["weights"] / weights < 4.2
    assert 2 * count < ours["peak_allocated"] < dense["peak_allocated"]


def test_adapters_of_the_latency_table():
    """11 million parameters at full size, two adapters a layer by Houlsby et al., one with its norm by Lin et al."""
    size = gpt2_forward.SIZES["gpt2-medium"]
    for houlsby in (True, False):
        with torch.device("meta"):
            one = gpt2_forward.Adapter(size.width, gpt2_forward.inner_of(size, houlsby), norm=not houlsby)
        count = sum(p.numel() for p in one.parameters()) * size.layers * (2 if houlsby else 1)
        assert count == pytest.approx(11e6, rel=0.01)
        model = gpt2_forward.base_model(gpt2_forward.SIZES["tiny"], 8)
        gpt2_forward.add_adapters(model, gpt2_forward.SIZES["tiny"], houlsby)
        adapters = [module for module in model.modules() if isinstance(module, gpt2_forward.Adapter)]
        assert len(adapters) == len(model.h) * (2 if houlsby else 1)
        assert all((one.norm is None) == houlsby for one in adapters)


def test_base_of_the_latency_table_computes_what_gpt2_does():
    """With nn.Linear in the place of Conv1D."""
    from transformers import GPT2Config, GPT2Model

    model = gpt2_forward.base_model(gpt2_forward.SIZES["tiny"], 8)
    torch.manual_seed(0)
    original = GPT2Model(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=1024)).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = original(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_shapes_of_models():
    """As in the models' published configurations."""
    assert set(MODELS["llama-2-7b"].linears.values()) == {(4096, 4096), (11008, 4096), (4096, 11008)}
    assert MODELS["llama-3-8b"].linears["k"] == (1024, 4096)
    assert MODELS["llama-3-70b"].linears["v"] == (1024, 8192)
    count = {"llama-2-7b": 202_375_168, "llama-3-8b": 218_103_808, "llama-3-70b": 855_638_016}
    for name, elements in count.items():
        assert sum(n * k for n, k in MODELS[name].linears.values()) == elements


def test_sweeps_know_every_operation():
    assert set(options.AXES) == set(OPERATIONS)
    for sweep in SWEEPS.values():
        points = sweep()
        assert len(set(points)) == len(points)
        assert (points[0].operation == "limits") == (sweep is not SWEEPS["rivals"])
        assert {p.operation for p in points} <= set(OPERATIONS)
    assert {p.operation for p in SWEEPS["usual"]()} == set(OPERATIONS) - {
        *("gpt2_forward", "linear_backward", "rank_study", *CARD_OPERATIONS),
    }
    assert {p.operation for p in SWEEPS["full"]()} == set(OPERATIONS) - {"rank_study", *CARD_OPERATIONS}
    assert {(p.n, p.k, p.rank) for p in SWEEPS["rivals"]()} == {(4096, 4096, 0)}
    assert set(CARD_OPERATIONS) <= {p.operation for p in SWEEPS["card"]()}
    full = SWEEPS["full"]()
    assert set(SWEEPS["usual"]()) <= set(full)
    assert {1, 16384} <= {p.m for p in full}
    assert {0, 256} <= {p.rank for p in full}
    assert {p.dtype for p in full} == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("adamw", {"lr": 1.01e-3}),
        ("adamw", {"betas": (0.9, 0.99)}),
        ("adamw", {"betas": (0.8, 0.999)}),
        ("adamw", {"weight_decay": 0.0}),
        ("adamw_clipped", {"max_grad_norm": None}),
        ("adamw_8bit", {"lr": 1.5e-3}),
        ("lion", {"betas": (0.99, 0.99)}),
    ],
)
def test_an_optimizer_that_does_something_else_is_not_timed(case, changed, monkeypatch):
    from qlora_kernels.bench.operations import optimizer

    name = "PagedLion" if case == "lion" else "PagedAdamW"
    original = getattr(optimizer, name)
    monkeypatch.setattr(optimizer, name, lambda params, **given: original(params, **{**given, **changed}))
    # So many elements that the gradients' norm is above the one that is clipped to.
    lab = Lab(TINY, Point(f"{case}_step", "float32", rank=256, model="tiny"))
    ours = getattr(optimizer, case)(lab).contenders[:1]
    case = Measurement(Case("", None, ours), TINY, lab.point)
    assert case.runners[0].failure.startswith("wrong result")


def test_a_layer_that_forgets_its_adapter_is_not_timed(monkeypatch):
    monkeypatch.setattr(qlora_kernels.QLinear, "forward", lambda self, x: qlora_kernels.linear(x, self.weight))
    for point in (small_point("linear_forward", rank=4), small_point("decode"), small_point("gpt2_forward")):
        begun = begin(TINY, point)
        assert begun.runners[0].failure.startswith("wrong result")


@pytest.mark.share(2)
def test_finetune_is_measured_by_its_command(monkeypatch):
    """Each run in a process of its own, tokens per second from its metrics; a run that fails says its last line."""
    from qlora_kernels.bench.operations import finetune

    # A model whose steps take no time worth mentioning, and only two of them.
    monkeypatch.setattr(finetune, "STEPS", 2)
    small = ["--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "16", "--seq-len", "16", "--steps", "2"]
    monkeypatch.setattr(finetune, "_ARGUMENTS", (*finetune._ARGUMENTS, *small))
    case = measured(Point("finetune", rank=2))
    assert [c["name"] for c in case["contenders"]] == list(finetune.RESULTS)
    for one in case["contenders"]:
        assert one["tokens_per_second"] == pytest.approx(1e3 * finetune.BATCH * finetune.TOKENS / one["median_ms"])
        assert one["peak_method"]
    last = "qlora-kernels finetune: --rank should be at least 1, found 0"
    ended = subprocess.CompletedProcess([], 2, stdout="", stderr=f"first words\n{last}\n")
    monkeypatch.setattr(finetune.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match="--rank should be at least 1"):
        measured(Point("finetune", rank=0))
