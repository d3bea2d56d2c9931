"""Every CUDA kernel, each instance of its template, runs on the emulator in every quick run, whatever the day.

These cases have no order to choose and no share. They are small, and their results are compared with the CPU's.
"""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
import torch
from contract import make_weight, relative_error
from emulated import ROOT, emulated, instances, module
from engines import on_the_cpu
from optimizers.runs import net, train

from qlora_kernels import PagedAdamW, PagedLion, default_nested_table, ops, quantize, quantize_stack

FORCED = "QLORA_KERNELS_CUDA_KERNEL"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
#: The rows of the dispatch table but "floats", which takes whatever these refuse.
FEW_ROWS = ("few", "middle8", "middle16", "middle32")
WARPGROUPS = ("warpgroup16", "warpgroup32", "warpgroup64", "warpgroup128")
TILES = ("tiles16", "tiles32", "tiles64", "tiles128", "tiles128x3", "tiles128wide", "tiles32any")


def assert_same_on_the_cpu(call, tolerance: float = 0.0) -> None:
    """Calls an operation on the emulator and on the CPU; all tensors that it returns agree."""
    actual = call()
    with on_the_cpu():
        expected = call()
    for a, b in zip(actual, expected, strict=True):
        if tolerance == 0 or b.numel() == 0:
            assert torch.equal(a, b)
        else:
            assert relative_error(a, b.double()) < tolerance


def layer(dtype, k: int, r: int, adapters=None, m: int = 5) -> None:
    """Forward and backward of the layer, with an adapter unless r is 0."""
    n = 40
    weight = make_weight(n, k)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    A, B = (torch.randn(r, k).to(adapters or dtype), torch.randn(n, r).to(adapters or dtype)) if r else (None, None)

    def call():
        y, u = ops.linear_forward(x, *weight.pieces, n, None, A, B, 1.0, 0.0, None)
        gradients = [(True, True, True), (True, False, False), (False, False, True)] if r else [(True, False, False)]
        rest = (A, B, 1.0, 0.0, None)
        saved = (x, u) if r else (None, None)
        return y, *(g for needs in gradients for g in ops.linear_backward(dy, *weight.pieces, k, *saved, *rest, *needs))

    assert_same_on_the_cpu(call, 2e-2 if dtype in HALVES else 1e-5)


def quantization(monkeypatch):
    for dtype in DTYPES:
        weight = torch.randn(20, 192).to(dtype)
        assert_same_on_the_cpu(lambda weight=weight: quantize(weight).pieces)
    table, absmax = default_nested_table("cpu"), torch.rand(300)
    assert_same_on_the_cpu(lambda: ops.quantize_absmax(absmax, table))


def dequantization(monkeypatch):
    for dtype in DTYPES:
        weight, out = make_weight(20, 192, dtype=dtype), torch.empty(20 * 192 + 1, dtype=dtype)
        assert_same_on_the_cpu(lambda weight=weight, dtype=dtype: [weight.dequantize(dtype)])
        assert_same_on_the_cpu(lambda weight=weight, out=out: [weight.dequantize(out=out[1:].view(20, 192)).clone()])


def few_and_middle_rows(monkeypatch):
    for kernel in (*FEW_ROWS, *WARPGROUPS):
        weight_of = {double_quant: make_weight(40, 192, double_quant) for double_quant in (True, False)}
        monkeypatch.setenv(FORCED, kernel)
        for weight in weight_of.values():
            for dtype in HALVES:
                x = torch.randn(5, 192).to(dtype)
                arguments = (x, *weight.pieces, 40, None, None, None, 1.0, 0.0, None)
                assert_same_on_the_cpu(lambda arguments=arguments: ops.linear_forward(*arguments)[:1], 1e-2)


def tiles(monkeypatch):
    for kernel in TILES:
        monkeypatch.setenv(FORCED, kernel)
        for dtype in HALVES:
            layer(dtype, 128, 0)


def adapters_on_tensor_cores(monkeypatch):
    for dtype in HALVES:
        for r in (16, 17):
            layer(dtype, 128, r, torch.float32, m=300)


def products_on_float32_units(monkeypatch):
    # Too little shared memory for any kernel on tensor cores.
    module().configure(max_shared_bytes=40 * 1024)
    for dtype in DTYPES:
        layer(dtype, 128, 3)


def experts(monkeypatch):
    n = 40
    # Few rows and many; a K of no whole blocks is for the float32 units.
    for dtype, (k, m) in itertools.product(DTYPES, ((128, 5), (128, 50), (100, 5))):
        stack, offsets = quantize_stack(torch.randn(3, n, k)), torch.tensor([0, 3, 3, m])
        x, dy, A, B = (torch.randn(*s).to(dtype) for s in ((m, k), (m, n), (3, 4, k), (3, n, 4)))

        def call(stack=stack, offsets=offsets, x=x, dy=dy, A=A, B=B, k=k):
            y, u = ops.linear_grouped_forward(x, *stack.pieces, offsets, n, None, A, B, 1.0)
            rest = (x, u, A, B, 1.0, True, True, True)
            return y, *ops.linear_grouped_backward(dy, *stack.pieces, offsets, k, *rest)

        assert_same_on_the_cpu(call, 2e-2 if dtype in HALVES else 1e-5)


def optimizers(monkeypatch):
    for kind in (PagedAdamW, PagedLion):
        for state_bits in (8, 32):
            models = []
            for place in (contextlib.nullcontext, on_the_cpu):
                with place():
                    model = net()
                    train(model, kind(model.parameters(), state_bits=state_bits, max_grad_norm=0.1), range(2))
                models.append(model)
            for p, q in zip(*(model.parameters() for model in models), strict=True):
                assert torch.equal(p, q)


#: Each case, and the kernels of which it runs every instance.
CASES = {
    quantization: ("quantize_kernel", "absmax_sums_kernel", "quantize_absmax_kernel"),
    dequantization: ("dequantize_kernel",),
    few_and_middle_rows: ("few_kernel", "middle_kernel", "warpgroup_kernel"),
    tiles: ("gemm_kernel",),
    adapters_on_tensor_cores: ("narrow_kernel", "adapter_down_kernel", "adapter_gradient_kernel", "adapter_sum_kernel"),
    products_on_float32_units: ("product_kernel",),
    experts: ("grouped_gemm_kernel", "grouped_product_kernel"),
    optimizers: ("optimizer_norm_kernel", "optimizer_step_kernel"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_instance_runs(case, monkeypatch):
    with emulated():
        module().reset_counters()
        case(monkeypatch)
    run = set(module().kernels_run())
    missed = [name + arguments for address, (name, arguments) in instances().items() if address not in run]
    assert not [name for name in missed if name.partition("<")[0] in CASES[case]]


def test_every_kernel_and_row_of_the_sources_has_a_case():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"))
    declared = re.findall(r"__global__[^{;]*?\b(\w+)\(const __grid_constant__", sources)
    assert len(declared) == sources.count("__global__")
    rows = re.findall(r'\{"(\w+)", Family::', (ROOT / "csrc/cuda/common/dispatch.h").read_text())
    assert set(rows) == {*FEW_ROWS, *WARPGROUPS, *TILES, "floats"}
    assert set(declared) == {name for name, _ in instances().values()} == {k for names in CASES.values() for k in names}
