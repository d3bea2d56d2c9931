"""How compiled kernels end where blocks share work: without sequentially consistent fences, which wait longer than
release and acquire need, with several parts on their way at a time, and in clusters from sm_90 on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_code import cuda_wheel
from cuda_code.budgets import number_of

from bench.compiled import sass, static

#: Kernels whose blocks leave something to a last one, and how many 128-bit loads of it are on their way at least.
SHARING = {
    r"middle_kernel<.*>": 14,
    r"gemm_kernel<.*, 128, \d, \d>>": 14,  # tiles of 256 columns are not shared
    r"adapter_down_kernel<.*>": 14,
    r"optimizer_norm_kernel": 0,
    r"optimizer_step_kernel<.*>": 0,
}
#: Those whose blocks form clusters, where has_clusters() in dispatch.h says so.
CLUSTERS = r"(middle|gemm)_kernel"


def faults_of(name: str, one: sass.Function) -> list[str]:
    """What is wrong with the end of a kernel of that name."""
    fences = one.named("MEMBAR")
    faults = [f"{i.opcode} at {i.address:#x}" for i in fences if ".SC" in i.opcode]
    pattern = next((pattern for pattern in SHARING if re.fullmatch(pattern, name)), None)
    if pattern is None or one.count <= static.MOST_OF_A_TRAP:
        return faults
    if not any("ALL.GPU" in i.opcode for i in fences):
        faults.append("no fence for the device")
    if not any(i.name in ("ATOM", "ATOMG") and ".STRONG.GPU" in i.opcode for i in one.instructions):
        faults.append("no atomic operation whose result is used")
    if (under_way := loads_under_way(one)) < SHARING[pattern]:
        faults.append(f"{under_way} loads of other blocks' parts under way, {SHARING[pattern]} expected")
    clusters = len(one.named("UCGABAR_ARV"))
    expected = 2 if re.match(CLUSTERS, name) and 90 <= int(number_of(one.architecture)) < 120 else 0
    if clusters != expected:
        faults.append(f"{clusters} arrivals at a cluster's barrier, {expected} expected")
    return faults


def loads_under_way(one: sass.Function) -> int:
    """The most 128-bit loads past L1 that follow each other before a float32 addition waits for one."""
    most = now = 0
    for i in one.instructions:
        if i.name == "LDG" and i.bits == 128 and "STRONG.GPU" in i.opcode:
            now += 1
            most = max(most, now)
        elif i.name == "FADD":
            now = 0
    return most


@pytest.fixture(scope="module")
def module() -> Path:
    return cuda_wheel.extension()


@pytest.mark.slow
def test_no_kernel_has_a_sequentially_consistent_fence_and_shared_work_ends_soon(module):
    code = static.functions(module)
    names = static.readable([one.symbol for one in code])
    faults = [
        f"{names[one.symbol]} for {one.architecture}: {fault}"
        for one in code
        for fault in faults_of(names[one.symbol], one)
    ]
    assert not faults, "\n".join(faults)
    for pattern in SHARING:
        assert any(re.fullmatch(pattern, name) for name in names.values()), pattern


def listed(lines: list[str], architecture: str = "sm_90a") -> sass.Function:
    """Code of these instructions, parsed; padding makes it more than a trap."""
    lines = [*lines, *["MOV R1, R2"] * 20, "EXIT"]
    text = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    (one,) = sass.parse(f"\tcode for {architecture}\n\t\tFunction : _Zsample\n{text}")
    assert len(one.instructions) == len(lines)
    return one


MIDDLE = "middle_kernel<bf16, MiddleTraits<bf16, 8, true>>"
FENCE, TICKET = "MEMBAR.ALL.GPU", "@P0 ATOMG.E.ADD.64.STRONG.GPU PT, R12, desc[UR8][R24.64], R12"
LOADS = [f"LDG.E.128.STRONG.GPU R{4 * i}, desc[UR6][R2.64+0x{4096 * i:x}]" for i in range(14)]
ADD, ARRIVE = "FADD R1, R1, R2", "UCGABAR_ARV"
GOOD = [FENCE, TICKET, *LOADS, ADD, ARRIVE, ARRIVE]


@pytest.mark.parametrize(
    ("name", "lines", "architecture", "fault"),
    [
        (MIDDLE, GOOD, "sm_90a", None),
        (MIDDLE, GOOD[:-2], "sm_80", None),
        (MIDDLE, ["MEMBAR.SC.GPU", *GOOD], "sm_90a", "MEMBAR.SC.GPU at 0x0"),
        ("few_kernel<bf16, true>", ["MEMBAR.SC.SYS"], "sm_90a", "MEMBAR.SC.SYS at 0x0"),
        ("few_kernel<bf16, true>", [], "sm_90a", None),
        (MIDDLE, ["MEMBAR.ALL.CTA", *GOOD[1:]], "sm_90a", "no fence for the device"),
        (MIDDLE, [FENCE, *GOOD[2:]], "sm_90a", "no atomic operation whose result is used"),
        (MIDDLE, [FENCE, TICKET, *LOADS[:7], ADD, *LOADS[7:], ADD, ARRIVE, ARRIVE], "sm_90a", "7 loads of other"),
        (MIDDLE, GOOD[:-1], "sm_90a", "1 arrivals at a cluster's barrier, 2 expected"),
        (MIDDLE, GOOD, "sm_80", "2 arrivals at a cluster's barrier, 0 expected"),
        ("optimizer_norm_kernel", [FENCE, TICKET], "sm_90a", None),
        ("gemm_kernel<bf16, GemmTraits<bf16, false, 128, 256, 2, 4>>", [], "sm_90a", None),
    ],
)
def test_the_gate_closes(name, lines, architecture, fault):
    faults = faults_of(name, listed(lines, architecture))
    assert bool(faults) == (fault is not None), faults
    assert fault is None or (len(faults) == 1 and faults[0].startswith(fault)), faults
