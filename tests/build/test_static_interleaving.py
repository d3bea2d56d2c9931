"""The compiled tiles decode between products: whatever a warp does between a barrier and its next product keeps the
tensor cores waiting, as all warps leave the barrier together."""

from __future__ import annotations

import re

import pytest
from cuda_code import cuda_wheel
from cuda_code.budgets import budget_of, number_of

from bench.compiled import loops, sass, static

#: Tiles whose products take longer than their decoding: 64 rows and more.
INTERLEAVED = re.compile(r"gemm_kernel<\w+, GemmTraits<\w+, \w+, (64|128), ")
#: Instructions of a warp between a barrier and its next product, or before it and after the last one.
MOST_ALONE = 12
LEAST_BESIDE = 0.9
#: Of a step's products, how many may follow each other without decoding, by rows of the tile: copies and the next
#: constants lie there.
MOST_IN_A_ROW = {64: 0.875, 128: 0.72}


def faults(kernel: str, code: sass.Function) -> list[str]:
    """What in a kernel's main loop keeps decoding and products apart."""
    kind, numbers = static.LOOPS["gemm_kernel"], static.numbers_in(kernel)
    step = loops.step_of(code, kind, numbers)
    if step is None:
        return ["no loop with HMMA and decoding is found"]
    found = []
    if step.decode_beside < LEAST_BESIDE:
        found.append(f"{step.decode_beside:.0%} of the decoding lies between products, not {LEAST_BESIDE:.0%}")
    if step.parts["alone"].issue > MOST_ALONE:
        found.append(f"{step.parts['alone'].issue:g} instructions around a barrier, {MOST_ALONE} allowed")
    if step.alone_ldsm:
        found.append(f"the first products wait for {step.alone_ldsm:g} LDSM")
    run = loops.longest_run(code, kind, numbers)
    if run > MOST_IN_A_ROW[numbers[0]] * step.counts["hmma"]:
        found.append(f"{run} of {step.counts['hmma']:g} HMMA without decoding between them")
    return found


@pytest.mark.slow
def test_decoding_lies_between_products():
    code = static.functions(cuda_wheel.extension())
    names = static.readable([one.symbol for one in code])
    checked, problems = 0, []
    for one in code:
        kernel = names[one.symbol]
        row = {"kernel": kernel, "arch": one.architecture, "shared_dynamic": budget_of(kernel).shared}
        # On sm_75 each product has half the depth, and copies are loads and stores.
        if INTERLEAVED.match(kernel) and budget_of(kernel).runs(row) and int(number_of(one.architecture)) >= 80:
            checked += 1
            problems += [f"{kernel} for {one.architecture}: {fault}" for fault in faults(kernel, one)]
    assert not problems, "\n".join(problems)
    # Both types, both directions, four tiles.
    assert checked >= 16 * len([arch for arch in cuda_wheel.built_for() if int(number_of(arch)) in (80, 90)])


# -------------------------------------------------------------------------------------------- the gate can fail

KERNEL = "gemm_kernel<bf16, GemmTraits<bf16, false, 128, 256, 2, 4>>"
#: Turns of a step: H products, D decoding of a word and its store, M loads of operands. | is the barrier.
GOOD = "HHMDHHMDHHMDHH|"
WORDS = {
    "H": ["HMMA.16816.F32.BF16 R8, R4, R6, R8"] * 4,
    "D": ["PRMT R26, R20, 0x9d8c, R24"] * 8 + ["STS.128 [R9], R24"],
    "M": ["LDSM.16.M88.4 R4, [R1]"] * 4,
    ".": ["IADD3 R1, R1, R2"] * 5,
    "|": ["DEPBAR.LE SB0, 0x1", "BAR.SYNC.DEFER_BLOCKING 0x0"],
}


def assembled(turns: str) -> sass.Function:
    """A loop of these turns."""
    lines = [line for turn in turns for line in WORDS[turn]]
    lines = [*lines, "@P0 BRA 0x0", "EXIT"]
    text = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    (one,) = sass.parse(f"\tcode for sm_90a\n\t\tFunction : _Zloop\n{text}")
    assert len(one.instructions) == len(lines)
    return one


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        (GOOD, []),
        # Arithmetic between products, or a little of it around the barrier.
        ("HH.MDHHMDHHMDHH|", []),
        ("HHMDHHMDHHMDHH.|", []),
        # All of the decoding before the first product, after the last one, in one place; some of it behind the barrier.
        ("MDDDHHHHHHHH|", ["0% of the decoding", "wait for 4 LDSM", "32 of 32 HMMA"]),
        ("HHHHHHHHMDDD|", ["0% of the decoding", "wait for 4 LDSM", "32 of 32 HMMA"]),
        ("HHHHHHHMDDDH|", ["28 of 32 HMMA"]),
        ("HHHHHMDHDHDH|", []),
        ("HHHHHHMDHDDH|", ["24 of 32 HMMA"]),
        ("DHHHMDHHHMDHH|", ["67% of the decoding"]),
        # Operands that are loaded behind the barrier, and much around it.
        ("MHHDHHMDHHMDHH|", ["wait for 4 LDSM"]),
        ("HHMDHHMDHHMDHH...|", ["18 instructions around a barrier"]),
        ("HHHH|", ["no loop"]),
    ],
)
def test_what_is_apart_is_found(turns, found):
    actual = faults(KERNEL, assembled(turns))
    assert len(actual) == len(found), actual
    for fault, words in zip(actual, found):
        assert words in fault
