"""The low-rank products on tensor cores (csrc/cuda/linear/adapters.cuh): results, traffic, launches, scratch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from contract import make_weight, relative_error
from cuda_code.calls import call_kernels
from emulated import counted, counters, emulated, module
from engines import ORDERS

from qlora_kernels import ops
from qlora_kernels.ops.backends import reference

ROWS = (1, 7, 16, 17, 63, 64, 65, 129)
#: N and K: less than a tile; whole tiles; rows that lie on no 16 bytes, of odd and of even length; more tiles than a
#: thread block has across.
SHAPES = ((24, 64), (128, 192), (77, 51), (90, 132), (584, 640))
RANKS = (1, 8, 16, 17, 64, 130)
SEED = -123456789012345


class Layer:
    """Operands of the layer, and what its low-rank products should be."""

    def __init__(self, m, n, k, r, dropout=0.0, dtype=torch.bfloat16):
        self.weight = make_weight(n, k)
        self.x, self.dy, self.u = (torch.randn(*s).to(dtype) for s in ((m, k), (m, n), (m, r)))
        # The gradients are float32 then, too.
        self.A, self.B = (torch.randn(*s).to(dtype).float() for s in ((r, k), (n, r)))
        self.seed, self.dropout, self.scaling = torch.tensor([SEED]), dropout, 0.7
        mask = reference.dropout_mask(m, k, dropout, self.seed, self.x.device)
        self.masked = self.x.double() * mask
        scale = self.scaling / (1 - dropout)
        self.exact_u = scale * self.masked @ self.A.double().T
        self.exact_v = scale * self.dy.double() @ self.B.double()

    def forward(self):
        n = self.weight.shape[0]
        return ops.linear_forward(
            self.x, *self.weight.pieces, n, None, self.A, self.B, self.scaling, self.dropout, self.seed
        )[1]

    def backward(self, dx=False, dA=True, dB=True):
        k = self.weight.shape[1]
        return ops.linear_backward(
            self.dy, *self.weight.pieces, k, self.x, self.u, self.A, self.B, self.scaling, self.dropout, self.seed,
            dx, dA, dB,
        )  # fmt: skip

    def unsure_v(self):
        """How much elements of v may differ that fall between two values of its dtype, within the error of float32
        sums."""
        if self.x.dtype == torch.float32:
            return torch.zeros_like(self.exact_v)
        scale = self.scaling / (1 - self.dropout)
        doubt = 2.0**-20 * scale * self.dy.double().abs() @ self.B.double().abs()
        low, high = ((self.exact_v + sign * doubt).to(self.x.dtype).double() for sign in (-1, 1))
        return high - low

    def check(self, case: str, dA=True, dB=True) -> None:
        # u and v are rounded once. dA is compared with the rounded v; where another order of summation may round to the
        # other side, by that much more.
        epsilon = torch.finfo(self.x.dtype).eps
        results = {"u": (self.forward(), self.exact_u, max(epsilon / 2 * 1.01, 1e-6))}
        _, da, db = self.backward(dA=dA, dB=dB)
        if dA:
            rounded = self.exact_v.to(self.x.dtype).double()
            exact = rounded.T @ self.masked
            results["dA"] = (da, exact, (self.unsure_v().T @ self.masked.abs()).norm() / exact.norm() + 1e-6)
        if dB:
            results["dB"] = (db, self.dy.double().T @ self.u.double(), 1e-6)
        for name, (tensor, exact, bound) in results.items():
            assert tensor.shape == exact.shape
            error = relative_error(tensor, exact)
            assert error < bound, f"{case} {name}: {error:.2e}"


@pytest.mark.share(2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("r", RANKS)
def test_every_rank(cuda_engine, r, dropout):
    rows = ROWS if cuda_engine == "cuda" else ROWS[(ORDERS.index(cuda_engine[9:]) + r) % 3 :: 3]
    for m in rows:
        Layer(m, 136, 192, r, dropout).check(f"{cuda_engine} M={m} r={r} p={dropout}")


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(cuda_engine, shape, dtype):
    order = 0 if cuda_engine == "cuda" else ORDERS.index(cuda_engine[9:])
    for m, r in itertools.product(ROWS, (9, 16, 40)):
        if cuda_engine == "cuda" or (ROWS.index(m) + r) % 6 == (order + SHAPES.index(shape)) % 6:
            Layer(m, *shape, r, 0.25, dtype).check(f"{cuda_engine} M={m} {shape} r={r}")


@pytest.mark.parametrize("shift", [1, 4])
def test_tensors_not_aligned_to_16_bytes(cuda_engine, shift):
    layer = Layer(33, 72, 128, 16, 0.5)
    for name in ("x", "dy", "u", "A", "B"):
        tensor = getattr(layer, name).bfloat16()
        room = torch.zeros(tensor.numel() + shift, dtype=tensor.dtype)
        setattr(layer, name, room[shift:].view(tensor.shape).copy_(tensor))
    aligned = copy.copy(layer)
    for name in ("x", "dy", "u", "A", "B"):
        setattr(aligned, name, getattr(layer, name).clone())
    for a, b in zip((layer.forward(), *layer.backward()), (aligned.forward(), *aligned.backward()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(cuda_engine, wanted):
    Layer(130, 136, 192, 20, 0.3).check(f"{cuda_engine} {wanted}", *wanted)


@pytest.mark.share(4)
@pytest.mark.parametrize(("r", "shared"), [(16, 64), (40, 64), (40, 99), (40, 227)])
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_the_bits_do_not_depend_on_the_order(r, shared, multiprocessors):
    # Three tiles of rows for each block, and of columns fewer than copies under way; or many blocks that share them.
    layer = Layer(300, 72, 200, r, 0.3, torch.float16)
    results = []
    for order, landing in (("forward", "earliest"), ("reverse", "latest"), ("random", "random")):
        options = {"max_shared_bytes": shared * 1024, "multiprocessors": multiprocessors, "resident_blocks": 3}
        with emulated(order, landing, seed=3, **options):
            results.append((layer.forward(), *layer.backward()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert relative_error(results[0][0], layer.exact_u) < 5e-4
    assert relative_error(results[0][3], layer.dy.double().T @ layer.u.double()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [2, 64])
def test_rows_that_take_more_than_one_launch(multiprocessors):
    # Copies of v in scratch would exceed 16 MiB; the second launch adds its gradient to the first one's, in place or in
    # parts.
    m, n, k, r = 16500, 64, 64, 256
    with emulated(find_races=False, multiprocessors=multiprocessors):
        layer = Layer(m, n, k, r)
        module().reset_counters()
        _, _, dB = layer.backward(dA=True)
        assert counters()["launches"] > 4
    assert relative_error(dB, layer.dy.double().T @ layer.u.double()) < 1e-5


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
    # K is no multiple of 64: the other products are on the float32 units.
    layer = Layer(20, 64, 72, 24, 0.3, dtype)
    with emulated(architecture=architecture, max_shared_bytes=(64 if architecture == 75 else 227) * 1024):
        module().reset_counters()
        layer.check(f"{dtype} sm_{architecture}")
        assert ("mma" in counters()["instructions"]) == tiled


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("r", [16, 32])
@pytest.mark.parametrize("backward", [False, True])
def test_whole_sectors_without_bank_conflicts(backward, r, dropout):
    m, n, k = 256, 256, 512
    layer = Layer(m, n, k, r, dropout)
    counts = counted(layer.backward if backward else layer.forward, multiprocessors=4)
    files = ("adapters.cuh", "adapters_tile.cuh", "parts.cuh", "dropout.cuh")
    shared = {place: t for place, t in counts["shared"].items() if place.startswith(files)}
    memory = {place: t for place, t in counts["global"].items() if place.startswith(files)}
    assert shared
    assert memory
    for place, t in shared.items():
        assert t["actual"] == t["minimum"], f"bank conflicts: {place} {t}"
    for place, t in memory.items():
        assert t["actual"] == t["minimum"], f"sectors: {place} {t}"


@pytest.mark.parametrize("r", [16, 32])
def test_x_and_dy_are_read_once(r):
    m, n, k = 256, 320, 512
    layer = Layer(m, n, k, r)

    def copied(call):
        places = counted(call)["global"].items()
        return max(t["bytes"] for place, t in places if place.startswith("adapters") and place.endswith("load"))

    # Each tile of 128 rows brings the adapter along; each block, which has several tiles across, its rows of u or v.
    tiles = m // 128
    assert copied(layer.forward) == (m * k + tiles * r * k) * 2
    once = m * (n + k) + tiles * r * n + 2 * m * r
    assert once * 2 <= copied(layer.backward) <= 1.1 * once * 2


def test_launches():
    few, many = Layer(5, 64, 1024, 16), Layer(300, 64, 1024, 16)
    # The first one rounds the adapters, which are float32.
    # u; both of its gradients and the sum of the parts of v, and dA.
    assert counted(few.forward, multiprocessors=8)["launches"] == 1 + 1 + 1
    assert counted(few.backward, multiprocessors=8)["launches"] == 1 + 2 + 1
    # dA in parts, too.
    assert counted(many.backward, multiprocessors=64)["launches"] == 1 + 2 + 2


def test_scratch_is_at_most_16_mib():
    with emulated(multiprocessors=132):
        for m, n, k, r in itertools.product((1, 16, 4096, 65536), (64, 4096, 28672), (4096, 11008), (1, 16, 64, 256)):
            for backward, wide in itertools.product((False, True), (0, 1, 2, 3)):
                # Copies of float32 adapters in 2 bytes, or sums in 4 of gradients that are not float32.
                sizes = [(2 if wide >> i & 1 else 4 * backward) * r * side for i, side in enumerate((k, n))]
                converted = sum(-(-size // 128) * 128 for size in sizes)
                scratch = module().linear_scratch(m, n, k, r, 1, wide & 1 > 0, wide & 2 > 0, backward, 0)
                assert converted <= scratch <= converted + 16 * 2**20
            assert module().linear_scratch(m, n, k, r, 0, True, True, True, 0) <= 16 * 2**20


def test_few_rows_spread_over_the_card():
    layer = Layer(3, 1024, 1024, 16)
    for call in (layer.forward, layer.backward):
        assert counted(call, multiprocessors=64)["blocks"] > 16


def test_a_gradient_not_aligned_to_8_bytes():
    layer = Layer(64, 64, 64, 8)
    with emulated(architecture=90):
        weight = layer.weight.operand().native(module().Weight)
        for shift in (0, 1):
            room = torch.full((64 * 8 + 2,), torch.nan)
            db = room[shift:]
            bytes_needed = module().linear_scratch(64, 64, 64, 8, 1, True, True, True, 0)
            scratch = torch.empty(max(bytes_needed, 16), dtype=torch.uint8)
            A, B = layer.A.float(), layer.B.float()
            call_kernels(
                module(),
                "linear_backward",
                weight=weight,
                dy=layer.dy.data_ptr(),
                u=layer.u.data_ptr(),
                lora_a=A.data_ptr(),
                lora_b=B.data_ptr(),
                db=db.data_ptr(),
                m=64,
                r=8,
                scaling=1.0,
                dtype=1,
                wide_a=True,
                wide_b=True,
                scratch=scratch.data_ptr(),
            )
            gradient = room[shift : shift + 64 * 8].view(64, 8)
            assert relative_error(gradient, layer.dy.double().T @ layer.u.double()) < 1e-6


def shifted(tensor):
    """A copy aligned to its element size and no more."""
    room = tensor.new_empty(tensor.numel() + 1)[1:]
    return room.copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "r"), [(64, 128, 8), (7, 101, 3), (33, 64, 1)])
def test_adapters_in_another_type_are_rounded_as_a_cast_rounds(cuda_engine, dtype, n, k, r):
    """Gradients have the adapters' types, float32 ones unrounded, for any mix of the two."""
    layer = Layer(9, n, k, r, 0.3, dtype)
    layer.A, layer.B = (torch.randn(*s) for s in ((r, k), (n, r)))
    layer.A[0, 0] = -0.0
    wide, narrow = (layer.A, layer.B), (layer.A.to(dtype), layer.B.to(dtype))
    results = {}
    for which in itertools.product((0, 1), repeat=2):
        for place in (lambda t: t, shifted):
            layer.A, layer.B = (place((wide, narrow)[one][i]) for i, one in enumerate(which))
            y, u = ops.linear_forward(
                layer.x, *layer.weight.pieces, n, None, layer.A, layer.B, layer.scaling, layer.dropout, layer.seed
            )
            gradients = [layer.backward(dx=True), (layer.backward(True, False, False)[0], *layer.backward(False)[1:])]
            for dx, dA, dB in gradients:
                assert (dA.dtype, dB.dtype) == (layer.A.dtype, layer.B.dtype)
                outputs = (y, u, dx, dA.to(dtype), dB.to(dtype))
                expected = results.setdefault("all", outputs)
                assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), which
                for name, gradient in (("dA", dA), ("dB", dB)):
                    if gradient.dtype == torch.float32:
                        assert torch.equal(gradient, results.setdefault(name, gradient))
                        assert not torch.equal(gradient, gradient.to(dtype).float())


@pytest.mark.parametrize(("adapter", "before", "after"), [(torch.float32, 1, 0), (torch.bfloat16, 0, 1)])
def test_a_launch_converts_both_adapters(adapter, before, after):
    layer = Layer(64, 64, 128, 8)
    layer.A, layer.B = layer.A.to(adapter), layer.B.to(adapter)

    def launches(call, *needs) -> int:
        return counted(lambda: call(*needs), multiprocessors=1)["launches"]

    assert launches(layer.forward) == before + 2, "u and y"
    assert launches(layer.backward, True, True, True) == before + 4 + after, "v with dB, the sum of v, dx, dA"
    assert launches(layer.backward, False, False, True) == 1 + after, "dB alone reads neither adapter"
    assert launches(layer.backward, True, False, False) == before + 2, "v and dx alone"
