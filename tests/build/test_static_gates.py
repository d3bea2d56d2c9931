"""The compiled CUDA kernels: no spills, wide accesses where promised, registers and shared memory within budget, and
main loops that multiply on tensor cores and issue no more than stated."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_code import cuda_wheel
from cuda_code.budgets import BUDGETS, MAX_SHARED, Budget, LoopBudget, budget_of, number_of

from bench.compiled import sass, static
from qlora_kernels.native import architectures
from qlora_kernels.version import BASE


@pytest.fixture(scope="module")
def module() -> Path:
    return cuda_wheel.extension()


@pytest.fixture(scope="module")
def report(module) -> dict:
    return static.report(module)


@pytest.fixture(scope="module")
def code(module) -> list[sass.Function]:
    return static.functions(module)


def broken(row: dict, budget: Budget) -> list[str]:
    """What in a row of the table exceeds the budget."""
    trap = row["instructions"] <= static.MOST_OF_A_TRAP
    if not budget.runs(row):
        return [] if trap else [f"{row['instructions']} instructions, and it is never launched there"]
    if trap:
        return ["no code, and it is launched there"]
    faults = [
        f"{row[key]} {what}"
        for key, what in (
            ("local_accesses", "accesses to local memory"),
            ("stack", "bytes of stack"),
            ("local", "bytes of local memory"),
        )
        if row[key]
    ]
    allowed = budget.registers(row["arch"])
    if row["registers"] > allowed:
        faults.append(f"{row['registers']} registers, {allowed} allowed: {budget.reason}")
    # What the hardware keeps for itself counts as static from sm_90 on.
    own_static = row["shared_static"] - (1024 if int(number_of(row["arch"])) >= 90 else 0)
    if own_static > 0:
        faults.append(f"{own_static} bytes of static shared memory, none allowed")
    if row["shared_dynamic"] > budget.shared:
        faults.append(f"{row['shared_dynamic']} bytes of shared memory, {budget.shared} allowed: {budget.reason}")
    for key, promised in (("ldg128", budget.loads_128), ("stg128", budget.stores_128)):
        if row[key] < promised:
            faults.append(f"{row[key]} {key.upper()}, {promised} promised")
    return faults + broken_loop(row, budget)


def broken_loop(row: dict, budget: Budget) -> list[str]:
    """What in the main loop exceeds the budget."""
    if budget.loop is None:
        return ["state a budget of its main loop"] if "step_hmma" in row else []
    if not row.get("step_hmma"):
        return ["no loop with HMMA and decoding is found"]
    faults = []
    hmma = budget.loop.hmma * (2 if int(number_of(row["arch"])) < 80 else 1)
    if row["step_hmma"] != hmma:
        faults.append(f"{row['step_hmma']:g} HMMA in a step of the main loop, {hmma} expected")
    if not 0 < row["slots_per_weight"] <= budget.loop.slots:
        faults.append(f"{row['slots_per_weight']:.2f} instructions to decode a weight, {budget.loop.slots} allowed")
    if row["step_outside"] > budget.loop.outside:
        faults.append(f"{row['step_outside']:g} outside MMA and decoding in a step, {budget.loop.outside:g} allowed")
    return faults


# ------------------------------------------------------------------------------------------------------------ gates


@pytest.mark.slow
def test_every_kernel_of_every_architecture_is_within_its_budget(report):
    kernels = {row["kernel"] for row in report["kernels"]}
    without = sorted(kernel for kernel in kernels if budget_of(kernel) is None)
    assert not without, f"state budgets in tests/support/cuda_code/budgets.py for {', '.join(without)}"
    used = {id(budget_of(kernel)) for kernel in kernels}
    unused = [pattern for pattern, budget in BUDGETS.items() if id(budget) not in used]
    assert not unused, f"tests/support/cuda_code/budgets.py: there is no kernel {', '.join(unused)}"
    assert len(report["kernels"]) == len(kernels) * len(cuda_wheel.built_for())
    problems = [
        f"{row['kernel']} for {row['arch']}: {problem}"
        for row in report["kernels"]
        for problem in broken(row, budget_of(row["kernel"]))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_no_thread_that_stores_128_bits_stores_fewer_at_a_time(code):
    names = static.readable([one.symbol for one in code])
    checked = 0
    for one in code:
        if budget_of(names[one.symbol]).stores_128:
            mixed = one.mixed_stores()
            assert not mixed, f"{names[one.symbol]} for {one.architecture}: {mixed[0]}"
            checked += 1
    assert checked == 3 * len(cuda_wheel.built_for())


#: Kernels whose lanes choose between two only, and nearly always the same: the spans of narrow.cuh.
_BY_SPAN = ("narrow_kernel",)
#: An address in a launch's parameters that each lane has in a register of its own. (c[0x2] has jump tables.)
_BY_LANE = re.compile(r"c\[0x0\]\[R\d")


def divergent_constants(one: sass.Function) -> list[str]:
    """Loads of parameters by an index of each lane, in a loop or more than once: lanes whose indices differ take turns.
    A lane's value can be loaded once and go through shuffles."""
    loads = [load for load in one.named("LDC") if _BY_LANE.search(load.operands)]
    looping = [load for load in loads if load.address in one.after({load.address})]
    return [
        f"{load.opcode} {load.operands} at {load.address:#x}" for load in looping or (loads if len(loads) > 1 else [])
    ]


@pytest.mark.slow
def test_lanes_do_not_take_turns_at_constants(code):
    names = static.readable([one.symbol for one in code])
    code = [one for one in code if names[one.symbol].partition("<")[0] not in _BY_SPAN]
    problems = [
        f"{names[one.symbol]} for {one.architecture}: {load}" for one in code for load in divergent_constants(one)
    ]
    assert not problems, "\n".join(problems)
    # As many as the kernels that look levels up, so that the gate cannot pass by recognizing none.
    once = {
        names[one.symbol].partition("<")[0]
        for one in code
        if any(_BY_LANE.search(load.operands) for load in one.named("LDC"))
    }
    products = {"few_kernel", "product_kernel", "grouped_product_kernel", "warpgroup_kernel"}
    assert once == {"dequantize_kernel", "quantize_kernel", *products}


def late_starts(one: sass.Function) -> list[str]:
    """What keeps an optimizer's block from its first elements: a jump table, or loads for the scalars that come only
    after float64 arithmetic on others."""
    barrier = next((i.address for i in one.named("BAR")), 0)
    before = [i for i in one.instructions if i.address < barrier]
    doubles = [i.address for i in before if i.name in ("DADD", "DMUL", "DFMA")]
    faults = [f"{i.opcode} at {i.address:#x}" for i in one.named("BRX")]
    if not barrier or not doubles:
        return [*faults, "no float64 arithmetic before a barrier is found"]
    return faults + [f"{i.opcode} at {i.address:#x}" for i in before if i.name == "LDG" and i.address > min(doubles)]


@pytest.mark.slow
def test_an_optimizers_block_has_its_scalars_soon(code):
    names = static.readable([one.symbol for one in code])
    assert not [names[one.symbol] for one in code if one.named("BRX")], "a jump table"
    of_steps = [one for one in code if re.fullmatch(r"optimizer_step_kernel<\w+, 32>", names[one.symbol])]
    assert len(of_steps) == 2 * len(cuda_wheel.built_for())
    for one in of_steps:
        assert not late_starts(one), f"{names[one.symbol]} for {one.architecture}"
        # Only AdamW divides and takes a root in float64.
        slow = any("64H" in i.opcode for i in one.named("MUFU"))
        assert slow == ("AdamW" in names[one.symbol]), f"{names[one.symbol]} for {one.architecture}"


@pytest.mark.slow
def test_the_committed_table_describes_this_code(report):
    path = static.path_for(report["archs"])
    if cuda_wheel.built_for() != cuda_wheel.ARCHITECTURES and not path.exists():
        pytest.skip(f"only the table for {', '.join(cuda_wheel.ARCHITECTURES)} is kept")
    committed = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == static.markdown(committed), f"bench.compiled.static: {path.stem}.md"
    if committed["nvcc"] != report["nvcc"]:
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, and here is {report['nvcc']}")
    changed = [
        f"{new['kernel']} for {new['arch']}: {key} {old[key]} -> {new[key]}"
        for old, new in zip(committed["kernels"], report["kernels"])
        for key in new
        if old.get(key) != new[key]
    ]
    same_rows = len(committed["kernels"]) == len(report["kernels"])
    advice = f"the code has changed; if that is meant: python -m bench.compiled.static {cuda_wheel.wheel()}"
    assert same_rows, advice
    assert not changed, "\n".join([advice, *changed])


@pytest.mark.slow
def test_readmes_wheel_has_all_architectures_below_30_mib_and_no_spills(report):
    """bench/results/wheel-all.json: not built here, but checked against what is."""
    kept = json.loads((static.FOLDER / "wheel-all.json").read_text())
    assert kept["wheel_bytes"] < 30 * 2**20
    local = architectures.local_version("13.0", architectures.ALL)
    assert kept["wheel"].split("-")[1] == f"{BASE}{local}"
    of_all = {row["arch"]: row for row in kept["archs"]}
    assert [*of_all] == [name for name in architectures.names(architectures.ALL) if name.startswith("sm_")]
    assert not any(row["local_accesses"] for row in of_all.values())
    here = [row for row in static.by_architecture(report["kernels"]) if row["arch"] in of_all]
    assert here or cuda_wheel.built_for() != cuda_wheel.ARCHITECTURES
    for row in here:
        like = pytest.approx(of_all[row["arch"]]["code_bytes"], rel=0.1)
        assert row["code_bytes"] == like, f"{row['arch']}: the code has changed; python -m bench.compiled.wheel"


# -------------------------------------------------------------------------------------------- the gates can fail


#: A thread's two ways: one with wide stores, one with narrow ones; a spill; a loop; a subroutine; padding.
SAMPLE = """
Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
		Function : _Zsample
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x60 ;                            /* 0x0000000000000947 */
        /*0020*/                   LDG.E.NA.LTC128B.128.CONSTANT R4, desc[UR6][R4.64] ;  /* 0x0 */
        /*0030*/                   STL.64 [R1+0x8], R4 ;                 /* 0x0000080401007387 */
        /*0040*/                   STG.E.128 desc[UR6][R2.64+0x200], R8 ; /* 0x0 */
        /*0050*/                   EXIT ;                                /* 0x000000000000794d */
        /*0060*/                   BSSY B0, 0xa0 ;                       /* 0x0 */
        /*0070*/                   BRA.DIV UR4, 0x90 ;                   /* 0x0 */
        /*0080*/              @!P1 STG.E.U16 desc[UR6][R2.64], R9 ;      /* 0x0 */
        /*0090*/                   BSYNC B0 ;                            /* 0x0 */
        /*00a0*/               @P2 BRA 0x60 ;                            /* 0x0 */
        /*00b0*/                   LDL R3, [R1+0x8] ;                    /* 0x0 */
        /*00c0*/                   EXIT ;                                /* 0x0 */
        /*00d0*/                   BRA 0xd0;                             /* 0x0 */
        /*00e0*/                   NOP;                                  /* 0x0 */
		..........
"""


def test_the_reader_finds_spills_and_widths():
    (sample,) = sass.parse(SAMPLE)
    assert (sample.architecture, sample.symbol) == ("sm_90a", "_Zsample")
    assert [one.opcode for one in sample.local_accesses] == ["STL.64", "LDL"]
    assert [one.bits for one in sample.named("LDG", "STG")] == [128, 128, 16]
    assert (sample.count, sample.size) == (13, 0xF0)
    assert sample.instructions[1].predicate == "!P0"


def test_the_reader_follows_jumps():
    (sample,) = sass.parse(SAMPLE)
    edges = sample.successors()
    assert edges[0x10] == {0x20, 0x60}
    assert edges[0x50] == set()
    assert edges[0x70] == {0x80, 0x90}
    assert edges[0x90] == {0xA0}
    assert edges[0xD0] == {0xD0}
    assert sample.after({0x60}) == {*range(0x60, 0xD0, 0x10)}
    assert not sample.mixed_stores()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A wide store that goes on into the narrow ones, and narrow ones that go on to the wide.
        ("/*0050*/                   EXIT", "/*0050*/               @P4 EXIT"),
        ("/*00c0*/                   EXIT", "/*00c0*/                   BRA 0x20"),
        # A narrow one among the wide.
        ("LDG.E.NA.LTC128B.128.CONSTANT R4, desc[UR6][R4.64]", "STG.E desc[UR6][R2.64], R4"),
    ],
)
def test_mixed_stores_are_found(before, after):
    assert before in SAMPLE
    (sample,) = sass.parse(SAMPLE.replace(before, after))
    assert sample.mixed_stores()


def test_a_jump_that_cannot_be_followed_is_an_error():
    (sample,) = sass.parse(SAMPLE.replace("BRA.DIV UR4, 0x90", "BRX R4 -0x90"))
    with pytest.raises(ValueError, match=r"_Zsample: BRX at 0x70 jumps to an address in a register"):
        sample.mixed_stores()


def listed(lines: str) -> sass.Function:
    """Code of these instructions and an EXIT, parsed."""
    code = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate([*lines.split("; "), "EXIT"]))
    (one,) = sass.parse(f"\tcode for sm_90a\n\t\tFunction : _Zsample\n{code}")
    assert len(one.instructions) == len(lines.split("; ")) + 1
    return one


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("LDC R8, c[0x0][R3+0x160]", 0),
        ("LDC R12, c[0x2][R27]; BRX R12 -0x20", 0),
        ("LDC R8, c[0x0][R3+0x160]; LDC.64 R10, c[0x0][0x210]; LDC R9, c[0x0][UR4+0x160]", 0),
        ("LDC R8, c[0x0][R3+0x160]; LDC R9, c[0x0][R4+0x190]", 2),
        ("LDC R8, c[0x0][R3+0x160]; @P0 BRA 0x0", 1),
        ("LDC R8, c[0x0][R3+0x160]; FADD R1, R1, R8; @P0 BRA 0x10", 0),
    ],
)
def test_divergent_constants_are_found(lines, found):
    assert len(divergent_constants(listed(lines))) == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("LDG.E R2, [R4]; DMUL R2, R2, R2; BAR.SYNC 0x0; LDG.E R2, [R4]", 0),
        ("DMUL R2, R2, R2; LDG.E R2, [R4]; BAR.SYNC 0x0", 1),
        ("LDG.E R2, [R4]; DMUL R2, R2, R2; BAR.SYNC 0x0; BRX R12 -0x20", 1),
        ("LDG.E R2, [R4]; BAR.SYNC 0x0; DMUL R2, R2, R2", 1),
        ("LDG.E R2, [R4]; DMUL R2, R2, R2", 1),
    ],
)
def test_late_starts_are_found(lines, found):
    assert len(late_starts(listed(lines))) == found


def test_the_reader_of_resources():
    text = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Zsample:
  REG:48 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[2]:8 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    (kernel,) = sass.parse_usage(text).items()
    assert kernel[0] == ("sm_80", "_Zsample")
    assert {key: kernel[1][key] for key in ("REG", "STACK", "SHARED", "LOCAL")} == {
        "REG": 48,
        "STACK": 16,
        "SHARED": 1024,
        "LOCAL": 8,
    }


GOOD = {
    "kernel": "k",
    "arch": "sm_90a",
    "registers": 32,
    "shared_static": 1024,
    "shared_dynamic": 4096,
    "stack": 0,
    "local": 0,
    "local_accesses": 0,
    "instructions": 100,
    "ldg128": 1,
    "stg128": 4,
}
BUDGET = Budget(2048, 4096, "because", loads_128=1, stores_128=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_accesses": 1}, "1 accesses to local memory"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"registers": 33}, "33 registers, 32 allowed: because"),
        ({"registers": 41, "arch": "sm_89", "shared_static": 0}, "41 registers, 40 allowed: because"),
        ({"registers": 65, "arch": "sm_75", "shared_static": 0}, "65 registers, 64 allowed: because"),
        ({"shared_static": 1028}, "4 bytes of static shared memory, none allowed"),
        ({"arch": "sm_80"}, "1024 bytes of static shared memory, none allowed"),
        ({"shared_dynamic": 4097}, "4097 bytes of shared memory, 4096 allowed: because"),
        ({"ldg128": 0}, "0 LDG128, 1 promised"),
        ({"stg128": 3}, "3 STG128, 4 promised"),
        ({"instructions": 2}, "no code, and it is launched there"),
    ],
)
def test_each_gate_closes(change, message):
    assert broken(GOOD, BUDGET) == []
    assert broken({**GOOD, **change}, BUDGET) == [message]


def test_what_is_never_launched_has_no_code():
    """Because shared memory is too small, or the tensor cores don't take bf16."""
    roomy = replace(BUDGET, shared=100 * 1024)
    for arch, shared, goes in (("sm_89", 99, True), ("sm_89", 100, False), ("sm_80", 100, True), ("sm_75", 65, False)):
        row = {**GOOD, "arch": arch, "shared_static": 0, "shared_dynamic": shared * 1024}
        assert broken(row, roomy) == ([] if goes else ["100 instructions, and it is never launched there"]), row
        assert bool(broken({**row, "instructions": 2}, roomy)) == goes, row
        assert broken(row, replace(roomy, least_shared=64 * 1024)) == [], row
    for kernel, arch, goes in (
        ("few_kernel<bf16, true>", "sm_75", False),
        ("few_kernel<fp16, true>", "sm_75", True),
        ("few_kernel<bf16, true>", "sm_80", True),
        ("quantize_kernel<bf16>", "sm_75", True),
    ):
        row = {**GOOD, "kernel": kernel, "arch": arch, "shared_static": 0}
        assert BUDGET.runs(row) == goes, row


def test_kernels_are_left_out_by_the_hardwares_limits(tmp_path):
    """budgets.py and most_shared() in dispatch.h say the same of every architecture."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    numbers = ["75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121"]
    (tmp_path / "limits.cpp").write_text(
        '#include <cstdio>\n#include "cuda/common/dispatch.h"\nint main() {\n'
        f"    for (const int one : {{{', '.join(numbers)}}})\n"
        '        std::printf("%zu\\n", qlk::cuda::most_shared(one) / 1024);\n}\n'
    )
    program = tmp_path / "limits"
    include = f"-I{cuda_wheel.ROOT / 'csrc'}"
    static._run(compiler, "-std=c++17", include, "-o", str(program), str(tmp_path / "limits.cpp"))
    assert [int(line) for line in static._run(str(program)).split()] == [MAX_SHARED.get(one, 227) for one in numbers]
    assert set(MAX_SHARED) <= set(numbers)


LOOP = {**GOOD, "step_hmma": 64.0, "step_outside": 300.0, "slots_per_weight": 3.2}
WITH_LOOP = replace(BUDGET, loop=LoopBudget(64, outside=300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_hmma": 0.0}, "no loop with HMMA and decoding is found"),
        ({"step_hmma": 32.0}, "32 HMMA in a step of the main loop, 64 expected"),
        ({"slots_per_weight": 3.31}, "3.31 instructions to decode a weight, 3.3 allowed"),
        ({"slots_per_weight": 0.0}, "0.00 instructions to decode a weight, 3.3 allowed"),
        ({"slots_per_weight": float("nan")}, "nan instructions to decode a weight, 3.3 allowed"),
        ({"step_outside": 300.5}, "300.5 outside MMA and decoding in a step, 300 allowed"),
        ({"arch": "sm_75", "shared_static": 0}, "64 HMMA in a step of the main loop, 128 expected"),
    ],
)
def test_each_gate_of_the_main_loop_closes(change, message):
    assert broken(LOOP, WITH_LOOP) == []
    assert broken({**LOOP, **change}, WITH_LOOP) == [message]


def test_every_kernel_with_a_main_loop_has_a_budget_for_it():
    assert broken(LOOP, BUDGET) == ["state a budget of its main loop"]
    assert broken(GOOD, WITH_LOOP) == ["no loop with HMMA and decoding is found"]
    for pattern, budget in BUDGETS.items():
        assert (budget.loop is not None) == (pattern.partition("<")[0] in static.LOOPS), pattern


@pytest.mark.slow
def test_a_kernel_compiled_with_too_few_registers_does_not_pass(tmp_path):
    """The whole way, from the compiler: quantize held to 24 registers spills, and the gate says so."""
    nvcc, _ = cuda_wheel.tool("nvcc"), cuda_wheel.tool("cuobjdump")
    csrc = tmp_path / "csrc"
    shutil.copytree(cuda_wheel.ROOT / "csrc", csrc)
    header = csrc / "cuda" / "quantize" / "quantize.cuh"
    # Launch bounds take precedence over -maxrregcount.
    text, count = re.subn(r"__launch_bounds__\([^)]*\)", "", header.read_text())
    assert count == 1
    header.write_text(text)
    target = tmp_path / "spilled.o"
    include = (f"-I{csrc / 'cuda' / 'device'}", f"-I{csrc}")
    source = str(csrc / "cuda" / "quantize" / "quantize.cu")
    static._run(nvcc, "-std=c++17", "-arch=sm_80", "-maxrregcount=24", *include, "-c", source, "-o", str(target))
    spilled = [row for row in static.rows(target) if row["kernel"] == "quantize_kernel<bf16>"]
    assert len(spilled) == 1
    problems = broken(spilled[0], budget_of("quantize_kernel<bf16>"))
    assert any("accesses to local memory" in problem for problem in problems), problems
