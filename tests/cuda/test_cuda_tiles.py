"""The tiles of the tensor cores (csrc/cuda/linear/mma/tiles.cuh), and the float32 fallback where it is forced: results,
the pipeline, tiles that blocks share, memory traffic."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, make_weight, relative_error
from emulated import ROOT, counted, counters, emulated, module
from engines import ORDERS

from qlora_kernels import ops
from qlora_kernels.native import extension
from qlora_kernels.ops.backends import reference

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
    # Also where the table would not choose it: two tiles down and three across, or fewer.
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    n, k, m = 264, 320, 131 if kernel != "tiles16" else 30
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
    dx, _, _ = ops.linear_backward(dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False)
    assert_within_contract(y, x @ dense.T, x.double() @ dense.double().T, kernel)
    assert_within_contract(dx, dy @ dense, dy.double() @ dense.double(), kernel + " dx")


@pytest.mark.share(2)
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
        for name, actual, wanted in (
            ("y", y, x.double() @ dense.T + u64 @ B.double().T + bias.double()),
            ("dx", dx, dy.double() @ dense + mask * (v64 @ A.double())),
            ("dA", dA, v64.T @ (x.double() * mask)),
            ("dB", dB, dy.double().T @ u.double()),
        ):
            error = relative_error(actual, wanted)
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


#: M, N, K, multiprocessors, how many blocks share a tile, each with an odd number of steps, and the kernel where it is
#: forced. The last two cases have four tiles and share only the last.
SHARED_TILES = (
    *((20, 136, 832, 8, 2, ""), (64, 128, 1344, 3, 3, ""), (100, 136, 1600, 6, 3, "")),
    *((17, 24, 4416, 16, 9, ""), (130, 136, 1088, 3, 2, ""), (130, 264, 1088, 3, 2, "tiles128wide")),
)


@pytest.mark.share(2)
@pytest.mark.parametrize("case", SHARED_TILES)
def test_blocks_that_share_a_tile_add_up_in_one_order(case, monkeypatch):
    m, n, k, multiprocessors, blocks, kernel = case
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    assert extension.native().dispatch(m, n, k, 1, False, 90, multiprocessors, 227 * 1024)["splits"] == blocks
    weight = make_weight(n, k)
    dense = weight.dequantize(torch.bfloat16)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    A, B = torch.randn(8, k).bfloat16(), torch.randn(n, 8).bfloat16()
    results = []
    for order, resident in zip(ORDERS, (1, 5, 2)):
        with emulated(order, seed=11, multiprocessors=multiprocessors, resident_blocks=resident):
            module().reset_counters()
            y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
            assert counters()["instructions"]["fence"] > 0
            with_low_rank, u = ops.linear_forward(x, *weight.pieces, n, None, A, B, 1.0, 0.0, None)
        results.append((y, with_low_rank))
    assert_within_contract(y, x @ dense.T, x.double() @ dense.double().T, f"{case}")
    assert relative_error(with_low_rank, x.double() @ dense.double().T + u.double() @ B.double().T) < 4e-3
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    # The depth of dx is N: another weight, the other way round.
    turned = make_weight(k, 128)
    dy = torch.randn(m, k).bfloat16()
    with emulated("random", seed=2, multiprocessors=multiprocessors, resident_blocks=5):
        dx, _, _ = ops.linear_backward(
            dy, *turned.pieces, 128, None, None, None, None, 1.0, 0.0, None, True, False, False
        )
    dense = turned.dequantize(torch.bfloat16)
    assert_within_contract(dx, dy @ dense, dy.double() @ dense.double(), f"{case} dx")


@pytest.mark.parametrize(
    ("kernel", "backward", "aligned", "sectors"),
    [
        # Forward each of 8 warps has 16 rows of W, or 32 in the wide tile, and a sector of each in a request: one for
        # 16 of 64 steps, or one for each step where constants do not lie on 16 bytes.
        ("tiles128", False, True, 8 * 16 * 4),
        ("tiles128", False, False, 8 * 16 * 64),
        ("tiles128wide", False, True, 8 * 32 * 4),
        ("tiles128wide", False, False, 8 * 32 * 64),
        # Backward each of 4 steps has 64 rows, and no two of them share a sector: a request of each row for each tile.
        ("tiles128", True, True, 64 * 4 * 16),
        ("tiles128wide", True, True, 64 * 4 * 8),
    ],
)
def test_constants_come_in_few_sectors(monkeypatch, kernel, backward, aligned, sectors):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    n, k, m = (256, 2048, 7) if backward else (256 if kernel == "tiles128wide" else 128, 4096, 7)
    weight = make_weight(n, k)
    packed, absmax, *nested = weight.pieces
    if not aligned:
        absmax = torch.cat([absmax[:1], absmax])[1:]
    pieces = (packed, absmax, *nested)
    x = torch.randn(m, n if backward else k).bfloat16()
    results = []

    def call():
        if backward:
            dx, *_ = ops.linear_backward(x, *pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False)
            results.append(dx)
        else:
            results.append(ops.linear_forward(x, *pieces, n, None, None, None, 1.0, 0.0, None)[0])

    counts = counted(call)
    source = (ROOT / "csrc/cuda/linear/mma/tiles_pipeline.cuh").read_text().splitlines()
    touched = 0
    for place, traffic in counts["global"].items():
        name, line = place.split()[0].split(":")
        if name.endswith("tiles_pipeline.cuh") and "absmax_code" in source[int(line) - 1]:
            touched += traffic["actual"]
    assert touched == sectors
    dense = weight.dequantize(torch.bfloat16).double()
    assert relative_error(results[0], x.double() @ (dense if backward else dense.T)) < 4e-3


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

    counts = counted(call)
    assert counts["instructions"]["mma"] == m * n * k // (16 * 8 * 16) * 32
    shared = {place: t for place, t in counts["shared"].items() if place.startswith("tiles")}
    memory = {place: t for place, t in counts["global"].items() if place.startswith("tiles")}
    assert shared
    assert memory
    for place, t in shared.items():
        assert t["actual"] == t["minimum"], f"bank conflicts: {place} {t}"
    wide = {place: t for place, t in memory.items() if t["bytes"] == 512 * t["requests"]}
    for place, t in wide.items():
        assert t["actual"] == t["minimum"], f"sectors: {place} {t}"
    # The left operand, the codes, the results. The rest is constants: a byte and a float32 for 256 of them, for each
    # thread that decodes of a block; an entry of the table for each step, and one more than there are steps.
    assert len(wide) == 3
    constants = sum(t["bytes"] for place, t in memory.items() if place not in wide)
    down = m // {"tiles16": 16, "tiles64": 64}.get(kernel, 128)
    across = 256 // (256 if kernel == "tiles128wide" else 128)
    threads = 1 if kernel == "tiles128wide" else 2
    assert constants == n * k // 64 * 5 * down * threads + down * across * 256 * 4 * (n // 64 + 1 + 1), (
        "and each thread reads the offset"
    )
