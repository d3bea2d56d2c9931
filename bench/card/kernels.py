"""Small cases of each CUDA kernel, held against the CPU's results: python -m bench.card.kernels

Bit for bit; the layer's products, whose sums have another order, within the rounding of their dtype. A gradient norm
is a sum, too: its gradients are chosen so that no order of it rounds, but for one case.

What compute-sanitizer runs; now and then a line on stderr says how far it is. Inputs are made on the CPU and copied,
results are copied back and compared there, so that this package's kernels are nearly the only ones on the card: for
16-bit layers torch casts gradients. The tool names the kernel of each finding.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels import NF4Weight, PagedAdamW, PagedLion, default_nested_table, ops
from qlora_kernels.ops import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Weights [N, K] to quantize: a full thread block (256 blocks of 64); two and a part; one weight; one short of a block;
#: one beyond it; an odd count over several blocks.
QUANTIZE_SHAPES = ((64, 256), (70, 512), (1, 1), (3, 21), (1, 65), (129, 129))
#: Elements by which a tensor lies off its allocation: none, and one that breaks 16-byte alignment.
SHIFTS = (0, 1)
#: Numbers of constants: one; around a group of 256; several groups and a part.
ABSMAX_COUNTS = (1, 255, 256, 257, 5000)
#: Weights [N, K] and rows [begin, end) of them to dequantize: whole tiles; a part of the last one; rows that begin on a
#: block of 64, and ones that do not; odd sizes.
DEQUANTIZE_RANGES = (
    ((64, 256), (0, 64)),
    ((40, 192), (0, 40)),
    ((40, 192), (3, 31)),
    ((33, 130), (5, 32)),
    ((5, 77), (0, 5)),
    ((5, 77), (1, 4)),
)
#: Weights [N, K], rows of x, rank and dropout of the layer, and kernels of forward and backward that are forced where
#: they can be: the fewest rows, and each tile of the tensor cores' kernels, with tails; odd N; a K that is no multiple
#: of 64, which the float32 units take; 16 rows; a tile that blocks share; sums of the adapter's gradients that blocks
#: share both ways; tiles that only run where they fill a card, and tiles meant for smaller ones.
LINEAR_SHAPES = (
    ((72, 192), 3, 8, 0.3, ("", "")),
    ((72, 128), 5, 17, 0.3, ("", "")),
    ((72, 192), 30, 1, 0.0, ("", "")),
    ((77, 128), 50, 8, 0.3, ("", "")),
    ((136, 320), 129, 16, 0.0, ("", "")),
    ((34, 100), 9, 3, 0.2, ("", "")),
    ((24, 1088), 16, 6, 0.0, ("", "")),
    ((72, 1088), 20, 8, 0.0, ("", "")),
    ((40, 640), 260, 40, 0.1, ("", "")),
    ((264, 320), 130, 16, 0.3, ("tiles128wide", "tiles128wide")),
    ((136, 256), 70, 16, 0.3, ("tiles128x3", "tiles128x3")),
    ((72, 192), 12, 16, 0.0, ("tiles16", "tiles32any")),
    # What the table picks only where there is no wgmma, or x lies off 16 bytes.
    ((72, 192), 5, 8, 0.0, ("middle8", "")),
    ((40, 576), 16, 4, 0.0, ("middle16", "")),
    ((136, 320), 40, 16, 0.0, ("middle32", "")),
    ((72, 128), 31, 8, 0.3, ("tiles32", "tiles32")),
    ((77, 192), 63, 17, 0.0, ("tiles64", "tiles64")),
    ((136, 320), 120, 3, 0.3, ("tiles128", "tiles128")),
)
#: Weights [N, K] of a mixture's experts and the rank of their adapters: tiles with tails, and the float32 units.
GROUPED_SHAPES = (((136, 192), 16), ((34, 100), 3))
#: Rows of each: none, several tiles, a few.
GROUPED_ROWS = (0, 130, 3, 0, 64)
#: Forces a kernel of the layer's products.
KERNEL = "QLORA_KERNELS_CUDA_KERNEL"
#: Seconds between two lines of progress.
PROGRESS_SECONDS = 5.0
#: Parameters of an optimizer: a chunk of 8192 elements and three; a block of 256 and one; less than a row of 16 bytes;
#: none; one that never has a gradient. By SHIFTED, the parameter or its gradient lies off 16 bytes.
OPTIMIZER_COUNTS = (8195, 257, 3, 1030, 0, 700, 300)
SHIFTED = {3: "parameter", 5: "gradient"}
WITHOUT_GRADIENT = 6
OPTIMIZER_STEPS = 3
#: What a step may be asked for beside the step: (name, settings, what a gradient scaler says).
OPTIMIZER_EXTRAS = (
    ("clipped", {"max_grad_norm": 0.5}, None),
    ("below the norm", {"max_grad_norm": 1e6}, None),
    ("an infinite gradient left out", {"skip_nonfinite": True}, None),
    ("scaled by 3", {}, (3.0, 0.0)),
    ("left out by the scaler", {}, (1024.0, 1.0)),
    ("clipped, scaled by 3, an infinite gradient left out", {"max_grad_norm": 0.5, "skip_nonfinite": True}, (3.0, 0.0)),
)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        kernel: the operation's name.
        name: what is special about it.
        run: given a device, the call's results there; given "cpu" under :func:`cpu_kernels`, what they should be.
        tolerance: the most that a result may differ by, relative and in the Frobenius norm; 0 is bit for bit.
    """

    kernel: str
    name: str
    run: Callable[[str], Sequence[Tensor]]
    tolerance: float = 0.0


def cpu_kernels() -> contextlib.AbstractContextManager[None]:
    """A context in which CPU tensors use the CPU's kernels, even if another backend is forced outside."""
    return backends.forced(None)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: -0 differs from 0, and NaN equals itself."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def check(case: Case, device: str) -> str | None:
    """Compares a case's results with the CPU's; returns what differs, or None."""
    results = case.run(device)
    with cpu_kernels():
        expected = case.run("cpu")
    if len(results) != len(expected):
        return f"{len(results)} results, expected {len(expected)}"
    for i, (one, other) in enumerate(zip(results, expected)):
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"result {i} is {one.dtype} {list(one.shape)}, expected {other.dtype} {list(other.shape)}"
        if case.tolerance:
            error = ((one.double().cpu() - other.double()).norm() / other.double().norm()).item()
            if not error < case.tolerance:
                return f"result {i} differs by {error:.2e}, at most {case.tolerance:.0e} expected"
            continue
        differing = int((bits(one) != bits(other)).sum())
        if differing:
            return f"{differing} of {other.nbytes} bytes of result {i} differ"
    return None


def _on(device: str, tensor: Tensor, shift: int = 0) -> Tensor:
    """A copy of a CPU tensor on a device, `shift` elements into its memory, made without a kernel there."""
    flat = torch.cat((torch.zeros(shift, dtype=tensor.dtype), tensor.reshape(-1)))
    return flat.to(device)[shift:].view(tensor.shape)


def _source(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random weights whose blocks differ in scale, among them one of zeros, one of the least numbers, and ties."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape[0] * shape[1], generator=generator)
    flat *= torch.logspace(-3, 2, flat.numel())
    if flat.numel() > 5 * 64:
        flat[64:128] = 0.0
        flat[128:192] = torch.finfo(dtype).smallest_normal / 4 * torch.randint(-3, 4, (64,), generator=generator)
        flat[192:256] = torch.randint(-8, 9, (64,), generator=generator) / 8
    return flat.view(shape).to(dtype)


def _table(irregular: bool) -> Tensor:
    """A second-level table: the default one, or one that is neither sorted nor free of equal entries."""
    if not irregular:
        return default_nested_table("cpu")
    table = torch.rand(256, generator=torch.Generator().manual_seed(3)) * 2 - 1
    table[100:140] = table[7]
    return table


def _weight(shape: tuple[int, int], nested: bool, seed: int) -> NF4Weight:
    """Random codes and constants: all of them, not just those that quantization gives."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    blocks = (count + 63) // 64
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=generator)
    if not nested:
        return NF4Weight(packed, torch.rand(blocks, generator=generator), None, None, None, torch.Size(shape))
    return NF4Weight(
        packed,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        torch.rand((blocks + 255) // 256, generator=generator),
        torch.rand(1, generator=generator),
        default_nested_table("cpu"),
        torch.Size(shape),
    )


def _quantize(shape, dtype, shift, seed) -> Callable[[str], Sequence[Tensor]]:
    return lambda device: ops.quantize(_on(device, _source(shape, dtype, seed), shift), "weight")


def _quantize_nested(shape, dtype, shift, irregular, seed) -> Callable[[str], Sequence[Tensor]]:
    return lambda device: ops.quantize_nested(
        _on(device, _source(shape, dtype, seed), shift), _on(device, _table(irregular)), "weight"
    )


def _quantize_absmax(count, irregular, seed) -> Callable[[str], Sequence[Tensor]]:
    def run(device: str) -> Sequence[Tensor]:
        absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 5
        return ops.quantize_absmax(_on(device, absmax), _on(device, _table(irregular)))

    return run


def _dequantize(shape, rows, nested, dtype, shift, seed) -> Callable[[str], Sequence[Tensor]]:
    def run(device: str) -> Sequence[Tensor]:
        host = _weight(shape, nested, seed)
        weight = host.to(device)
        weight.packed = _on(device, host.packed, shift)
        # NaN remains wherever the kernel does not write.
        out = _on(device, torch.full((rows[1] - rows[0], shape[1]), torch.nan, dtype=dtype), shift)
        return [weight.dequantize(dtype, row_begin=rows[0], row_end=rows[1], out=out)]

    return run


@contextlib.contextmanager
def forced_kernel(name: str) -> Iterator[None]:
    """A context in which a kernel of the layer's products is forced; an empty name leaves the choice."""
    before = os.environ.get(KERNEL)
    if name:
        os.environ[KERNEL] = name
    try:
        yield
    finally:
        if name:
            del os.environ[KERNEL]
            if before is not None:
                os.environ[KERNEL] = before


@contextlib.contextmanager
def poisoned_scratch() -> Iterator[None]:
    """A context in which scratch holds bytes of 0xFF, NaN as a float32, before any kernel gets it.

    For initcheck. Kernels read scratch that was never written, without using it: tickets, whose upper bits say whether
    they belong to this launch, and the rest of a last float4. In a fresh allocation each is an error; this one is
    written. A kernel that does use what it did not write gives NaN, and its case fails.
    """
    original = backends.CUDA._scratch

    def filled(self: backends.CUDA, x: Tensor, size: int) -> Tensor | None:
        scratch = original(self, x, size)
        if scratch is not None:
            scratch.view(torch.uint8).fill_(0xFF)
        return scratch

    backends.CUDA._scratch = filled
    try:
        yield
    finally:
        backends.CUDA._scratch = original


def can_be_forced(dtype: torch.dtype, device: str) -> bool:
    """Whether a card has room for the largest tiles; the tensor cores' kernels take no float32."""
    if dtype == torch.float32:
        return False
    if torch.device(device).type != "cuda":
        return True
    card = torch.cuda.get_device_properties(device)
    return card.major >= 8 and card.shared_memory_per_block_optin >= 160 * 1024


def _linear(shape, m, r, dropout, kernels, dtype, seed) -> Callable[[str], Sequence[Tensor]]:
    """linear_forward, and linear_backward with all gradients on the u that the CPU gives."""
    n, k = shape

    def run(device: str) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        host = _weight(shape, True, seed)
        x, dy, A, B, bias = (
            torch.randn(*size, generator=generator).to(dtype) for size in ((m, k), (m, n), (r, k), (n, r), (n,))
        )
        key = torch.tensor([seed])
        with cpu_kernels():
            u = ops.linear_forward(x, *host.pieces, n, bias, A, B, 0.5, dropout, key)[1]
        pieces = host.to(device).pieces
        x, dy, A, B, bias, u, key = (_on(device, t) for t in (x, dy, A, B, bias, u, key))
        forward_kernel, backward_kernel = kernels if can_be_forced(dtype, device) else ("", "")
        with forced_kernel(forward_kernel):
            forward = ops.linear_forward(x, *pieces, n, bias, A, B, 0.5, dropout, key)
        with forced_kernel(backward_kernel):
            return [*forward, *ops.linear_backward(dy, *pieces, k, x, u, A, B, 0.5, dropout, key, True, True, True)]

    return run


def _grouped(shape, r, dtype, seed) -> Callable[[str], Sequence[Tensor]]:
    """linear_grouped_forward, and linear_grouped_backward with all gradients on the u that the CPU gives."""
    (n, k), experts, m = shape, len(GROUPED_ROWS), sum(GROUPED_ROWS)

    def run(device: str) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weights = [_weight(shape, True, seed + e).pieces for e in range(experts)]
        *pieces, table = (torch.cat(piece) for piece in zip(*weights))
        offsets = torch.tensor([0, *itertools.accumulate(GROUPED_ROWS)])
        x, dy, A, B, bias = (
            torch.randn(*size, generator=generator).to(dtype)
            for size in ((m, k), (m, n), (experts, r, k), (experts, n, r), (experts, n))
        )
        host = (*pieces, table[:256])
        with cpu_kernels():
            u = ops.linear_grouped_forward(x, *host, offsets, n, bias, A, B, 0.5)[1]
        there = [_on(device, t) for t in host]
        x, dy, A, B, bias, u, offsets = (_on(device, t) for t in (x, dy, A, B, bias, u, offsets))
        forward = ops.linear_grouped_forward(x, *there, offsets, n, bias, A, B, 0.5)
        rest = (x, u, A, B, 0.5, True, True, True)
        return [*forward, *ops.linear_grouped_backward(dy, *there, offsets, k, *rest)]

    return run


def _gradients(step: int, dtype: torch.dtype, seed: int, whole: bool, infinite: bool) -> list[Tensor]:
    """Gradients of all parameters: those of one differ in size from the next one's.

    With ``whole``, multiples of 1/64 up to 2, whose squares and their sums are exact in float64; with ``infinite``, the
    second step's hold an infinity.
    """
    generator = torch.Generator().manual_seed(100 * seed + step)
    grads = []
    for i, count in enumerate(OPTIMIZER_COUNTS):
        if whole:
            grad = torch.randint(-127, 128, (count,), generator=generator) / 64
        else:
            grad = torch.randn(count, generator=generator) * 10.0 ** (i % 4 - 2)
        grads.append(grad.to(dtype))
    if infinite and step == 1:
        grads[1][200] = torch.inf
    return grads


def _optimizer(kind, dtype, settings, scaler, whole, seed) -> Callable[[str], Sequence[Tensor]]:
    """Some steps: parameters, states and step counts, and what was found of the gradients."""

    def run(device: str) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        params = []
        for i, count in enumerate(OPTIMIZER_COUNTS):
            start = torch.randn(count, generator=generator).to(dtype)
            params.append(torch.nn.Parameter(_on(device, start, int(SHIFTED.get(i) == "parameter"))))
        optimizer = kind(params, lr=0.01, weight_decay=0.1, **settings)
        if scaler is not None:
            optimizer.grad_scale, optimizer.found_inf = (_on(device, torch.tensor([one])) for one in scaler)
        for step in range(OPTIMIZER_STEPS):
            grads = _gradients(step, dtype, seed, whole, settings.get("skip_nonfinite", False))
            for i, (p, grad) in enumerate(zip(params, grads)):
                # One gradient comes a step late, so that its step count lags.
                lacks = i == WITHOUT_GRADIENT or (i == 1 and step == 0)
                p.grad = None if lacks else _on(device, grad, int(SHIFTED.get(i) == "gradient"))
            optimizer.step()
        optimizer.state_dict()  # waits for pending copies
        states = [tensor for p in params for _, tensor in sorted(optimizer.state[p].items())]
        of_gradients = [torch.tensor([optimizer.grad_norm]), torch.tensor([optimizer.skipped_steps])]
        return [*params, *states, *of_gradients]

    return run


def _norm(dtype, seed) -> Callable[[str], Sequence[Tensor]]:
    """The norm of gradients whose squares no float64 sum holds."""

    def run(device: str) -> Sequence[Tensor]:
        params = [torch.nn.Parameter(_on(device, torch.zeros(count, dtype=dtype))) for count in OPTIMIZER_COUNTS]
        optimizer = PagedLion(params, max_grad_norm=0.5)
        for p, grad in zip(params, _gradients(0, dtype, seed, False, False)):
            p.grad = _on(device, grad)
        optimizer.step()
        return [torch.tensor([optimizer.grad_norm])]

    return run


def _optimizers(seed: int) -> Iterator[Case]:
    """The optimizers' cases, with random numbers of their own from a seed on."""
    for kind, state_bits in ((PagedAdamW, 32), (PagedAdamW, 8), (PagedLion, 32), (PagedLion, 8)):
        for dtype in DTYPES:
            for master in (False,) if dtype == torch.float32 else (False, True):
                settings = {"state_bits": state_bits, "master_weights": master}
                name = f"{kind.__name__} {state_bits} bits, {str(dtype).removeprefix('torch.')}"
                name += ", master weights" if master else ""
                seed += 1
                yield Case("optimizer_step", name, _optimizer(kind, dtype, settings, None, False, seed))
    for extra, more, scaler in OPTIMIZER_EXTRAS:
        for kind, state_bits, dtype in ((PagedAdamW, 32, torch.float32), (PagedLion, 8, torch.bfloat16)):
            settings = {"state_bits": state_bits, "master_weights": dtype != torch.float32, **more}
            name = f"{kind.__name__} {state_bits} bits, {str(dtype).removeprefix('torch.')}, {extra}"
            seed += 1
            yield Case("optimizer_step", name, _optimizer(kind, dtype, settings, scaler, True, seed))
    for dtype in DTYPES:
        seed += 1
        name = f"of {str(dtype).removeprefix('torch.')} gradients"
        yield Case("optimizer_norm", name, _norm(dtype, seed), 1e-6)


def cases() -> Iterator[Case]:
    """All of them, always in the same order with the same random numbers."""
    seed = 0
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for shape in QUANTIZE_SHAPES:
            for shift in SHIFTS:
                name = f"{kind} [{shape[0]}, {shape[1]}]" + (f", {shift} element off" if shift else "")
                seed += 1
                yield Case("quantize", name, _quantize(shape, dtype, shift, seed))
                seed += 1
                yield Case("quantize_nested", name, _quantize_nested(shape, dtype, shift, bool(shift), seed))
        for shape, rows in DEQUANTIZE_RANGES:
            for nested in (True, False):
                for shift in SHIFTS:
                    name = f"to {kind}, rows {rows[0]} to {rows[1]} of [{shape[0]}, {shape[1]}]"
                    name += ("" if nested else ", float32 constants") + (f", {shift} element off" if shift else "")
                    seed += 1
                    yield Case("dequantize", name, _dequantize(shape, rows, nested, dtype, shift, seed))
        for shape, m, r, dropout, kernels in LINEAR_SHAPES:
            name = f"{kind}, {m} rows by [{shape[0]}, {shape[1]}], rank {r}, dropout {dropout}"
            name += f", {kernels[0]} and {kernels[1]}" if any(kernels) else ""
            seed += 1
            tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
            yield Case("linear", name, _linear(shape, m, r, dropout, kernels, dtype, seed), tolerance)
        for shape, r in GROUPED_SHAPES:
            seed += 1
            tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
            name = f"{kind}, experts of [{shape[0]}, {shape[1]}], rank {r}"
            yield Case("linear_grouped", name, _grouped(shape, r, dtype, seed), tolerance)
    for count in ABSMAX_COUNTS:
        for irregular in (False, True):
            name = f"{count} constants" + (", an irregular table" if irregular else "")
            seed += 1
            yield Case("quantize_absmax", name, _quantize_absmax(count, irregular, seed))
    yield from _optimizers(seed)


def verdict(equal: int, total: int) -> str:
    """The last line of the output, which says that all cases were gone through."""
    return f"card kernels: {equal} of {total} cases equal the CPU's results"


def main(argv: Sequence[str] | None = None, device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="only cases whose kernel and name begin so")
    parser.add_argument(
        "--poison-scratch",
        action="store_true",
        help="fill scratch with NaN first; for initcheck, as kernels read of it what they do not use",
    )
    arguments = parser.parse_args(argv)
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to check", file=sys.stderr)
        return 2
    chosen = [case for case in cases() if f"{case.kernel} {case.name}".startswith(arguments.only)]
    if not chosen:
        print(f"no case begins with '{arguments.only}'", file=sys.stderr)
        return 2
    with poisoned_scratch() if arguments.poison_scratch else contextlib.nullcontext():
        return _check_all(chosen, device)


def _check_all(chosen: Sequence[Case], device: str) -> int:
    """Every case, with a line for each that is wrong, and the verdict. The exit code."""
    equal, begin = 0, time.monotonic()
    said = begin
    for number, case in enumerate(chosen, 1):
        now = time.monotonic()
        if number == 1 or now - said >= PROGRESS_SECONDS:
            said = now
            where = f"{number} of {len(chosen)}, {case.kernel}, {case.name}"
            print(f"card kernels: {now - begin:.0f} s, case {where}", file=sys.stderr, flush=True)
        try:
            problem = check(case, device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        equal += problem is None
        if problem is not None:
            print(f"{case.kernel}, {case.name}: {problem}", flush=True)
    print(verdict(equal, len(chosen)), flush=True)
    return 0 if equal == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
