"""The CUDA kernels beyond their results: launches, memory traffic, alignment, sizes, errors.

What needs no card runs on the emulator; the rest is marked gpu.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from contract import assert_within_contract, make_weight, relative_error
from cuda_calls import call_kernels, weight_of
from emulated import counters, emulated, module
from engines import ORDERS, engine_named, forced, on_the_cpu

from qlora_kernels import NF4Weight, QLinear, default_nested_table, linear, ops, quantize
from qlora_kernels.native import extension
from qlora_kernels.ops.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[*(f"emulated-{order}" for order in ORDERS), pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_engine(request):
    """The CUDA kernels: on the emulator in each order, and on a card."""
    with engine_named(request.param):
        yield request.param


def counted(call, **settings) -> dict:
    with emulated(**settings):
        module().reset_counters()
        call()
        return counters()


# ------------------------------------------------------------------------------------------- launches and traffic


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantization_takes_two_launches_and_dequantization_one(dtype):
    weight = torch.randn(40, 192).to(dtype)
    assert counted(lambda: quantize(weight))["launches"] == 2
    assert counted(lambda: quantize(weight, double_quant=False))["launches"] == 1
    quantized = quantize(weight)
    assert counted(lambda: quantized.dequantize(dtype))["launches"] == 1
    assert counted(lambda: quantized.dequantize(dtype, row_begin=3, row_end=3))["launches"] == 0


def lines(traffic: dict, file: str, kind: str) -> dict:
    return {place: t for place, t in traffic.items() if place.startswith(f"{file}:") and place.endswith(kind)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_moves_each_byte_once_in_whole_sectors(dtype):
    n, k = 64, 512
    quantized = make_weight(n, k)
    found = counted(lambda: quantized.dequantize(dtype))
    loads, stores = (lines(found["global"], "dequantize.cuh", kind) for kind in ("load", "store"))
    for accesses, size in ((loads, n * k // 2), (stores, n * k * torch.finfo(dtype).bits // 8)):
        assert sum(t["bytes"] for t in accesses.values()) == size
        for place, t in accesses.items():
            assert t["actual"] == t["minimum"] == t["bytes"] // 32, place
            assert t["bytes"] == 512 * t["requests"], f"{place}: not 16 bytes a lane"
    shared = {**lines(found["shared"], "dequantize.cuh", "load"), **lines(found["shared"], "dequantize.cuh", "store")}
    assert shared
    assert all(t["actual"] == t["minimum"] for t in shared.values()), "bank conflicts"


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_moves_each_byte_once_in_whole_sectors(dtype):
    n, k = 64, 512
    weight = torch.randn(n, k).to(dtype)
    found = counted(lambda: quantize(weight, double_quant=False))
    loads, stores = (lines(found["global"], "quantize.cuh", kind) for kind in ("load", "store"))
    assert sum(t["bytes"] for t in loads.values()) == weight.nbytes
    assert all(t["actual"] == t["minimum"] for t in (*loads.values(), *stores.values()))
    assert all(t["bytes"] == 512 * t["requests"] for t in loads.values()), "not 16 bytes a lane"
    # Codes, and the constants.
    assert sum(t["bytes"] for t in stores.values()) == n * k // 2 + n * k // 64 * 4


# ---------------------------------------------------------------------------------------------- alignment and size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_tensors_that_lie_on_no_16_bytes(cuda_engine, dtype, offset):
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
    # 2^31 + 3 * 2^16 weights, of which only the last rows are looked at: the rest is never touched.
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
    found = weight.dequantize(dtype, row_begin=n - 2, row_end=n)
    tail = (packed[-k:], absmax[-2 * k // 64 :], nested[-8:], weight.nested_offset, table)
    assert torch.equal(found, reference.decode(tail, 2, k, dtype))


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
        found = quantize(weight)
    assert all(torch.equal(a, b) for a, b in zip(found.pieces, quantize(weight).pieces, strict=True))


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
    # What a captured graph would give, where nothing can be refused.
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

    found = gradients(device)
    with on_the_cpu():
        expected = gradients("cpu")
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_on_cuda_has_the_losses_of_the_cpu(cuda_engine, dtype):
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
        found = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = (model(x.to(device, dtype)) - wanted.to(device, dtype)).float().square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, device="cpu")

    found = losses(device)
    with on_the_cpu():
        expected = losses("cpu")
    assert (found[1:] < found[:-1]).all(), f"it learns nothing: {found}"
    assert (found - expected).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.max()


#: N and K that the tensor cores' kernels take: one tile and less; N that is odd, or even but no multiple of 8; tails
#: both ways, K = 64 modulo 128; a long K.
TILED = ((128, 128), (24, 64), (77, 192), (130, 320), (264, 448), (40, 4160))
TILED_ROWS = (1, 7, 16, 17, 63, 64, 65, 129)


def tiled_case(engine: str, index: int, shape: tuple[int, int]) -> tuple[int, ...]:
    """On the emulator, each order takes other rows of the list; the long K takes few."""
    if engine == "cuda":
        return TILED_ROWS
    rows = TILED_ROWS[:3] if shape[1] > 1000 else TILED_ROWS
    return rows[ORDERS.index(engine.removeprefix("emulated-")) + index % 2 :: 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", TILED)
def test_the_tensor_cores_kernels_keep_the_contract(cuda_engine, shape, dtype):
    n, k = shape
    weight = make_weight(n, k, dtype=dtype)
    dense = weight.dequantize(dtype)
    for m in tiled_case(cuda_engine, TILED.index(shape), shape):
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
        dx, _, _ = ops.linear_backward(
            dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False
        )
        case = f"{cuda_engine} {dtype} M={m} N={n} K={k}"
        assert_within_contract(y, x @ dense.T, x.double() @ dense.double().T, case)
        assert_within_contract(dx, dy @ dense, dy.double() @ dense.double(), case + " dx")


@pytest.mark.parametrize(
    "kernel", ["tiles16", "tiles32", "tiles64", "tiles128wide", "tiles128", "tiles128x3", "floats"]
)
def test_every_kernel_keeps_the_contract_where_it_is_forced(cuda_engine, monkeypatch, kernel):
    # What the table would not choose for such a weight, too: two tiles down and three across, or less.
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    n, k, m = 264, 320, 131 if kernel != "tiles16" else 30
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
    dx, _, _ = ops.linear_backward(dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False)
    assert_within_contract(y, x @ dense.T, x.double() @ dense.double().T, kernel)
    assert_within_contract(dx, dy @ dense, dy.double() @ dense.double(), kernel + " dx")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("r", [1, 8, 16, 17, 64, 130])
def test_the_tensor_cores_kernels_with_adapters(cuda_engine, r, dropout):
    n, k, scaling = 136, 192, 0.7
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16).double()
    seed = torch.tensor([-123456789012345])
    for m in tiled_case(cuda_engine, r, (n, k)):
        x, dy, A, B = (torch.randn(*s).bfloat16() for s in ((m, k), (m, n), (r, k), (n, r)))
        bias = torch.randn(n)
        y, u = ops.linear_forward(x, *weight.pieces, n, bias, A, B, scaling, dropout, seed)
        dx, dA, dB = ops.linear_backward(dy, *weight.pieces, k, x, u, A, B, scaling, dropout, seed, True, True, True)
        mask = reference.dropout_mask(m, k, dropout, seed, x.device)
        u64 = scaling / (1 - dropout) * (x.double() * mask) @ A.double().T
        v64 = scaling / (1 - dropout) * dy.double() @ B.double()
        for name, found, wanted in (
            ("y", y, x.double() @ dense.T + u64 @ B.double().T + bias.double()),
            ("dx", dx, dy.double() @ dense + mask * (v64 @ A.double())),
            ("dA", dA, v64.T @ (x.double() * mask)),
            ("dB", dB, dy.double().T @ u.double()),
        ):
            error = relative_error(found, wanted)
            assert error < 1e-2, f"{cuda_engine} {name} M={m} r={r} p={dropout}: {error:.2e}"


@pytest.mark.parametrize(
    ("rows", "shared", "kernel"),
    [
        (5, 64, "tiles16"),
        (20, 64, "tiles32"),
        (40, 64, "tiles32any"),
        (40, 99, "tiles64"),
        (100, 99, "tiles128x3"),
        (100, 227, "tiles128"),
        (100, 227, "tiles128wide"),
    ],
)
def test_every_tile_and_depth_of_the_pipeline(monkeypatch, rows, shared, kernel):
    # KiB of shared memory, by which the tile and its stages are chosen: those of sm_75, sm_86 and sm_90. Copies land
    # early, late and at random.
    n, k = 72, 512
    if kernel == "tiles128wide":  # too little for it
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    weight = make_weight(n, k)
    x, dy = torch.randn(rows, k).bfloat16(), torch.randn(rows, n).bfloat16()
    exact = weight.dequantize(torch.bfloat16).double()
    results = []
    for landing in ("earliest", "latest", "random"):
        with emulated("random", landing, seed=3, max_shared_bytes=shared * 1024):
            y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
            dx, _, _ = ops.linear_backward(
                dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False
            )
        results.append((y, dx))
        assert relative_error(y, x.double() @ exact.T) < 4e-3
        assert relative_error(dx, dy.double() @ exact) < 4e-3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


#: M, N, K and multiprocessors: tiles that 2, 3 and 9 blocks share, with an odd number of steps; the last one of four.
SHARED_TILES = ((20, 136, 1088, 8), (64, 128, 1536, 3), (130, 136, 1600, 12), (17, 24, 4672, 16), (130, 136, 1600, 3))


@pytest.mark.parametrize("resident_blocks", [1, 5])
@pytest.mark.parametrize("case", SHARED_TILES)
def test_blocks_that_share_a_tile_add_up_in_one_order(case, resident_blocks):
    m, n, k, multiprocessors = case
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    A, B = torch.randn(8, k).bfloat16(), torch.randn(n, 8).bfloat16()
    found = []
    for order in ORDERS:
        with emulated(order, seed=11, multiprocessors=multiprocessors, resident_blocks=resident_blocks):
            module().reset_counters()
            y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
            assert counters()["instructions"]["fence"] > 0
            with_low_rank, u = ops.linear_forward(x, *weight.pieces, n, None, A, B, 1.0, 0.0, None)
        found.append((y, with_low_rank))
    assert_within_contract(y, x @ dense.T, x.double() @ dense.double().T, f"{case}")
    assert relative_error(with_low_rank, x.double() @ dense.double().T + u.double() @ B.double().T) < 4e-3
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    # The depth of dx is N: another weight, the other way round.
    turned = make_weight(k, 128)
    dy = torch.randn(m, k).bfloat16()
    with emulated("random", seed=2, multiprocessors=multiprocessors, resident_blocks=resident_blocks):
        dx, _, _ = ops.linear_backward(
            dy, *turned.pieces, 128, None, None, None, None, 1.0, 0.0, None, True, False, False
        )
    dense = turned.dequantize(torch.bfloat16)
    assert_within_contract(dx, dy @ dense, dy.double() @ dense.double(), f"{case} dx")


#: M, N, K, multiprocessors, and where the steps of all tiles are cut: at 6, 12 and 18 of 5 times 5; at 12 of 3 times 8,
#: so that a block has a tile and a half; at 6 and 13 of 2 times 10; at 8, 16 .. of 2 times 21, three blocks to a tile.
CUT_ANYWHERE = ((16, 640, 1088, 4), (64, 300, 2048, 2), (31, 256, 2560, 3), (5, 136, 5376, 5))


@pytest.mark.parametrize("case", CUT_ANYWHERE)
def test_middle_rows_of_tiles_that_are_cut_anywhere(case):
    m, n, k, multiprocessors = case
    tiles = -(-n // 128)
    plan = extension.native().dispatch(m, n, k, 1, False, 90, multiprocessors, 227 * 1024)
    assert (plan["splits"], plan["shared_tiles"], plan["tiles"]) == (multiprocessors, tiles, tiles)
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16)
    x, A, B = torch.randn(m, k).bfloat16(), torch.randn(8, k).bfloat16(), torch.randn(n, 8).bfloat16()
    bias, found = torch.randn(n), []
    for order, landing, resident in zip(ORDERS, ("latest", "random", "earliest"), (1, 5, 2)):
        with emulated(order, landing, seed=5, multiprocessors=multiprocessors, resident_blocks=resident):
            module().reset_counters()
            y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
            assert counters()["instructions"]["fence"] > 0
            found.append((y, *ops.linear_forward(x, *weight.pieces, n, bias, A, B, 1.0, 0.0, None)))
    y, with_low_rank, u = found[0]
    exact = x.double() @ dense.double().T
    assert_within_contract(y, x @ dense.T, exact, f"{case}")
    assert relative_error(with_low_rank, exact + bias.double() + u.double() @ B.double().T) < 4e-3
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_scratch_holds_what_it_held_before():
    # The tickets of an earlier launch, of another one, and of a replay of the same.
    weight = make_weight(128, 1024)
    x = torch.randn(20, 1024).bfloat16()
    with emulated(multiprocessors=4):
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


@pytest.mark.parametrize(
    ("n", "dtype", "double_quant"),
    [
        (8, torch.bfloat16, True),
        (8, torch.float16, False),
        (77, torch.bfloat16, False),
        (77, torch.float16, True),
        (256, torch.bfloat16, True),
    ],
)
def test_few_rows(cuda_engine, monkeypatch, n, dtype, double_quant):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "few")  # more rows than the table would give it
    # Groups of 4, 2 and 1 tiles of 8 rows of W; chunks of which a warp has none, one and several; x that lies on no 16
    # bytes; a rank that is no multiple of 4.
    for k, m, r, shift in (
        (64, 1, 0, 0),
        (192, 3, 16, 1),
        (640, 8, 6, 0),
        (2368, 2, 0, 3),
        (4224, 5, 20, 0),
        (320, 7, 5, 1),
    ):
        weight = make_weight(n, k, dtype=dtype, double_quant=double_quant)
        x = torch.randn(m * k + shift).to(dtype)[shift:].view(m, k)
        A, B = (torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)) if r else (None, None)
        bias = torch.randn(n)
        y, u = ops.linear_forward(x, *weight.pieces, n, bias, A, B, 0.5 if r else 1.0, 0.0, None)
        dense = weight.dequantize(dtype)
        exact = x.double() @ dense.double().T + bias.double()
        if r:
            assert relative_error(y, exact + u.double() @ B.double().T) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
        else:
            assert_within_contract(y, (x.float() @ dense.float().T + bias).to(dtype), exact, f"N={n} K={k} M={m}")


#: N, K, M, rank, and elements by which x lies off 16 bytes. Columns: less than a tile, odd, several tiles. Of K, four
#: warps take 64 each: some have none, or none in the last step. Rows: one tile of 8, 16, 32, 64, all of it and less.
MIDDLE = (
    (8, 64, 9, 0, 0),
    (40, 576, 5, 0, 0),
    (136, 320, 8, 9, 0),
    (77, 192, 16, 17, 0),
    (130, 320, 17, 8, 3),
    (128, 512, 32, 0, 0),
    (72, 832, 33, 70, 0),
    (201, 576, 64, 5, 0),
    (264, 256, 40, 16, 1),
)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("case", MIDDLE)
def test_middle_rows(cuda_engine, case, double_quant):
    n, k, m, r, shift = case
    for dtype in (torch.bfloat16, torch.float16):
        weight = make_weight(n, k, dtype=dtype, double_quant=double_quant)
        x = torch.randn(m * k + shift).to(dtype)[shift:].view(m, k)
        A, B = (torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)) if r else (None, None)
        bias = torch.randn(n)
        y, u = ops.linear_forward(x, *weight.pieces, n, bias, A, B, 0.5 if r else 1.0, 0.0, None)
        dense = weight.dequantize(dtype)
        exact = x.double() @ dense.double().T + bias.double()
        if r:
            assert relative_error(y, exact + u.double() @ B.double().T) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
        else:
            assert_within_contract(y, (x.float() @ dense.float().T + bias).to(dtype), exact, f"{case} {dtype}")


@pytest.mark.parametrize("kernel", ["middle8", "middle16", "middle32", "middle64"])
def test_middle_rows_in_several_tiles(cuda_engine, monkeypatch, kernel):
    # More rows than the table would give it; two tiles across, of which the second has one column.
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    n, k, m = 129, 448, 70
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16)
    x = torch.randn(m, k).bfloat16()
    y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
    assert_within_contract(y, x @ dense.T, x.double() @ dense.double().T, kernel)


def test_middle_rows_whenever_copies_land(monkeypatch):
    n, k = 136, 1088
    weight = make_weight(n, k)
    exact = weight.dequantize(torch.bfloat16).double()
    for m in (7, 12, 30, 64):
        x, results = torch.randn(m, k).bfloat16(), []
        for order, landing in zip(ORDERS, ("earliest", "latest", "random")):
            with emulated(order, landing, seed=3, multiprocessors=4):
                results.append(ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)[0])
        assert relative_error(results[0], x.double() @ exact.T) < 4e-3
        assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("m", [8, 16, 32, 64])
def test_middle_rows_read_the_weight_once_in_whole_sectors(m):
    n, k = 256, 1024
    weight = make_weight(n, k)
    x = torch.randn(m, k).bfloat16()
    found = counted(
        lambda: ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None), multiprocessors=2
    )
    assert found["launches"] == 1
    assert found["instructions"]["mma"] == m * n * k // (16 * 8 * 16) * 32
    memory = {place: t for place, t in found["global"].items() if place.startswith("rows64.cuh")}
    loads = lines(found["global"], "rows64.cuh", "load").values()
    assert [t["bytes"] for t in loads if t["bytes"] == 256 * t["requests"]] == [n * k // 2], "codes, once"
    # Of eight rows 32 bytes each; x, 512 bytes of a row; results, 256 bytes of a row.
    for t in memory.values():
        if t["bytes"] >= 256 * t["requests"]:
            assert t["actual"] == t["minimum"], "sectors"
    # Constants: a byte for each 64 weights and an entry of the table for each, and a float32 for 256 of them; each
    # thread of two blocks reads the offset.
    rest = sum(t["bytes"] for t in memory.values() if t["bytes"] < 256 * t["requests"])
    assert rest == n * k // 64 * 9 + 2 * 256 * 4
    shared = {place: t for place, t in found["shared"].items() if place.startswith("rows64.cuh")}
    pairs = max(shared.values(), key=lambda t: t["bytes"])
    assert pairs["requests"] == n * k // 2 // 32 * 7 // 8, "one row of eight is decoded in registers"
    for place, t in shared.items():
        assert t["actual"] == t["minimum"], f"bank conflicts: {place} {t}"


def test_a_weight_that_rounds_to_infinity_stays_where_it_is(cuda_engine):
    # K = 192 and 320: the last 64 columns that a warp takes lie beyond it.
    for k in (192, 320):
        weight = torch.randn(9, k)
        weight[4, -3] = 1e5
        quantized = NF4Weight(*ops.quantize(weight, "weight"), None, None, None, weight.shape)
        for m in (1, 8, 12, 20, 40, 70):
            x = torch.rand(m, k).half() + 0.5
            y, _ = ops.linear_forward(x, *quantized.pieces, 9, None, None, None, 1.0, 0.0, None)
            assert (y[:, 4] == torch.inf).all()
            assert y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_an_offset_of_the_constants_beyond_fp16_stays_out_of_what_is_outside(cuda_engine):
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


def test_a_constant_that_is_nan_stays_in_its_row_of_the_weight(cuda_engine):
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


def test_few_rows_read_the_weight_once_in_whole_sectors(monkeypatch):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "few")
    n, k, m = 256, 2048, 8
    weight = make_weight(n, k)
    x = torch.randn(m, k).bfloat16()
    found = counted(lambda: ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None))
    assert found["launches"] == 1
    memory = lines(found["global"], "rows8.cuh", "load") | lines(found["global"], "rows8.cuh", "store")
    codes = max(memory.values(), key=lambda t: t["bytes"])
    # After its last group every lane asks four times for what is not there, and gets something else.
    assert codes["bytes"] == n * k // 2 + 2 * 512 * 4 * 16
    wide = {place: t for place, t in memory.items() if t["bytes"] == 512 * t["requests"]}
    assert len(wide) == 2, "codes and x"
    assert all(t["actual"] == t["minimum"] for t in wide.values())
    shared = lines(found["shared"], "rows8.cuh", "load")
    pairs = max(shared.values(), key=lambda t: t["requests"])
    assert pairs["requests"] == n * k // 2 // 32
    x_loads = max((t for t in shared.values() if t is not pairs), key=lambda t: t["bytes"])
    for t in (pairs, x_loads, *lines(found["shared"], "rows8.cuh", "store").values()):
        assert t["actual"] == t["minimum"], "bank conflicts"
    # Of random codes: 16 of the 256 entries for each request.
    constants = next(t for t in shared.values() if t["bytes"] == pairs["bytes"] // 16 // 4 * 2)
    assert constants["actual"] < 1.5 * constants["minimum"]


def test_a_kernel_can_be_forced(monkeypatch):
    weight = make_weight(64, 128)
    x = torch.randn(5, 128).bfloat16()
    exact = x.double() @ weight.dequantize(torch.bfloat16).double().T

    def forward():
        return ops.linear_forward(x, *weight.pieces, 64, None, None, None, 1.0, 0.0, None)[0]

    used = {}
    tiles = ("tiles16", "tiles32", "tiles64", "tiles128", "tiles128x3", "tiles128wide")
    for name in ("few", "middle8", "middle16", "middle32", "middle64", *tiles, "floats"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", name)
        with emulated():
            module().reset_counters()
            assert relative_error(forward(), exact) < 4e-3
            used[name] = counters()["instructions"].get("mma", 0)
    assert used["few"] < used["tiles16"] < used["tiles32"] < used["tiles64"] < used["tiles128"] == used["tiles128x3"]
    assert used["tiles128wide"] == 2 * used["tiles128"]
    assert [used[f"middle{rows}"] for rows in (16, 32, 64)] == [used[f"tiles{rows}"] for rows in (16, 32, 64)]
    assert used["floats"] == 0
    with emulated(), pytest.raises(RuntimeError, match="names no kernel; there are few, middle8"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "fast")
        forward()
    with emulated(), pytest.raises(RuntimeError, match="few cannot take M = 9, N = 64, K = 128: more than 8 rows"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "few")
        x = torch.randn(9, 128).bfloat16()
        forward()
    with emulated(max_shared_bytes=64 * 1024), pytest.raises(RuntimeError, match="its stages do not fit"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "tiles128")
        forward()


#: Those that fit the 99 KiB of sm_86, sm_89 and sm_120; those that fit the 64 KiB of sm_75; the others.
FIT_99 = {"few", "middle8", "middle16", "tiles64", "tiles128x3"}
FIT_64 = {"tiles16", "tiles32", "tiles32any"}
FIT_163 = {"middle32", "middle64", "tiles128", "tiles128wide"}


@pytest.mark.parametrize(
    ("architecture", "dtype", "taken"),
    [
        (75, torch.bfloat16, set()),
        (75, torch.float16, FIT_64),
        *((one, torch.bfloat16, FIT_64 | FIT_99) for one in (86, 89, 120)),
        *((one, torch.float16, FIT_64 | FIT_99 | FIT_163) for one in (80, 90, 100)),
    ],
)
def test_what_has_no_code_on_an_architecture_cannot_be_forced(architecture, dtype, taken, monkeypatch):
    """Not even where the card has the room, and the code is of an older one's PTX. That just these have code,
    test_static_gates.py looks up in a wheel."""
    weight = make_weight(64, 128)
    x = torch.randn(5, 128).to(dtype)
    refusals = {}
    with emulated(architecture=architecture, max_shared_bytes=227 * 1024):
        for name in FIT_64 | FIT_99 | FIT_163:
            monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", name)
            try:
                ops.linear_forward(x, *weight.pieces, 64, None, None, None, 1.0, 0.0, None)
            except RuntimeError as error:
                refusals[name] = str(error)
    assert set(refusals) == (FIT_64 | FIT_99 | FIT_163) - taken
    for name, refusal in refusals.items():
        assert re.search(rf"={name} cannot take .*: (the architecture lacks|.* not fit into shared memory)", refusal)


@pytest.mark.parametrize(
    ("dtype", "architecture", "tiled"),
    [
        (torch.bfloat16, 80, True),
        (torch.bfloat16, 75, False),
        (torch.float16, 75, True),
        (torch.float32, 90, False),
    ],
)
def test_which_kernel_runs(dtype, architecture, tiled):
    weight = make_weight(64, 128)
    x = torch.randn(20, 128).to(dtype)
    with emulated(architecture=architecture, max_shared_bytes=(64 if architecture == 75 else 227) * 1024):
        module().reset_counters()
        y, _ = ops.linear_forward(x, *weight.pieces, 64, None, None, None, 1.0, 0.0, None)
        assert ("mma" in counters()["instructions"]) == tiled
    assert relative_error(y, x.double() @ weight.dequantize(dtype).double().T) < 4e-3


@pytest.mark.parametrize("kernel", ["tiles16", "tiles64", "tiles128", "tiles128wide"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_tensor_cores_kernels_move_whole_sectors_without_bank_conflicts(monkeypatch, backward, kernel):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    n, k, m = 256, 256, 128
    weight = make_weight(n, k)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()

    def call():
        if backward:
            ops.linear_backward(dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False)
        else:
            ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)

    found = counted(call)
    assert found["instructions"]["mma"] == m * n * k // (16 * 8 * 16) * 32
    shared = {place: t for place, t in found["shared"].items() if place.startswith("tiles.cuh")}
    memory = {place: t for place, t in found["global"].items() if place.startswith("tiles.cuh")}
    assert shared
    assert memory
    for place, t in shared.items():
        assert t["actual"] == t["minimum"], f"bank conflicts: {place} {t}"
    wide = {place: t for place, t in memory.items() if t["bytes"] == 512 * t["requests"]}
    for place, t in wide.items():
        assert t["actual"] == t["minimum"], f"sectors: {place} {t}"
    # The left operand, the codes, the results. The rest is constants: a byte for each 64 weights, whose neighbours in
    # the row L1 has by then, an entry of the table for each, and a float32 for 256 of them.
    assert len(wide) == 3
    constants = sum(t["bytes"] for place, t in memory.items() if place not in wide)
    down = m // {"tiles16": 16, "tiles64": 64}.get(kernel, 128)
    across = 256 // (256 if kernel == "tiles128wide" else 128)
    assert constants == n * k // 64 * 9 * down + down * across * 256 * 4, "and each thread reads the offset"
