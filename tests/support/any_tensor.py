"""Random calls of the operations on every kind of tensor that torch has, each answered as torch would or refused.

Run as a program, so that a crash is this process's alone::

    python tests/support/any_tensor.py SEED FIRST LAST

It runs the cases FIRST to LAST - 1 of a seed, names each on stdout before it calls, and exits with 1 at a wrong answer.
A crash is the case that was named last.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear as dense_linear

import qlora_kernels as qk
from qlora_kernels.ops.backends import reference

#: What a call may raise. Anything else is a fault of the package, even where torch would crash.
REFUSALS = (TypeError, ValueError, RuntimeError)


class Subclass(Tensor):
    """A tensor's subclass that changes nothing."""


# ------------------------------------------------------------------------------ another form of the same values


def _embedded(rng: random.Random, t: Tensor) -> Tensor:
    """Within a larger storage, at an odd offset."""
    offset = rng.randint(1, 9)
    store = torch.full((t.numel() + offset + 5,), 3, dtype=t.dtype)
    store[offset : offset + t.numel()] = t.reshape(-1)
    return store[offset : offset + t.numel()].view(t.shape)


def _transposed(rng: random.Random, t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else _every_other(rng, t)


def _every_other(rng: random.Random, t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    return torch.stack((t, torch.full_like(t, 7)), -1)[..., 0]


def _negative(rng: random.Random, t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.dtype.is_floating_point else t


def _imaginary(rng: random.Random, t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: negative, and every other element of its storage."""
    if t.dtype not in (torch.float32, torch.float64):
        return t
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _inference(rng: random.Random, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


#: These may not be refused.
SAME_VALUES: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "clone": lambda rng, t: t.clone(),
    "embedded": _embedded,
    "transposed": _transposed,
    "every other element": _every_other,
    "negative bit": _negative,
    "imaginary part": _imaginary,
    "parameter": lambda rng, t: torch.nn.Parameter(t) if t.dtype.is_floating_point else t,
    "result of autograd": lambda rng, t: t.clone().requires_grad_() * 1 if t.dtype.is_floating_point else t,
}

# ------------------------------------------------------------------------------ other values, or none at all


def _freed(rng: random.Random, t: Tensor) -> Tensor:
    """Its address is then its offset into the storage, not always 0."""
    t = _embedded(rng, t) if rng.random() < 0.5 else t.clone()
    t.untyped_storage().resize_(0)
    return t


def _shrunk(rng: random.Random, t: Tensor) -> Tensor:
    """All but the last byte of what it needs."""
    t = _embedded(rng, t) if rng.random() < 0.5 else t.clone()
    needed = (t.storage_offset() + t.numel()) * t.element_size()
    t.untyped_storage().resize_(rng.choice((needed - 1, needed // 2)))
    return t


def _fake(rng: random.Random, t: Tensor) -> Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(t)


def _other_dtype(rng: random.Random, t: Tensor) -> Tensor:
    names = "int8 uint8 int16 int32 int64 bool float16 bfloat16 float32 float64 complex64 complex128 float8_e4m3fn"
    return t.to(getattr(torch, rng.choice(names.split())))


def _other_shape(rng: random.Random, t: Tensor) -> Tensor:
    shapes: list[Callable[[], Tensor]] = [
        lambda: t[None],
        lambda: t.reshape(-1),
        lambda: t.mT if t.dim() >= 2 else t[:, None],
        lambda: t[..., :-1] if t.dim() else t,
        lambda: t[:0] if t.dim() else t,
        lambda: t.sum(),
        lambda: torch.cat((t, t)) if t.dim() else t,
    ]
    return rng.choice(shapes)()


def _expanded(rng: random.Random, t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def _zeros(rng: random.Random, t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def _not_a_tensor(rng: random.Random, t: Any) -> Any:
    return rng.choice((3, 1.5, "x", [1.0, 2.0], object()))


#: These are answered as torch would answer, or refused.
ANYTHING: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "freed storage": _freed,
    "shrunk storage": _shrunk,
    "meta": lambda rng, t: t.to("meta"),
    "fake": _fake,
    "zero tensor": _zeros,
    "inference": _inference,
    "another dtype": _other_dtype,
    "another shape": _other_shape,
    "expanded": _expanded,
    "sparse": lambda rng, t: t.to_sparse(),
    "mkldnn": lambda rng, t: t.to_mkldnn(),
    "nested": lambda rng, t: torch.nested.nested_tensor([t], layout=torch.jagged),
    "subclass": lambda rng, t: t.as_subclass(Subclass),
    "conjugate": lambda rng, t: t.to(torch.complex64).conj(),
    "not finite": lambda rng, t: torch.full_like(t, float("nan")) if t.dtype.is_floating_point else t,
    "no tensor": _not_a_tensor,
}

# ------------------------------------------------------------------------------ one case


@dataclass
class Case:
    """Operands by name, after their twists, and what was done to them."""

    operation: str
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    operands: dict[str, Any] = field(default_factory=dict)
    twists: dict[str, str] = field(default_factory=dict)

    @property
    def may_be_refused(self) -> bool:
        # Pieces and out are used as they lie in memory, so another form of their values may be refused too.
        return any(twist in ANYTHING or name in (*PIECES, "out") for name, twist in self.twists.items())

    def __str__(self) -> str:
        twists = ", ".join(f"{name} {twist}" for name, twist in self.twists.items()) or "nothing odd"
        return f"{self.operation} M, N, K, r = {self.sizes} {self.dtype}: {twists}"


PIECES = ("packed", "absmax", "nested_absmax", "nested_offset", "nested_table")


def _weight(case: Case) -> qk.NF4Weight:
    _, n, k, _ = case.sizes
    return qk.NF4Weight(*(case.operands[name] for name in PIECES), shape=torch.Size((n, k)))


def _clean_operands(rng: random.Random, operation: str, sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    m, n, k, r = sizes
    generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if operation == "quantize":
        return {"weight": normal(n, k).to(torch.float32 if dtype == torch.float64 else dtype)}
    weight = qk.quantize(torch.randn(n, k, generator=generator), double_quant=rng.random() < 0.5)
    # The table is one for all weights of the process: a twist should meet a copy.
    pieces = {name: None if piece is None else piece.clone() for name, piece in zip(PIECES, weight.pieces, strict=True)}
    if operation == "dequantize":
        return pieces
    if operation == "dequantize into out":
        return pieces | {"out": torch.zeros(n, k, dtype=dtype)}
    x = normal(m, k) if rng.random() < 0.7 else normal(1, m, k)
    operands: dict[str, Any] = pieces | {"x": x, "bias": normal(n)}
    operands |= {"lora_A": normal(r, k), "lora_B": normal(n, r)}
    if operation == "backward":
        operands["dy"] = normal(*x.shape[:-1], n)
    return operands


OPERATIONS = ("forward", "forward", "backward", "backward", "quantize", "dequantize", "dequantize into out")


def make_case(rng: random.Random) -> Case:
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    sizes = (
        rng.choice((0, 1, 2, 5, 17)),
        rng.choice((1, 3, 33, 64)),
        rng.choice((1, 7, 64, 65, 192)),
        rng.choice((1, 4, 9)),
    )
    case = Case(rng.choice(OPERATIONS), sizes, dtype)
    case.operands = _clean_operands(rng, case.operation, sizes, dtype)
    present = [name for name, operand in case.operands.items() if operand is not None]
    for name in rng.sample(present, min(len(present), rng.choice((0, 1, 1, 1, 2, 3)))):
        kinds = rng.choice((ANYTHING, SAME_VALUES))
        twist = rng.choice(list(kinds))
        if twist == "shrunk storage" and name not in PIECES:
            continue  # torch's own operations do not look for that either, and read what lies behind
        try:
            case.operands[name] = kinds[twist](rng, case.operands[name])
        except Exception:
            continue
        case.twists[name] = twist
    return case


def _values(operand: Any) -> Tensor | None:
    """The operand's elements as an ordinary tensor; None where torch has none to give."""
    if not isinstance(operand, Tensor) or type(operand) not in (Tensor, torch.nn.Parameter, Subclass):
        return None
    if operand.layout is not torch.strided or operand.is_nested or operand.is_meta:
        return None
    if not operand._is_zerotensor():
        last = sum((size - 1) * stride for size, stride in zip(operand.shape, operand.stride(), strict=True))
        needed = (operand.storage_offset() + last + 1) * operand.element_size() if operand.numel() else 0
        if operand.untyped_storage().nbytes() < needed:
            return None
    return (
        operand.detach().as_subclass(Tensor).resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# ------------------------------------------------------------------------------ what is called, and what is right


def _call(case: Case) -> list[Tensor]:
    operands = case.operands
    if case.operation == "quantize":
        return [qk.quantize(operands["weight"]).dequantize(torch.float32)]
    weight = _weight(case)
    if case.operation == "dequantize":
        return [weight.dequantize(case.dtype)]
    if case.operation == "dequantize into out":
        weight.dequantize(case.dtype, out=operands["out"])
        return [operands["out"]]
    arguments = [operands[name] for name in ("x", "bias", "lora_A", "lora_B")]
    if case.operation == "forward":
        with torch.no_grad():
            x, bias, A, B = arguments
            return [qk.linear(x, weight, bias, A, B, scaling=0.5)]
    leaves = [_leaf(argument) for argument in arguments]
    x, bias, A, B = leaves
    y = qk.linear(x, weight, bias, A, B, scaling=0.5)
    return [y, *torch.autograd.grad(y, leaves, operands["dy"])]


def _leaf(operand: Any) -> Any:
    """The operand asking for a gradient."""
    if isinstance(operand, Tensor) and not operand.requires_grad and operand.is_floating_point():
        with contextlib.suppress(RuntimeError):
            return operand.requires_grad_()
    return operand


def _expected(case: Case, values: dict[str, Tensor | None]) -> list[Tensor] | None:
    """What torch gives for the operands' values, the product in float64; None where it refuses them."""
    if any(value is None and case.operands[name] is not None for name, value in values.items()):
        return None
    _, n, k, _ = case.sizes
    try:
        if case.operation == "quantize":
            # Its own answer for an ordinary tensor; tests/ops/test_quantize.py holds that against plain torch.
            pieces = qk.quantize(values["weight"]).pieces
            return [reference.decode(pieces, *values["weight"].shape, torch.float32)]
        pieces = tuple(None if values[name] is None else values[name].flatten() for name in PIECES)
        dense = reference.decode(pieces, n, k, case.dtype)
        if case.operation.startswith("dequantize"):
            return [dense]
        leaves = [values[name].double().requires_grad_() for name in ("x", "bias", "lora_A", "lora_B")]
        x, bias, A, B = leaves
        y = dense_linear(x, dense.double(), bias) + 0.5 * dense_linear(dense_linear(x, A), B)
        return [y] if case.operation == "forward" else [y, *torch.autograd.grad(y, leaves, values["dy"].double())]
    except Exception:
        return None


#: Of the largest element of a result, or of 1. Wide: it tells wrong operands, not rounding, which other tests hold.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}


def _differs(result: Any, expected: Tensor, tolerance: float) -> str | None:
    """How a result differs from the expected one by more than a tolerance times the largest element; None if it does
    not."""
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return f"shape {list(getattr(result, 'shape', ()))}, not {list(expected.shape)}"
    if result.is_meta or type(result).__name__ == "FakeTensor":
        return None  # no elements to compare
    result, expected = result.detach().double(), expected.detach().double()
    if not torch.equal(result.isfinite(), expected.isfinite()):
        return "finite in other places"
    difference = (result - expected)[expected.isfinite()].abs()
    largest = expected[expected.isfinite()].abs()
    if difference.numel() and difference.max() > tolerance * max(float(largest.max()), 1.0):
        return f"differs by {difference.max():.3g} of {largest.max():.3g}"
    return None


def run(case: Case) -> str | None:
    """Runs a case; returns what is wrong with the answer, or None."""
    values = {name: _values(operand) for name, operand in case.operands.items()}
    expected = _expected(case, values)
    try:
        results = _call(case)
    except REFUSALS as error:
        if case.may_be_refused:
            return None if str(error).strip() else f"an error without a word: {type(error).__name__}"
        return f"refused: {type(error).__name__}: {error}"
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"
    for name, before in values.items():
        if name == "out" or before is None:
            continue
        after = _values(case.operands[name])
        if after is None or not torch.equal(_bytes(after), _bytes(before)):
            return f"{name} has changed"
    if expected is None:
        computed_nothing = any(twist in ("meta", "fake") for twist in case.twists.values())
        return None if computed_nothing else "an answer, though torch has none"
    exact = case.operation == "quantize" or case.operation.startswith("dequantize")
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        tolerance = 0.0 if exact else max(TOLERANCE[values["x"].dtype], TOLERANCE[result.dtype])
        problem = _differs(result, right, tolerance)
        if problem:
            return f"result {i}: {problem}"
    return None


def main(seed: int, first: int, last: int) -> int:
    faulthandler.enable()
    torch.set_num_threads(1)
    wrong = 0
    for i in range(first, last):
        case = make_case(random.Random(f"{seed}:{i}"))
        print(f"{i}: {case}", flush=True)
        problem = run(case)
        if problem:
            wrong += 1
            print(f"WRONG {i}: {case}: {problem}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
