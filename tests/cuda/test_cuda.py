"""The CUDA kernels beyond their results: launches, memory traffic, alignment, sizes, errors, and the layer as a whole.

What needs no card runs on the emulator; the rest is marked gpu.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from contract import make_weight, relative_error
from cuda_code.calls import call_kernels, weight_of
from emulated import counted, emulated, lines, module
from engines import forced, on_the_cpu

from qlora_kernels import NF4Weight, QLinear, default_nested_table, linear, ops, quantize
from qlora_kernels.native import extension
from qlora_kernels.ops.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------- launches and traffic


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantization_takes_two_launches_and_dequantization_one(dtype):
    weight = torch.randn(40, 192).to(dtype)
    assert counted(lambda: quantize(weight))["launches"] == 2
    assert counted(lambda: quantize(weight, double_quant=False))["launches"] == 1
    quantized = quantize(weight)
    assert counted(lambda: quantized.dequantize(dtype))["launches"] == 1
    assert counted(lambda: quantized.dequantize(dtype, row_begin=3, row_end=3))["launches"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_moves_each_byte_once_in_whole_sectors(dtype):
    n, k = 64, 512
    quantized = make_weight(n, k)
    counts = counted(lambda: quantized.dequantize(dtype))
    loads, stores = (lines(counts["global"], "dequantize.cuh", kind) for kind in ("load", "store"))
    for accesses, size in ((loads, n * k // 2), (stores, n * k * torch.finfo(dtype).bits // 8)):
        assert sum(t["bytes"] for t in accesses.values()) == size
        for place, t in accesses.items():
            assert t["actual"] == t["minimum"] == t["bytes"] // 32, place
            assert t["bytes"] == 512 * t["requests"], f"{place}: not 16 bytes a lane"
    shared = {**lines(counts["shared"], "dequantize.cuh", "load"), **lines(counts["shared"], "dequantize.cuh", "store")}
    assert shared
    assert all(t["actual"] == t["minimum"] for t in shared.values()), "bank conflicts"


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_moves_each_byte_once_in_whole_sectors(dtype):
    n, k = 64, 512
    weight = torch.randn(n, k).to(dtype)
    counts = counted(lambda: quantize(weight, double_quant=False))
    loads, stores = (lines(counts["global"], "quantize.cuh", kind) for kind in ("load", "store"))
    assert sum(t["bytes"] for t in loads.values()) == weight.nbytes
    assert all(t["actual"] == t["minimum"] for t in (*loads.values(), *stores.values()))
    assert all(t["bytes"] == 512 * t["requests"] for t in loads.values()), "not 16 bytes a lane"
    # Codes, and the constants.
    assert sum(t["bytes"] for t in stores.values()) == n * k // 2 + n * k // 64 * 4


# ---------------------------------------------------------------------------------------------- alignment and size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_tensors_not_aligned_to_16_bytes(cuda_engine, dtype, offset):
    n, k = 21, 192
    room = torch.randn(n * k + offset).to(dtype)
    weight = room[offset:].view(n, k)
    quantized = quantize(weight)
    with forced("portable"), on_the_cpu():
        expected = quantize(weight.cpu())
    for a, b in zip(quantized.pieces, expected.pieces, strict=True):
        assert torch.equal(a.cpu(), b)
    packed = torch.cat((quantized.packed.new_zeros(offset), quantized.packed))[offset:]
    moved = NF4Weight(packed, *quantized.pieces[1:], quantized.shape, dtype)
    out = torch.full((n * k + offset,), torch.nan, dtype=dtype)[offset:].view(n, k)
    moved.dequantize(out=out)
    with on_the_cpu(), forced("portable"):
        assert torch.equal(out.cpu(), expected.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_weights_than_32_bits_count(cuda_engine, dtype):
    # 2^31 + 3 * 2^16 weights. Only the last rows are decoded; the rest is never touched.
    n, k = 2**15 + 3, 2**16
    blocks = n * k // 64
    packed = torch.zeros(n * k // 2, dtype=torch.uint8)
    absmax = torch.zeros(blocks, dtype=torch.uint8)
    nested = torch.zeros((blocks + 255) // 256)
    packed[-k:] = torch.randint(0, 256, (k,), dtype=torch.uint8)
    absmax[-2 * k // 64 :] = torch.randint(0, 256, (2 * k // 64,), dtype=torch.uint8)
    nested[-8:] = torch.rand(8)
    table = default_nested_table(packed.device)
    weight = NF4Weight(packed, absmax, nested, torch.ones(1), table, torch.Size((n, k)))
    decoded = weight.dequantize(dtype, row_begin=n - 2, row_end=n)
    tail = (packed[-k:], absmax[-2 * k // 64 :], nested[-8:], weight.nested_offset, table)
    assert torch.equal(decoded, reference.decode(tail, 2, k, dtype))


@pytest.mark.gpu
def test_more_weights_than_32_bits_count_to_quantize():
    n, k = 2**15 + 1, 2**16
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    weight = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_()
    quantized = quantize(weight, double_quant=False)
    tail = quantize(weight[-1:].cpu(), double_quant=False)
    assert torch.equal(quantized.packed[-k // 2 :].cpu(), tail.packed)
    assert torch.equal(quantized.absmax[-k // 64 :].cpu(), tail.absmax)


# -------------------------------------------------------------------------------------------------------- errors


def test_a_launch_that_fails_is_an_exception_and_the_next_one_works():
    weight = torch.randn(8, 64)
    with emulated(max_shared_bytes=64), pytest.raises(RuntimeError, match="shared memory, of 64"):
        quantize(weight)
    with emulated():
        quantized = quantize(weight)
    assert all(torch.equal(a, b) for a, b in zip(quantized.pieces, quantize(weight).pieces, strict=True))


def test_errors_of_the_launchers_say_where(cuda_engine):
    kernels = extension.native().cuda if cuda_engine == "cuda" else module()
    with pytest.raises(
        RuntimeError, match=r"csrc/cuda/common/aligned\.h:\d+: the weight to quantize .*of 4.*failed: \(lies_on"
    ):
        call_kernels(kernels, "quantize", weight=2, count=64)
    with pytest.raises(RuntimeError, match=r"csrc/cuda/common/aligned\.h:\d+: the result of dequantize .*multiple"):
        call_kernels(kernels, "dequantize", weight=weight_of(kernels, n=1, k=64), out=2, row_end=1)
    with pytest.raises(RuntimeError, match=r"aligned\.h:\d+: the constants of a weight should lie on a multiple of 4"):
        call_kernels(kernels, "dequantize", weight=weight_of(kernels, absmax=2, n=1, k=64), row_end=1)
    with pytest.raises(RuntimeError, match="x, u, y, lora_A and lora_B should lie on a multiple of 2 bytes"):
        call_kernels(kernels, "linear_forward", weight=weight_of(kernels, n=1, k=64), x=1, m=1, scaling=1.0, dtype=1)
    with pytest.raises(RuntimeError, match="dy, x, u, dx, lora_A and lora_B should lie on a multiple of 4 bytes"):
        call_kernels(kernels, "linear_backward", weight=weight_of(kernels, n=1, k=64), dy=2, m=1, scaling=1.0)
    with pytest.raises(RuntimeError, match="unknown dtype code 7"):
        call_kernels(kernels, "dequantize", weight=weight_of(kernels, n=1, k=64), row_end=1, dtype=7)
    with pytest.raises(RuntimeError, match=r"quantize_absmax\.cu:\d+: there are no constants"):
        call_kernels(kernels, "quantize_absmax")
    with pytest.raises(RuntimeError, match=r"more than 2\^34"):
        call_kernels(kernels, "quantize_absmax", count=2**30)
    with pytest.raises(RuntimeError, match="the field 'out' is missing, or 'row_begin' comes before it"):
        kernels.dequantize({"weight": weight_of(kernels, n=1, k=64), "row_begin": 0})
    with pytest.raises(RuntimeError, match="the field 'out' is missing"):
        kernels.dequantize({"weight": weight_of(kernels, n=1, k=64)})
    with pytest.raises(RuntimeError, match="there is no field 'more'"):
        weight_of(SimpleNamespace(Weight=lambda fields: kernels.Weight({**fields, "more": 1})))


def test_a_weight_that_is_not_finite_decodes_to_nan_and_no_neighbour_does(cuda_engine):
    # As in a captured graph, which cannot refuse anything.
    weight = torch.randn(4, 256)
    weight[1, 70] = torch.inf
    packed, absmax = ops.quantize(weight, "weight")
    assert absmax.isnan().nonzero().flatten().tolist() == [5]
    dense = NF4Weight(packed, absmax, None, None, None, weight.shape).dequantize()
    assert dense.isnan().flatten().nonzero().flatten().tolist() == list(range(5 * 64, 6 * 64))


def test_bad_operands_are_refused_before_any_launch():
    weight = make_weight(8, 64)

    def refused():
        for call, error, words in (
            (lambda: quantize(torch.randn(4, 64).double()), TypeError, "float64"),
            (lambda: ops.quantize(torch.randn(64, 4).T), ValueError, "contiguous"),
            (lambda: ops.quantize_nested(torch.randn(4, 64), torch.zeros(255)), ValueError, "256 entries"),
            (lambda: ops.quantize_nested(torch.randn(4, 64), torch.zeros(256).double()), TypeError, "float32"),
            (
                lambda: ops.quantize_nested(torch.randn(4, 64), torch.zeros(256, device="meta")),
                Exception,
                "meta|device",
            ),
            (lambda: ops.quantize_absmax(torch.rand(4), torch.zeros(512)[::2]), ValueError, "contiguous"),
            (lambda: weight.dequantize(torch.int8), TypeError, "int8"),
            (lambda: weight.dequantize(row_begin=3, row_end=9), ValueError, "rows"),
            (lambda: weight.dequantize(out=torch.zeros(64, 8).T), ValueError, "contiguous|shape|out should"),
        ):
            with pytest.raises(error, match=words):
                call()

    assert counted(refused)["launches"] == 0


# ------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layer_on_cuda_agrees_with_the_cpu(cuda_engine, dtype):
    torch.manual_seed(1)
    n, k, m, r = 40, 128, 9, 4
    with on_the_cpu():
        weight = make_weight(n, k)
        given = [torch.randn(*shape).to(dtype) for shape in ((m, k), (r, k), (n, r), (m, n))]
        bias = torch.randn(n).to(dtype)
    device = "cuda" if cuda_engine == "cuda" else "cpu"

    def gradients(device):
        x, A, B = (t.detach().to(device).requires_grad_() for t in given[:3])
        y = linear(x, weight.to(device), bias.to(device), A, B, scaling=0.5)
        y.backward(given[3].to(device))
        return [t.double().cpu() for t in (y.detach(), x.grad, A.grad, B.grad)]

    actual = gradients(device)
    with on_the_cpu():
        expected = gradients("cpu")
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_on_cuda_gives_the_losses_of_the_cpu(cuda_engine, dtype):
    device = "cuda" if cuda_engine == "cuda" else "cpu"
    generator = torch.Generator(device="cpu").manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cpu")

    weights = [normal(96, 64) / 8, normal(64, 96) / 8]
    adapters = [normal(4, 64) / 8, normal(4, 96) / 8]
    x, wanted = normal(12, 64), normal(12, 64)

    def losses(device):
        layers = []
        for weight, A in zip(weights, adapters):
            dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device, dtype=dtype)
            dense.weight.data.copy_(weight)
            layer = QLinear.from_linear(dense, rank=4, alpha=8)
            layer.lora_A["default"].data.copy_(A)
            layers.append(layer)
        model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        curve = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = (model(x.to(device, dtype)) - wanted.to(device, dtype)).float().square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve, device="cpu")

    actual = losses(device)
    with on_the_cpu():
        expected = losses("cpu")
    assert (actual[1:] < actual[:-1]).all(), f"it learns nothing: {actual}"
    assert (actual - expected).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.max()


def test_scratch_holds_what_it_held_before():
    # The tickets of an earlier launch, of another one, and of a replay of the same.
    weight = make_weight(128, 1024)
    x = torch.randn(20, 1024).bfloat16()
    with emulated(multiprocessors=4, architecture=80):
        kernels = module()
        size = kernels.linear_scratch(20, 128, 1024, 0, 1, False, False, False, 0)
        assert 0 < size <= 2**24
        scratch, results = torch.zeros(size // 8, dtype=torch.int64), []
        native = weight.operand().native(kernels.Weight)
        for _ in range(3):
            y = torch.full((20, 128), torch.nan, dtype=torch.bfloat16)
            fields = {"weight": native, "x": x.data_ptr(), "y": y.data_ptr(), "m": 20, "scaling": 1.0, "dtype": 1}
            call_kernels(kernels, "linear_forward", **fields, scratch=scratch.data_ptr())
            results.append(y)
            assert scratch[0] == 0, "the last block takes the launch's number away"
        with pytest.raises(RuntimeError, match="need scratch"):
            call_kernels(kernels, "linear_forward", **fields)
    assert all(torch.equal(results[0], y) for y in results[1:])


def test_a_weight_that_rounds_to_infinity_affects_only_its_row(cuda_engine):
    # K = 192 and 320: the last 64 columns that a warp takes lie beyond it.
    for k in (192, 320):
        weight = torch.randn(9, k)
        weight[4, -3] = 1e5
        quantized = NF4Weight(*ops.quantize(weight, "weight"), None, None, None, weight.shape)
        for m in (1, 8, 12, 20, 40, 70):
            x = torch.rand(m, k).half() + 1.0
            y, _ = ops.linear_forward(x, *quantized.pieces, 9, None, None, None, 1.0, 0.0, None)
            assert (y[:, 4] == torch.inf).all()
            assert y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_an_offset_of_the_constants_beyond_fp16_does_not_leak_past_the_edges(cuda_engine):
    # A block of 1e8 makes their mean 2e5. Rows of W beyond N = 9 have no constants, columns beyond K none that count.
    weight = torch.randn(9, 4096)
    weight[0, 5] = 1e8
    quantized = quantize(weight)
    assert quantized.nested_offset.item() > 65520
    dense = quantized.dequantize(torch.float16)
    for m in (1, 12, 70):
        x, dy = torch.rand(m, 4096).half() + 0.5, torch.rand(m, 9).half() + 0.5
        y, _ = ops.linear_forward(x, *quantized.pieces, 9, None, None, None, 1.0, 0.0, None)
        assert torch.equal(y.isfinite(), (x.double() @ dense.double().T).half().isfinite())
        dx, _, _ = ops.linear_backward(
            dy, *quantized.pieces, 4096, None, None, None, None, 1.0, 0.0, None, True, False, False
        )
        assert torch.equal(dx.isfinite(), (dy.double() @ dense.double()).half().isfinite())


def test_a_constant_that_is_nan_affects_only_its_row_of_the_weight(cuda_engine):
    # K = 192: the last 64 columns that a warp takes lie beyond it. N = 9: rows lie beyond it, too.
    weight = torch.randn(9, 192)
    weight[0, 3] = torch.nan
    packed, absmax = ops.quantize(weight, "weight")
    quantized = NF4Weight(packed, absmax, None, None, None, weight.shape)
    for m in (1, 12, 20, 70):
        x, dy = torch.randn(m, 192).bfloat16(), torch.randn(m, 9).bfloat16()
        y, _ = ops.linear_forward(x, *quantized.pieces, 9, None, None, None, 1.0, 0.0, None)
        assert y.isnan().any(0).nonzero().flatten().tolist() == [0]
        dx, _, _ = ops.linear_backward(
            dy, *quantized.pieces, 192, None, None, None, None, 1.0, 0.0, None, True, False, False
        )
        assert dx.isnan().any(0).nonzero().flatten().tolist() == list(range(64))
