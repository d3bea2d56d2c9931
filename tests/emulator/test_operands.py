"""Kernels keep within the operands that their launch was given, and store to none that it only reads.

No kernel is changed for this: an operand is stated to be a row shorter than it is, or only read, and a kernel that is
right then does what a faulty one would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import ROOT, Emulated, emulated, module
from engines import ORDERS, on_the_cpu
from optimizers.paging import parameters, steps

from qlora_kernels import PagedAdamW, PagedLion, default_nested_table, linear, ops, quantize, quantize_stack
from qlora_kernels.ops import backends

# ------------------------------------------------------------------------------------------------- samples

BEYOND = {
    "load beyond": "reads 4 bytes that reach 4 beyond the end of in",
    "load before": "reads 4 bytes that reach 4 before the start of in",
    "load across the end": "reads 16 bytes that reach 8 beyond the end of in",
    "changing load beyond": "reads 4 bytes that reach 4 beyond the end of out",
    "exchanged load beyond": "reads 4 bytes that reach 8 beyond the end of out",
    "copy across the end": "reads 16 bytes that reach 8 beyond the end of in",
    "store beyond": "writes 4 bytes that reach 4 beyond the end of out",
    "store before": "writes 4 bytes that reach 4 before the start of out",
    "store across the end": "writes 16 bytes that reach 8 beyond the end of out",
    "exchanged store beyond": "writes 4 bytes that reach 4 beyond the end of out",
    "atomic operation beyond": "changes 4 bytes that reach 4 beyond the end of out",
    "bulk load across the end": "reads 16 bytes that reach 8 beyond the end of in",
    "tensor load across the end": "reads 16 bytes that reach 8 beyond the end of in",
    "bulk store across the end": "writes 16 bytes that reach 8 beyond the end of out",
    "tensor store across the end": "writes 16 bytes that reach 8 beyond the end of out",
    "launch that is overtaken": "reads 4 bytes that reach 4 beyond the end of in",
}
INPUTS = {
    "store to the input": "writes in, which the sample only reads",
    "atomic operation on the input": "changes in, which the sample only reads",
    "bulk store to the input": "writes in, which the sample only reads",
}


def test_every_sample_has_its_message():
    assert set(module().operand_samples()) == {"all", *BEYOND, *INPUTS}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*BEYOND, *INPUTS])
def test_an_access_outside_the_operands_is_an_error_with_its_place(name, order):
    expected = BEYOND[name] + ": the sample was given 248" if name in BEYOND else INPUTS[name]
    with emulated(order):
        with pytest.raises(module().EmulatorError) as raised:
            module().run_operand_sample(name, stated=True)
        assert re.fullmatch(
            rf"samples_operands\.cpp:\d+: thread \(0, 0, 0\) of block \(0, 0, 0\): {expected}", str(raised.value)
        )
        # And the emulator still works.
        module().run_operand_sample("all", stated=True)


@pytest.mark.parametrize("order", ORDERS)
def test_without_operands_nothing_is_checked(order):
    with emulated(order):
        for name in module().operand_samples():
            module().run_operand_sample(name, stated=False)


# ------------------------------------------------------------------------------------------------- the kernels

ALL = 1 << 40  # more bytes than any operand has


@dataclass(frozen=True)
class Layer:
    """A call of the layer, forward or backward, whose kernel for the product may be forced."""

    kernel: str = ""
    backward: bool = False
    m: int = 5
    n: int = 40
    k: int = 192
    r: int = 0
    dtype: torch.dtype = torch.bfloat16
    adapters: torch.dtype | None = None
    double_quant: bool = True
    bias: torch.dtype | None = None
    dropout: float = 0.0
    needs: tuple[bool, bool, bool] = (True, False, False)

    def rows(self) -> dict[str, int]:
        """Operands, and the bytes of a row of each, or all of them where a row means nothing."""
        size = self.dtype.itemsize
        adapter = (self.adapters or self.dtype).itemsize
        blocks = self.k // 64
        constants = {"absmax_code": blocks, "nested_absmax": 4, "nested_table": ALL, "nested_offset": 4}
        weight = {"packed": self.k // 2, **(constants if self.double_quant else {"absmax": 4 * blocks})}
        adapters = {"lora_a": self.k * adapter, "lora_b": self.r * adapter} if self.r else {}
        seed = {"seed": 8} if self.dropout else {}
        narrow = {"narrow_da": self.k * size, "narrow_db": self.r * size}
        gradients = narrow if adapter == 2 else {"da": 4 * self.k, "db": 4 * self.r}
        if not self.backward:
            bias = {} if self.bias is None else {"bias": 4} if self.bias == torch.float32 else {"narrow_bias": 2}
            low = {"u": self.r * size} if self.r else {}
            return {**weight, **adapters, **seed, **bias, **low, "x": self.k * size, "y": self.n * size}
        (dx, da, db), low = self.needs, self.r * size
        return {
            **(weight if dx else {}),
            **adapters,
            **seed,
            "dy": self.n * size,
            **({"dx": self.k * size} if dx else {}),
            **({"v": low} if self.r and (dx or da) else {}),
            **({"x": self.k * size} if da else {}),
            **({"u": low} if db else {}),
            **{name: row for name, row in gradients.items() if da or db},
        }

    def __call__(self) -> None:
        x, dy, u = (torch.randn(self.m, c).to(self.dtype) for c in (self.k, self.n, self.r))
        A, B = (
            torch.randn(*s).to(self.adapters or self.dtype) if self.r else None
            for s in ((self.r, self.k), (self.n, self.r))
        )
        seed = torch.tensor([7]) if self.dropout else None
        with on_the_cpu():
            pieces = quantize(torch.randn(self.n, self.k), self.double_quant).pieces
        low = (A, B, 1.0, self.dropout, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QLORA_KERNELS_CUDA_KERNEL", self.kernel)
            if self.backward:
                ops.linear_backward(dy, *pieces, self.k, *((x, u) if self.r else (None, None)), *low, *self.needs)
            else:
                bias = None if self.bias is None else torch.randn(self.n).to(self.bias)
                ops.linear_forward(x, *pieces, self.n, bias, *low)


@dataclass(frozen=True)
class Experts(Layer):
    """A call of the layer of three experts, the second without rows."""

    n: int = 40
    k: int = 128
    r: int = 4

    def rows(self) -> dict[str, int]:
        # The last expert's rows are the last ones. Gradients are float32.
        rows = {name: row for name, row in super().rows().items() if not name.startswith("narrow_d")}
        gradients = {"da": 4 * self.k, "db": 4 * self.r} if self.backward else {}
        return {**rows, **gradients, "offsets": 8}

    def __call__(self) -> None:
        x, dy, u = (torch.randn(self.m, c).to(self.dtype) for c in (self.k, self.n, self.r))
        A, B = (torch.randn(*s).to(self.dtype) for s in ((3, self.r, self.k), (3, self.n, self.r)))
        offsets = torch.tensor([0, 2, 2, self.m])
        with on_the_cpu():
            pieces = quantize_stack(torch.randn(3, self.n, self.k), self.double_quant).pieces
        if self.backward:
            ops.linear_grouped_backward(dy, *pieces, offsets, self.k, x, u, A, B, 1.0, *self.needs)
        else:
            bias = None if self.bias is None else torch.randn(3, self.n).to(self.bias)
            ops.linear_grouped_forward(x, *pieces, offsets, self.n, bias, A, B, 1.0)


def optimizer(kind, state_bits: int, norm: bool = False, scaler: bool = False):
    """One step of small bf16 parameters, one of them longer than a chunk."""

    def call():
        params = parameters(torch.bfloat16, (9_000, 300))
        norms = {"max_grad_norm": 1.0} if norm else {}
        paged = kind(params, state_bits=state_bits, master_weights=True, **norms)
        if scaler:
            paged.grad_scale, paged.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        steps(paged, params, 1)

    return call


def quantization():
    quantize(torch.randn(40, 192))


def quantization_of_constants():
    ops.quantize_absmax(torch.rand(300), default_nested_table("cpu"))


def dequantization(double_quant: bool):
    def call():
        with on_the_cpu():
            weight = quantize(torch.randn(40, 192), double_quant)
        weight.dequantize(torch.bfloat16)

    return call


@dataclass(frozen=True)
class Family:
    """Kernels, and what is stated wrongly to them."""

    call: Callable[[], None]
    rows: dict[str, int]  # see Layer.rows
    written: tuple[str, ...]
    sources: tuple[str, ...]  # where they access their operands


def family(layer: Layer, *sources: str, scratch: bool = False) -> Family:
    rows = {**layer.rows(), **({"scratch": ALL} if scratch else {})}
    written = {"dx", "v", "da", "db", "narrow_da", "narrow_db", "scratch"} if layer.backward else {"y", "u", "scratch"}
    return Family(layer, rows, tuple(name for name in rows if name in written), sources)


HALF, FLOAT = torch.bfloat16, torch.float32
CONSTANTS = {"absmax_code": 3, "nested_absmax": 4, "nested_table": ALL, "nested_offset": 4}
TILES = ("tiles.cuh", "tiles_pipeline.cuh", "tiles_finish.cuh", "store_four.cuh")
MIDDLE = ("rows64.cuh", "rows64_constants.cuh", "store_four.cuh")
WARPGROUPS = ("warpgroups.cuh", "warpgroups_x.cuh", "decode.cuh", "store_four.cuh")
FLOATS = ("layer_products.cuh", "weight.cuh", "bias.cuh")
ADAPTERS = ("adapters_tile.cuh", "adapters.cuh", "parts.cuh")
DEQUANTIZE = ("dequantize.cuh", "weight.cuh")


def step(call: Callable[[], None], **states: int) -> Family:
    rows = {"param": 2, "grad": 2, "master": 4, "control": ALL, "steps": 4, "groups": ALL, **states}
    written = tuple(name for name in rows if name not in ("grad", "groups", "maps"))
    return Family(call, rows, written, ("optimizer.cuh", "elements.cuh"))


FAMILIES = {
    "few": family(Layer("few", bias=HALF), "rows8.cuh", "bias.cuh"),
    "few, single constants": family(Layer("few", double_quant=False, bias=FLOAT), "rows8.cuh", "bias.cuh"),
    "middle": family(Layer("middle8", bias=HALF), *MIDDLE, "bias.cuh"),
    "middle, cut": family(Layer("middle8", k=2048, double_quant=False), *MIDDLE, "splits.cuh", scratch=True),
    "warpgroups": family(Layer("warpgroup16", bias=HALF), *WARPGROUPS, "bias.cuh"),
    "warpgroups, single constants": family(
        Layer("warpgroup128", double_quant=False, bias=FLOAT), *WARPGROUPS, "bias.cuh"
    ),
    "tiles": family(Layer("tiles16", m=20, bias=HALF), *TILES, "bias.cuh"),
    "tiles, cut": family(Layer("tiles16", k=2048, double_quant=False), *TILES, "splits.cuh", scratch=True),
    "tiles, backward": family(Layer("tiles16", True, m=20), *TILES),
    "floats": family(Layer(r=3, dtype=FLOAT, bias=FLOAT, dropout=0.25), *FLOATS, "dropout.cuh"),
    "floats, backward": family(Layer("", True, r=3, dtype=FLOAT, needs=(True, True, True)), *FLOATS),
    "adapters": family(Layer(r=16, m=70, dropout=0.25, bias=HALF), *ADAPTERS, *WARPGROUPS, "bias.cuh"),
    "adapters, backward": family(
        Layer("", True, r=16, m=70, dropout=0.25, needs=(True, True, True)),
        *ADAPTERS,
        *TILES,
        "narrow.cuh",
        scratch=True,
    ),
    "float32 adapters": family(Layer(r=16, m=70, adapters=FLOAT), *ADAPTERS, *WARPGROUPS, "narrow.cuh", scratch=True),
    "float32 adapters, backward": family(
        Layer("", True, r=16, m=70, adapters=FLOAT, needs=(True, True, True)),
        *ADAPTERS,
        *TILES,
        "narrow.cuh",
        scratch=True,
    ),
    "experts": family(Experts(bias=HALF), *TILES, *FLOATS, "grouped.cuh"),
    "experts, backward": family(Experts("", True, m=70, needs=(True, True, True)), *TILES, *FLOATS, "grouped.cuh"),
    "experts on floats": family(Experts(dtype=FLOAT, bias=FLOAT, double_quant=False), *FLOATS, "grouped.cuh"),
    "experts on floats, backward": family(
        Experts("", True, dtype=FLOAT, needs=(True, True, True)), *FLOATS, "grouped.cuh"
    ),
    "quantize": Family(
        quantization,
        {"weight": 768, "packed": 96, "absmax": 12, "sums": 8},
        ("packed", "absmax", "sums"),
        ("quantize.cuh",),
    ),
    "quantize_absmax": Family(
        quantization_of_constants,
        {"absmax": 4, "table": ALL, "code": 1, "nested_absmax": 4, "offset": 4, "sums": 8},
        ("code", "nested_absmax", "offset", "sums"),
        ("quantize_absmax.cuh",),
    ),
    "dequantize": Family(dequantization(True), {**CONSTANTS, "packed": 96, "out": 384}, ("out",), DEQUANTIZE),
    "dequantize, single constants": Family(
        dequantization(False), {"packed": 96, "absmax": 12, "out": 384}, ("out",), DEQUANTIZE
    ),
    "step of 32 bits": step(optimizer(PagedAdamW, 32), first=4, second=4),
    "step of 8 bits": step(optimizer(PagedAdamW, 8), first=1, second=1, first_absmax=4, second_absmax=4, maps=ALL),
    "step of Lion": step(optimizer(PagedLion, 32), first=4),
    "norm": Family(
        optimizer(PagedAdamW, 32, norm=True, scaler=True),
        {"grad": 2, "tensors": ALL, "partial": 8, "control": ALL, "grad_scale": 4, "found_inf": 4},
        ("partial", "control"),
        ("norm.cuh", "elements.cuh"),
    ),
}
OPTIONS = {"multiprocessors": 8}


def options(name: str) -> dict:
    """Those of the emulator. Before sm_90 blocks that share a tile need scratch."""
    return {**OPTIONS, "architecture": 80} if "cut" in name else OPTIONS


CALLS = ROOT / "tests/emulator/calls.cpp"


def test_every_operation_states_its_operands():
    bindings = (ROOT / "csrc/bindings/cuda.cpp").read_text()
    operations = re.findall(r'm\.def\("(\w+)", &(\w+)\);', bindings)
    assert len(operations) == len(re.findall(r"^static void \w+\(const py::dict& \w+\)", bindings, re.MULTILINE)) > 0
    for name, _ in operations:
        assert getattr(module(), name) is not getattr(module().plain, name)


def test_every_operand_has_a_case():
    stated = set(re.findall(r'(?:reads|writes|plane)\((?:qlk::\w+, )?"(\w+)"', CALLS.read_text()))
    tested = {name for family in FAMILIES.values() for name in family.rows}
    # Kernels copy a whole entry of `chunks`, by plain accesses.
    assert stated - tested == {"chunks"}
    assert tested <= stated


@pytest.mark.parametrize("name", FAMILIES)
def test_the_calls_are_right_as_they_are(name):
    with emulated(**options(name)):
        FAMILIES[name].call()


@pytest.mark.share(3)
@pytest.mark.parametrize(("name", "operand"), [(name, o) for name, family in FAMILIES.items() for o in family.rows])
def test_an_access_one_row_beyond_an_operand_is_an_error(name, operand):
    family = FAMILIES[name]
    with emulated(**options(name)), pytest.raises(module().EmulatorError) as raised:
        module().misstate(operand, fewer=family.rows[operand])
        family.call()
    where, message = str(raised.value).split(": ", 1)
    assert where.split(":")[0] in family.sources
    # Without any scratch, another operand may be the nearest.
    beyond = r"\w+" if operand == "scratch" else rf"beyond the end of {operand}(\[0\])?: .* was given \d+"
    assert re.match(
        rf"thread \(.*\) of block \(.*\): (reads|writes|changes) \d+ bytes? that reach(es)? \d+ {beyond}", message
    )


@pytest.mark.share(3)
@pytest.mark.parametrize(("name", "operand"), [(name, o) for name, family in FAMILIES.items() for o in family.written])
def test_a_store_to_an_operand_that_is_only_read_is_an_error(name, operand):
    family = FAMILIES[name]
    with emulated(**options(name)), pytest.raises(module().EmulatorError) as raised:
        module().misstate(operand, read_only=True)
        family.call()
    assert str(raised.value).split(":")[0] in family.sources
    assert re.search(rf": (writes|changes) {operand}(\[0\])?, which .* only reads$", str(raised.value))


@pytest.mark.parametrize("name", ["few", "quantize", "step of 32 bits"])
def test_what_is_misstated_is_forgotten(name):
    with emulated(**OPTIONS):
        for operand in FAMILIES[name].rows:
            module().misstate(operand, fewer=1 << 40)
    with emulated(**options(name)):
        FAMILIES[name].call()


# ------------------------------------------------------------------------------------------------- other memory


class OneRowLess(Emulated):
    """Allocates a row too few for new tensors of so many dimensions."""

    dimensions = 2

    def _like(self, tensor, *sizes, dtype=None):
        less = 1 if len(sizes) == self.dimensions else 0
        return super()._like(tensor, sizes[0] - less, *sizes[1:], dtype=dtype)


def without_gradients():
    """The low-rank part of the product lies behind the scratch then."""
    with on_the_cpu():
        weight = quantize(torch.randn(40, 192))
    x, A, B = (torch.randn(s).bfloat16() for s in ((5, 192), (16, 192), (40, 16)))
    with torch.no_grad():
        linear(x, weight, lora_A=A, lora_B=B)


@pytest.mark.parametrize(
    ("call", "dimensions", "message"),
    [
        (Layer("few"), 2, "linear_forward takes 400 bytes of y, and the tensor there has 320"),
        (Layer("tiles16", True), 2, "linear_backward takes 1920 bytes of dx, and the tensor there has 1536"),
        (without_gradients, 1, "linear_forward takes 160 bytes of u, and the tensor there has 158"),
    ],
    ids=["y", "dx", "u"],
)
def test_a_new_tensor_that_is_too_small_is_an_error(call, dimensions, message):
    backend = OneRowLess(module())
    backend.dimensions = dimensions
    with emulated(**OPTIONS), backends.forced(backend), pytest.raises(module().EmulatorError, match=message):
        call()


@pytest.mark.parametrize("staging", [0, 4096])
def test_what_is_paged_keeps_within_its_memory(staging):
    with emulated("forward", "earliest", managed=staging == 0):
        arena = module().Arena(8192, 4096, staging, 1)
        arena.plan([(0, 0, [(4096, 8192)], [], [0] if staging else [], True)])
        arena.page_in()
        # A multiple of the page size, so that the end of the last page is that of the memory.
        arena.plan([(0, 0, [(4096, 4096 + 65536 + 1)], [], [0] if staging else [], True)])
        with pytest.raises(module().EmulatorError, match=r"outside managed memory|beyond memory of 4096"):
            arena.page_in()
