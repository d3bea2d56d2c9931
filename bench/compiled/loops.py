"""Finds the main loop of a kernel that decodes and multiplies in its machine code, and counts what a step issues.

The main loop is the innermost loop with both products (HMMA or HGMMA) and decoding; a step is one iteration. The count
is what a warp issues in a step when all rows are aligned and no tile reaches past an edge:

- code that only some steps enter, such as one team's decoding, counts by its share of the steps;
- an inner loop that copies counts as many iterations as the step's copies take;
- any other inner loop handles unaligned rows and does not count;
- both sides of a branch count;
- code that an iteration may skip and that leads to no product is counted by its kernel's ``seldom``;
- a loop that the compiler was told to unroll counts as many steps an iteration as have products of their own;
- on sm_120, a NOP between two HMMA does not count: the compiler inserts one when it has nothing else to issue, and the
  tensor core is busy for longer.

A step is also cut into parts, because a barrier keeps some of its work from overlapping. What a warp issues after a
barrier and before its first product is "alone": the tensor cores wait for it, as all warps leave the barrier together.
What lies between its first and its last product is "beside" them. "decode" is decoding, wherever it lies, and all that
only the decoding team does. Without a barrier of all warps in the loop, they drift apart, and everything is "beside":
a barrier of some of them, as that of two warps that share x, is not one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from bench.compiled import sass

#: A block with this many PRMT decodes: addresses and halves of registers take only one or two.
_DECODES = 8
#: Classes by the first word of an opcode; Kind.decode tells which of the others decode.
CLASSES = {"HMMA": "hmma", "HGMMA": "hmma", "LDSM": "ldsm", "LDS": "lds", "STS": "sts", "LDGSTS": "ldgsts"}
_ALL = (*dict.fromkeys(CLASSES.values()), "decode", "other")
#: Opcodes of products, by their first word.
PRODUCTS = ("HMMA", "HGMMA")
PARTS = ("alone", "beside", "decode")
#: Opcodes by the pipe that executes them, by their first word: the integer and logic unit (ALU), and the unit that
#: multiplies floats (FMA). Loads, jumps and the uniform datapath take issue slots alone.
ALU = frozenset(
    {"BMSK", "F2FP", "FMNMX", "FSEL", "FSETP", "I2FP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV"}
    | {"PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIMNMX"}
)
FMA = frozenset(["FADD", "FFMA", "FMUL", "HADD2", "HFMA2", "HMUL2"])
#: IMAD also moves, shifts and adds; the compiler takes it to relieve the ALU. Half of them count for either pipe.
SPLIT = frozenset(["IMAD"])


@dataclass(frozen=True)
class Kind:
    """What the main loop of a family of kernels does.

    Attributes:
        decode: opcodes that decode, within blocks that decode; "IMAD.SHL" stands for every opcode with this prefix, and
            "=LDS" for this one alone.
        weights: how many a thread decodes in a step that decodes; or that from the numbers among the
            template arguments.
        every: a thread decodes in one of this many steps; computed from the same numbers as ``copies``.
        copies: how many copies a thread issues in an inner loop in a step, on average, from the numbers among the
            template arguments.
        products: HMMA of a step, from the same numbers, where an iteration of the loop may have several steps.
        seldom: in how many of the steps it runs what an iteration may skip and what leads to no product.
    """

    decode: tuple[str, ...]
    weights: int | Callable[[list[int]], int]
    every: Callable[[list[int]], int] = lambda numbers: 1
    copies: Callable[[list[int]], float] = lambda numbers: 1.0
    products: Callable[[list[int]], int] | None = None
    seldom: float = 1.0


@dataclass(frozen=True)
class Block:
    """A basic block."""

    start: int
    instructions: tuple[sass.Instruction, ...]
    following: frozenset[int]

    def count(self, name: str) -> int:
        return sum(one.name == name for one in self.instructions)


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]
    latches: frozenset[int]


class Graph:
    """A function's basic blocks, by the address of their first instruction, and its loops."""

    def __init__(self, function: sass.Function) -> None:
        edges = function.successors()
        addresses = [one.address for one in function.instructions]
        starts = {addresses[0]}
        for address, following in zip(addresses, [*addresses[1:], None]):
            if edges[address] != {following}:
                starts |= edges[address] | ({following} - {None})
        groups: list[list[sass.Instruction]] = []
        for one in function.instructions:
            if one.address in starts:
                groups.append([])
            groups[-1].append(one)
        self.entry = addresses[0]
        self.blocks = {
            group[0].address: Block(group[0].address, tuple(group), frozenset(edges[group[-1].address]))
            for group in groups
        }

    @cached_property
    def dominators(self) -> dict[int, frozenset[int]]:
        """For each reachable block, the blocks on every path to it, itself included."""
        before: dict[int, set[int]] = {start: set() for start in self.blocks}
        order, todo, seen = [], [self.entry], {self.entry}
        while todo:
            start = todo.pop()
            order.append(start)
            for target in self.blocks[start].following:
                before[target].add(start)
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        everything = frozenset(order)
        dominators = {start: everything for start in order}
        dominators[self.entry] = frozenset({self.entry})
        changed = True
        while changed:
            changed = False
            for start in order[1:]:
                new = frozenset.intersection(*(dominators[one] for one in before[start])) | {start}
                if new != dominators[start]:
                    dominators[start], changed = new, True
        return dominators

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, the smallest first; loops that share a header are merged."""
        latches: dict[int, set[int]] = {}
        for start, above in self.dominators.items():
            for target in self.blocks[start].following & above:
                latches.setdefault(target, set()).add(start)
        loops = [
            Loop(header, frozenset(self.leading_to(ends, stop={header})), frozenset(ends))
            for header, ends in latches.items()
        ]
        return sorted(loops, key=lambda loop: len(loop.blocks))

    def leading_to(self, ends: Iterable[int], stop: set[int], within: frozenset[int] | None = None) -> set[int]:
        """Blocks that lead to one of ``ends`` without leaving a block of ``stop``; both included."""
        before: dict[int, list[int]] = {}
        for start in self.dominators if within is None else within:
            for target in self.blocks[start].following:
                before.setdefault(target, []).append(start)
        seen, todo = set(stop), [end for end in ends if within is None or end in within]
        while todo:
            start = todo.pop()
            if start not in seen:
                seen.add(start)
                todo += before.get(start, [])
        return seen


@dataclass
class Pipes:
    """Instructions, and how many of them go through a pipe that takes fewer than 32 lanes a clock and scheduler."""

    issue: float = 0.0
    alu: float = 0.0
    fma: float = 0.0

    def add(self, name: str, times: float) -> None:
        self.issue += times
        self.alu += times * (name in ALU or 0.5 * (name in SPLIT))
        self.fma += times * (name in FMA or 0.5 * (name in SPLIT))


@dataclass(frozen=True)
class Step:
    """What a warp issues in a step of the main loop, on average.

    Attributes:
        counts: instructions by class: the values of CLASSES, "decode" and "other".
        slots_per_weight: instructions that decode, for each weight that a thread decodes.
        parts: the same instructions by part of the step: PARTS.
        alone_ldsm: loads of operands (LDSM) that lie before the first product after a barrier, or after the last one.
        decode_beside: which share of the decoding lies between products.
    """

    counts: dict[str, float]
    slots_per_weight: float
    parts: dict[str, Pipes]
    decode_beside: float
    alone_ldsm: float

    @classmethod
    def nothing(cls) -> Step:
        return cls(dict.fromkeys(_ALL, 0.0), 0.0, {part: Pipes() for part in PARTS}, 0.0, 0.0)

    @property
    def total(self) -> float:
        return sum(self.counts.values())

    @property
    def outside(self) -> float:
        """Instructions that neither multiply nor decode."""
        return self.total - self.counts["hmma"] - self.counts["decode"]


def _is_decoding(kind: Kind, one: sass.Instruction) -> bool:
    return any(
        one.opcode == opcode[1:] if opcode[0] == "=" else one.opcode == opcode or one.opcode.startswith(opcode + ".")
        for opcode in kind.decode
    )


def step_of(function: sass.Function, kind: Kind, numbers: list[int]) -> Step | None:
    """What a step of a function's main loop issues; None where no loop holds both HMMA and decoding.

    Args:
        function: a kernel's code.
        kind: what to look for.
        numbers: those among the kernel's template arguments, in their order.
    """
    found = _main_loop(function, kind, numbers)
    if found is None:
        return None
    graph, decoding, times, team, unrolled = found
    between = _between_products([graph.blocks[start] for start in times])
    counts = dict.fromkeys(_ALL, 0.0)
    parts = {part: Pipes() for part in PARTS}
    slots = 0
    decoded_beside = alone_ldsm = 0.0
    padded = function.architecture.startswith("sm_12")
    for start, executions in times.items():
        instructions = graph.blocks[start].instructions
        names = ["", *(one.name for one in instructions), ""]
        for i, one in enumerate(instructions):
            if padded and names[i : i + 3] == ["HMMA", "NOP", "HMMA"]:
                continue
            decodes = start in decoding and _is_decoding(kind, one)
            if decodes:
                counts["decode"] += executions
                slots += 1
                decoded_beside += executions * (one.address in between)
            else:
                # "@!PT LDS" is padding that never loads.
                counts["other" if one.predicate == "!PT" else CLASSES.get(one.name, "other")] += executions
            part = "decode" if decodes or start in team else "beside" if one.address in between else "alone"
            parts[part].add(one.name, executions)
            alone_ldsm += executions * (part == "alone" and one.name == "LDSM")
    weights = kind.weights if isinstance(kind.weights, int) else kind.weights(numbers)
    return Step(counts, slots / unrolled / weights, parts, decoded_beside / counts["decode"], alone_ldsm)


def _main_loop(
    function: sass.Function, kind: Kind, numbers: list[int]
) -> tuple[Graph, set[int], dict[int, float], set[int], int] | None:
    """The graph, those blocks of the main loop that decode, what _times says of them for a step, and the steps in an
    iteration."""
    graph = Graph(function)
    decoding = {start for start, block in graph.blocks.items() if block.count("PRMT") >= _DECODES}
    multiplying = {start for start, block in graph.blocks.items() if any(block.count(name) for name in PRODUCTS)}
    main = next((loop for loop in graph.loops if loop.blocks & decoding and loop.blocks & multiplying), None)
    if main is None:
        return None
    decoding &= main.blocks
    times, team = _times(graph, main, decoding, kind, numbers)
    products = sum(graph.blocks[start].count(name) for start in times for name in PRODUCTS)
    unrolled = max(1, products // kind.products(numbers)) if kind.products else 1
    return graph, decoding, {start: count / unrolled for start, count in times.items()}, team, unrolled


def longest_run(function: sass.Function, kind: Kind, numbers: list[int]) -> int:
    """How many products follow each other in a step, from a barrier to the next, without a PRMT or STS between them.

    Args:
        function, kind, numbers: as for step_of.
    """
    found = _main_loop(function, kind, numbers)
    if found is None:
        return 0
    graph, _, times, _, _ = found
    longest = run = 0
    for one in _from_barrier([graph.blocks[start] for start in times]):
        run = 0 if _is_barrier(one) or one.name in ("PRMT", "STS") else run + (one.name in PRODUCTS)
        longest = max(longest, run)
    return longest


def _is_barrier(one: sass.Instruction) -> bool:
    """Of all warps; one of a few has their number as an operand."""
    return one.name == "BAR" and "," not in one.operands


def _from_barrier(blocks: list[Block]) -> list[sass.Instruction]:
    """A loop's instructions from its last barrier on: what follows that goes on at the loop's beginning."""
    code = [one for block in blocks for one in block.instructions]
    barriers = [i for i, one in enumerate(code) if _is_barrier(one)]
    return code[barriers[-1] :] + code[: barriers[-1]] if barriers else code


def _between_products(blocks: list[Block]) -> set[int]:
    """Addresses of a loop's instructions from the first to the last product after a barrier; all, if it has none that
    all warps wait at. Such a one has no number of threads beside its own number.

    Args:
        blocks: of the loop, by address.
    """
    code = _from_barrier(blocks)
    if not _is_barrier(code[0]):
        return {one.address for one in code}
    stretches: list[list[sass.Instruction]] = []
    for one in code:
        if _is_barrier(one):
            stretches.append([])
        stretches[-1].append(one)
    between = set()
    for stretch in stretches:
        products = [i for i, one in enumerate(stretch) if one.name in PRODUCTS]
        if products:
            between |= {one.address for one in stretch[products[0] : products[-1] + 1]}
    return between


def _times(
    graph: Graph, main: Loop, decoding: set[int], kind: Kind, numbers: list[int]
) -> tuple[dict[int, float], set[int]]:
    """How often each block of the main loop runs in a step, on average, and the blocks that only a team enters."""
    copies = {start for start in main.blocks if graph.blocks[start].count("LDGSTS")}
    inner = [loop for loop in graph.loops if loop.blocks < main.blocks and loop.header != main.header]
    unaligned = {start for loop in inner if not loop.blocks & (copies | decoding) for start in loop.blocks}
    kept = main.blocks - unaligned
    # Without blocks that lead only to unaligned rows.
    kept = frozenset(graph.leading_to(main.latches, {main.header}, kept))
    times = dict.fromkeys(sorted(kept), 1.0)
    # The loops that copy.
    for loop in inner:
        in_loop = sum(graph.blocks[start].count("LDGSTS") for start in loop.blocks & kept)
        if in_loop:
            for start in loop.blocks & kept:
                times[start] *= kind.copies(numbers) / in_loop
    if kind.seldom != 1.0:
        always = frozenset.intersection(*(graph.dominators[latch] for latch in main.latches))
        products = {start for start in kept if graph.blocks[start].count("HMMA")}
        for start in kept - always:
            if not any(start in graph.dominators[product] for product in products):
                times[start] *= kind.seldom
    # Blocks that only decoding steps enter: those dominated by the highest optional block above the decoding.
    always = frozenset.intersection(*(graph.dominators[latch] for latch in main.latches))
    team = set()
    for block in decoding - always:
        entry = min(graph.dominators[block] - always, key=lambda start: len(graph.dominators[start]))
        for start in kept:
            if entry in graph.dominators[start] and times[start] == 1.0:
                times[start] = 1.0 / kind.every(numbers)
                if kind.every(numbers) > 1:
                    team.add(start)
    return times, team
