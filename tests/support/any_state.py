"""Random steps and loads of paged optimizers, with every kind of tensor that torch has in gradients and state dicts.

Each gives what the same values as ordinary tensors give, or is refused; then the optimizer goes on as if nothing had
been tried. Run as a program, as any_tensor is::

    python tests/support/any_state.py SEED FIRST LAST
"""

from __future__ import annotations

import copy
import faulthandler
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import any_tensor
import torch
from any_tensor import ANYTHING, REFUSALS, SAME_VALUES
from torch import Tensor, nn

from qlora_kernels import PagedAdamW, PagedLion

SHAPES = ((), (1,), (7,), (257,), (2, 150), (3, 5), (20, 33), (0, 4), (2, 3, 5))
OPTIONS: tuple[tuple[str, tuple], ...] = (
    ("state_bits", (32, 32, 8)),
    ("max_grad_norm", (None, None, 1.0)),
    ("master_weights", (False, True)),
    ("skip_nonfinite", (False, False, True)),
)


def _freed_view(t: Tensor) -> Tensor:
    """Part of a freed storage: its address is an offset, not 0."""
    whole = torch.cat((t.reshape(-1), t.reshape(-1)))
    view = whole[t.numel() :].view(t.shape)
    whole.untyped_storage().resize_(0)
    return view


def _infinite_list() -> list:
    endless: list = []
    endless.append(endless)
    return endless


def _nested_list(depth: int) -> list:
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


#: What no setting or step count should be, and a few that they may be, made for each use.
NONSENSE: dict[str, Callable[[], Any]] = {
    "text": lambda: "3",
    "nothing": lambda: None,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "below 0": lambda: -1,
    "a fraction": lambda: 0.5,
    "1e300": lambda: 1e300,
    "10**400": lambda: 10**400,
    "a complex number": lambda: 1j,
    "True": lambda: True,
    "a list": lambda: [0.5, 0.25],
    "itself in a list": _infinite_list,
    "a deep list": lambda: _nested_list(100_000),
    "an object": object,
    "a tensor": lambda: torch.tensor(0.5),
    "two numbers in a tensor": lambda: torch.tensor([0.5, 0.25]),
    "a freed tensor": lambda: _freed_view(torch.tensor(0.5)),
    "two freed numbers": lambda: _freed_view(torch.tensor([0.5, 0.25])),
    "a pair of freed tensors": lambda: (_freed_view(torch.tensor(0.5)), _freed_view(torch.tensor([0.5, 1.0]))),
    "a meta tensor": lambda: torch.tensor(0.5, device="meta"),
    "a fake tensor": lambda: any_tensor._fake(random.Random(0), torch.tensor(0.5)),
    "a sparse tensor": lambda: torch.ones(1).to_sparse(),
    "a negative view": lambda: torch._neg_view(torch.tensor(-0.5)),
    "a tensor of zeros": lambda: torch._efficientzerotensor((), dtype=torch.float32),
    "a complex tensor": lambda: torch.tensor(0.5j),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.quint8),
}

SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "unknown")


def _quantized(rng: random.Random, t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)


def _below_zero(rng: random.Random, t: Tensor) -> Tensor:
    return -t.abs() - 1


#: Kinds of states that a product has no use for.
STATE_KINDS: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "quantized": _quantized,
    "freed view": lambda rng, t: _freed_view(t),
    "below 0": _below_zero,
    "huge": lambda rng, t: torch.full(t.shape, 1e300, dtype=torch.float64),
}


@dataclass
class Case:
    """Parameters, and what is done to their gradients or to the state dict that is loaded."""

    operation: str
    kind: type
    options: dict[str, Any]
    params: list[Tensor]
    #: Gradients of the step in question.
    grads: list[Any]
    begun: bool = True
    saved: dict[str, Any] | None = None
    #: The same with ordinary tensors, and an object where there is none that is the same.
    clean: dict[str, Any] | None = None
    twists: list[str] = field(default_factory=list)
    may_be_refused: bool = False

    def __str__(self) -> str:
        shapes = ", ".join(f"{list(p.shape)} {p.dtype}" for p in self.params)
        options = {name: value for name, value in self.options.items() if value}
        odd = "; ".join(self.twists) or "nothing odd"
        return f"{self.operation} {self.kind.__name__} {options} begun={self.begun} {shapes}: {odd}"


def _options(rng: random.Random) -> dict[str, Any]:
    return {name: rng.choice(values) for name, values in OPTIONS}


def _randn(rng: random.Random, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def make_case(rng: random.Random) -> Case:
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    params = [_randn(rng, torch.empty(rng.choice(SHAPES), dtype=dtype)) for _ in range(rng.randint(1, 3))]
    case = Case(
        rng.choice(("step", "load", "load")),
        rng.choice((PagedAdamW, PagedAdamW, PagedLion)),
        _options(rng),
        params,
        [_randn(rng, p) for p in params],
        begun=rng.random() < 0.8,
    )
    if case.operation == "load":
        _twist_states(rng, case)
    return case


def _twist_states(rng: random.Random, case: Case) -> None:
    source, params = _optimizer(case, _options(rng))
    generator = random.Random(rng.getrandbits(32))
    for _ in range(2):
        for p in params:
            p.grad = _randn(generator, p)
        source.step()
    saved, clean = copy.deepcopy(source.state_dict()), copy.deepcopy(source.state_dict())
    case.saved, case.clean = saved, clean
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        index = rng.randrange(len(params))
        what = rng.choice(("tensor", "tensor", "tensor", "step", "setting", "structure"))
        if "state" not in saved:
            break
        if what == "tensor" and isinstance(saved["state"].get(index), dict):
            _twist_tensor(rng, case, index)
        elif what == "structure":
            _twist_structure(rng, case, index)
        elif what in ("setting", "step"):
            nonsense = rng.choice(list(NONSENSE))
            name = rng.choice(SETTINGS) if what == "setting" else "step"
            for state_dict in (saved, clean):
                holder = state_dict["param_groups"][0] if what == "setting" else state_dict["state"].get(index)
                if isinstance(holder, dict):
                    holder[name] = NONSENSE[nonsense]()
            case.twists.append(f"{name} of {index} {nonsense}")
            case.may_be_refused = True


def _twist_tensor(rng: random.Random, case: Case, index: int) -> None:
    assert case.saved is not None
    assert case.clean is not None
    entry = case.saved["state"][index]
    tensors = [
        name
        for name, value in entry.items()
        if type(value) is Tensor and not any(twist.startswith(f"{name} of {index} ") for twist in case.twists)
    ]
    if not tensors:
        return
    name = rng.choice(tensors)
    kinds = rng.choice((ANYTHING, SAME_VALUES, SAME_VALUES, STATE_KINDS))
    twist = rng.choice(list(kinds))
    if twist == "transposed" and name.endswith("_code"):
        return  # blocks run through memory: these are other states
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry[name] = kinds[twist](rng, entry[name])
    except Exception:
        return
    case.twists.append(f"{name} of {index} {twist}")
    case.may_be_refused |= kinds is not SAME_VALUES
    value = any_tensor._values(entry[name])
    if name == "step" and isinstance(entry[name], (int, float)):
        value = entry[name]  # a count needs no tensor
    if isinstance(case.clean["state"].get(index), dict):
        case.clean["state"][index][name] = object() if value is None else value


def _twist_structure(rng: random.Random, case: Case, index: int) -> None:
    """Something missing, doubled or of another kind; the same in both state dicts."""

    def without_a_state(s: dict) -> None:
        entry = s["state"].get(index)
        if isinstance(entry, dict) and entry:
            entry.pop(sorted(entry)[seed % len(entry)])

    seed = rng.getrandbits(16)
    changes: dict[str, Callable[[dict], Any]] = {
        "a state missing": without_a_state,
        "an entry missing": lambda s: s["state"].pop(index, None),
        "an entry of text": lambda s: s["state"].update({index: "text"}),
        "an entry that holds itself": lambda s: s["state"].update({index: s["state"]}),
        "an entry for nobody": lambda s: s["state"].update({99: {}}),
        "one key twice": lambda s: s["param_groups"][0].update(params=[0] * len(case.params)),
        "a parameter more": lambda s: s["param_groups"][0]["params"].append(7),
        "a group more": lambda s: s["param_groups"].append({"params": []}),
        "keys that cannot be hashed": lambda s: s["param_groups"][0].update(params=[[]]),
        "keys of another type": lambda s: s["param_groups"][0].update({5: 6, (): 7}),
        "state missing": lambda s: s.pop("state", None),
        "groups that hold themselves": lambda s: s["param_groups"].append(s["param_groups"]),
    }
    change = rng.choice(list(changes))
    for state_dict in (case.saved, case.clean):
        if state_dict is not None and "state" in state_dict and len(state_dict["param_groups"]) == 1:
            changes[change](state_dict)
    case.twists.append(f"{change} ({index})")
    case.may_be_refused = True


# ------------------------------------------------------------------------------------------------ gradients


def _gradients(rng: random.Random, case: Case, params: list[nn.Parameter]) -> list[Tensor | None] | None:
    """Sets odd gradients; returns their values, or None where torch has none to give."""
    values: list[Tensor | None] = [grad.clone() for grad in case.grads]
    for p, grad in zip(params, case.grads):
        p.grad = grad.clone()
    known = True
    for i in rng.sample(range(len(params)), min(len(params), rng.choice((0, 1, 1, 2)))):
        p, kinds = params[i], rng.choice((ANYTHING, SAME_VALUES, ALIASES, FREED))
        twist = rng.choice(list(kinds))
        if twist == "shrunk storage":
            continue  # torch's own operations don't look for that either
        try:
            other = params[rng.randrange(len(params))]
            odd = kinds[twist](rng, other.detach() if kinds is ALIASES else case.grads[i])
            p.grad = None
            p.grad = odd.detach() if isinstance(odd, Tensor) and odd.requires_grad else odd
        except Exception:
            p.grad = case.grads[i].clone()
            continue
        case.twists.append(f"gradient {i} {twist}")
        case.may_be_refused |= kinds in (ANYTHING, FREED)
        values[i] = None if p.grad is None else any_tensor._values(p.grad)
        if values[i] is None and p.grad is not None and p.numel() == 0:
            values[i] = case.grads[i].clone()  # nothing is as good as nothing
        known &= p.grad is None or values[i] is not None
    return values if known else None


def _rolled(rng: random.Random, t: Tensor) -> Tensor:
    """The memory of a tensor, from its second element on."""
    n = max(t.numel() - 1, 0)
    return t.reshape(-1)[1 : n + 1]


#: Gradients in a parameter's memory.
ALIASES: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "a parameter": lambda rng, t: t,
    "a parameter's memory from its middle": _rolled,
    "a parameter, negative": lambda rng, t: torch._neg_view(t),
}
FREED: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "freed view": lambda rng, t: _freed_view(t),
    "freed and negative": lambda rng, t: torch._neg_view(_freed_view(t)),
    "freed and expanded": lambda rng, t: _freed_view(t.reshape(-1)[:1]).expand(t.shape),
}

# ------------------------------------------------------------------------------------------------ running a case


def _optimizer(case: Case, options: dict[str, Any]) -> tuple[Any, list[nn.Parameter]]:
    # Each parameter's memory goes on behind it, for gradients that lie partly there.
    params = [nn.Parameter(torch.cat((p.reshape(-1), p.reshape(-1)))[: p.numel()].view(p.shape)) for p in case.params]
    return case.kind(params, lr=0.01, **options), params


def _pair(case: Case, seed: int) -> list[tuple[Any, list[nn.Parameter]]]:
    """Twins that have taken the same steps."""
    pair = [_optimizer(case, case.options) for _ in range(2)]
    for optimizer, params in pair:
        rng = random.Random(seed)
        for _ in range(2 if case.begun else 0):
            for p in params:
                p.grad = _randn(rng, p)
            optimizer.step()
        optimizer.zero_grad()
    return pair


def _bits(value: Any) -> Any:
    return (value.dtype, value.shape, any_tensor._bytes(value.detach().clone()).numpy().tobytes())


def _all_bits(optimizer: Any) -> dict[str, Any]:
    params = optimizer.param_groups[0]["params"]
    return {
        "parameters": [_bits(p) for p in params],
        "states": [{name: _bits(value) for name, value in optimizer.state.get(p, {}).items()} for p in params],
        "settings": repr({k: v for k, v in optimizer.param_groups[0].items() if k in SETTINGS and k != "unknown"}),
        "control": (optimizer.skipped_steps, repr(optimizer.grad_norm)),
    }


def _difference(a: Any, b: Any, settings: bool = True) -> str | None:
    first, second = _all_bits(a), _all_bits(b)
    unequal = [name for name in first if first[name] != second[name] and (settings or name != "settings")]
    return ", ".join(unequal) or None


def _steps_alike(ours: Any, twin: Any, seed: int) -> str | None:
    """Whether another, ordinary step does the same to both; settings have been compared before, or are tensors."""
    rng = random.Random(seed)
    for p, q in zip(ours.param_groups[0]["params"], twin.param_groups[0]["params"]):
        p.grad = _randn(rng, p)
        q.grad = p.grad.clone()
    outcomes = []
    for optimizer in (ours, twin):
        try:
            optimizer.step()
            outcomes.append("")
        except REFUSALS as error:
            outcomes.append(str(error))
    if outcomes[0] != outcomes[1]:
        return f"the next step: {outcomes[0]!r}, not {outcomes[1]!r}"
    different = _difference(ours, twin, settings=False)
    return f"after the next step: {different}" if different else None


def run(case: Case, rng: random.Random) -> str | None:
    """Runs a case; returns what is wrong with the answer, or None."""
    seed = rng.getrandbits(32)
    (ours, params), (twin, others) = _pair(case, seed)
    if case.operation == "step":
        values = _gradients(rng, case, params)
        print(f"   {case}", flush=True)
        possible = values is not None
        if values is not None:
            for p, value in zip(others, values):
                p.grad = value
    else:
        possible = case.clean is not None
        if case.clean is not None:
            try:
                twin.load_state_dict(case.clean)
            except REFUSALS:
                possible = False
            if not possible:
                twin = _pair(case, seed)[1][0]
    try:
        if case.operation == "step":
            ours.step()
        else:
            ours.load_state_dict(case.saved)
    except REFUSALS as error:
        if not case.may_be_refused:
            return f"refused: {type(error).__name__}: {error}"
        if not str(error).strip():
            return f"an error without a word: {type(error).__name__}"
        ours.zero_grad()
        twin = _pair(case, seed)[1][0]
        problem = _difference(ours, twin)
        return f"refused, but changed: {problem}" if problem else _steps_alike(ours, twin, seed)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if not possible:
        return "an answer, though ordinary tensors have none"
    if case.operation == "step":
        twin.step()
    problem = _difference(ours, twin)
    return f"differs: {problem}" if problem else _steps_alike(ours, twin, seed)


def main(seed: int, first: int, last: int) -> int:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = 0
    for i in range(first, last):
        rng = random.Random(f"{seed}:{i}")
        case = make_case(rng)
        print(f"{i}: {case}", flush=True)
        problem = run(case, rng)
        if problem:
            wrong += 1
            print(f"WRONG {i}: {case}: {problem}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
