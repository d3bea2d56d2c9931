"""bench/compiled/loops.py finds the main loop in a listing made for it, counts a step, and follows a change in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.compiled import loops, sass

KIND = loops.Kind(
    decode=("PRMT", "LOP3", "IMAD.SHL"), weights=8, every=lambda numbers: 2, copies=lambda numbers: numbers[0] / 32
)

#: The shape of tiles.cuh's loop: labels end in a colon, and jumps name them.
LISTING = """
    IADD3 R1, R1, R2
low:
    LDSM.16.M88.4 R4, [R1]
    HMMA.16816.F32.BF16 R8, R4, R6, R8
    @P0 BRA low
step:
    BAR.SYNC 0x0
    @P1 BRA copied
copy:
    LOP3.LUT R9, R9, 0x7, RZ, 0xc0, !PT
    @P3 BRA element_way
    @!PT LDS RZ, [RZ]
    LDGSTS.E.BYPASS.128 [R9], desc[UR8][R10.64]
    BRA copy_end
element_way:
    IADD3 R3, R3, R2
element:
    LDG.E.U16 R3, [R10]
    STS.U16 [R9], R3
    @P4 BRA element
copy_end:
    @P5 BRA copy
copied:
    @P6 BRA decoded
    LDS.128 R20, [R9]
    IMAD.SHL.U32 R24, R20, 0x10, RZ
    IMAD R25, R20, 0x10, RZ
    PRMTS
    LOP3.LUT R26, R20, R21, R22, 0xca, !PT
    STS.128 [R9], R24
    @P7 BRA decoded
    LDG.E R30, [R12]
decoded:
    LDSM.16.M88.4 R4, [R1]
    HMMA.16816.F32.BF16 R8, R4, R6, R8
    HMMA.16816.F32.BF16 R12, R4, R6, R12
    @P2 BRA step
    EXIT
"""


def assembled(listing: str) -> sass.Function:
    """A listing as cuobjdump would print it, parsed."""
    listing = listing.replace("PRMTS", "\n".join(["PRMT R26, R20, 0x9d8c, R24"] * 8))
    labels: dict[str, int] = {}
    lines = []
    for line in filter(None, map(str.strip, listing.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(lines) * 16
        else:
            lines.append(line)
    text = ["\tcode for sm_90a", "\t\tFunction : _Zloop"]
    for i, line in enumerate(lines):
        head, _, target = line.rpartition("BRA ")
        text.append(f"        /*{i * 16:04x}*/  {head + 'BRA ' + hex(labels[target]) if target in labels else line} ;")
    (function,) = sass.parse("\n".join(text))
    assert len(function.instructions) == len(lines)
    return function


def step(listing: str, rows: int = 128) -> loops.Step | None:
    return loops.step_of(assembled(listing), KIND, [rows])


def test_a_step_is_counted_by_class():
    counted = step(LISTING)
    # 8 PRMT, the shift and the choice, every second step.
    assert counted.counts == {
        "hmma": 2,
        "decode": 5,
        "ldsm": 1,
        "lds": 0.5,
        "sts": 0.5,
        "ldgsts": 4,
        # The barrier and a jump; 4 copies of 5; the jump around decoding; half of IMAD, a jump and LDG; the last jump.
        "other": 2 + 4 * 5 + 1 + 1.5 + 1,
    }
    assert counted.slots_per_weight == 10 / 8
    assert counted.outside == counted.total - 2 - 5


def test_copies_count_by_the_rows():
    assert step(LISTING, rows=16).counts["ldgsts"] == 0.5
    difference = step(LISTING, rows=64).total - step(LISTING, rows=32).total
    assert difference == 6
    unrolled = LISTING.replace("    BRA copy_end", "    LDGSTS.E.BYPASS.128 [R9], desc[UR8][R10.64]\n    BRA copy_end")
    assert step(unrolled).counts["ldgsts"] == 4


def test_decoding_that_every_step_does_counts_fully():
    counted = step(LISTING.replace("    @P6 BRA decoded\n", ""))
    assert counted.counts["decode"] == 10
    assert counted.slots_per_weight == 10 / 8


def test_tables_in_shared_memory():
    """Look-ups are loads then, and decoding may share one block of code with the rest."""
    listing = """
step:
    LDS.128 R20, [R9]
    PRMTS
    LDS.64 R24, [R26]
    FMUL R24, R24, R30
    F2FP.BF16.F32.PACK_AB R24, R24, R25
    HMMA.16816.F32.BF16 R8, R4, R24, R8
    @P2 BRA step
    EXIT
"""
    kind = loops.Kind(decode=("PRMT", "LDS.64", "FMUL", "F2FP"), weights=8)
    counted = loops.step_of(assembled(listing), kind, [])
    assert counted.slots_per_weight == 11 / 8
    assert counted.counts == {"hmma": 1, "decode": 11, "ldsm": 0, "lds": 1, "sts": 0, "ldgsts": 0, "other": 1}


#: The shape of rows64.cuh's loop: two steps an iteration, a barrier of two warps, constants every few steps.
UNROLLED = """
step:
    BAR.SYNC.DEFER_BLOCKING R3, 0x40
    LDS.128 R20, [R9]
    PRMTS
    LDS R24, [R26]
    HMMA.16816.F32.BF16 R8, R4, R24, RZ
    FFMA R30, R31, R8, R30
    @P0 BRA first
    FMUL R24, R24, R30
    STS [R26], R24
first:
    @P1 BRA out
    BAR.SYNC.DEFER_BLOCKING R3, 0x40
    PRMTS
    LDS R24, [R26]
    HMMA.16816.F32.BF16 R8, R4, R24, RZ
    FFMA R30, R31, R8, R30
    @P2 BRA step
out:
    EXIT
"""


def test_several_steps_an_iteration():
    kind = loops.Kind(decode=("PRMT", "=LDS", "FFMA"), weights=8, products=lambda numbers: 1, seldom=0.25)
    counted = loops.step_of(assembled(UNROLLED), kind, [])
    # Halves of an iteration's; a quarter of what it may skip: a store, a multiplication.
    assert counted.counts == {
        **{"hmma": 1, "decode": 10, "ldsm": 0, "lds": 0.5, "sts": 0.125, "ldgsts": 0},
        "other": (2 + 3 + 0.25) / 2,
    }
    assert counted.slots_per_weight == 10 / 8
    # A barrier of two warps does not make all of them begin alike.
    assert counted.parts["alone"].issue == 0
    everyone = assembled(UNROLLED.replace("R3, 0x40", "0x0"))
    assert loops.step_of(everyone, kind, []).parts["alone"].issue > 0


@pytest.mark.parametrize(
    ("before", "after", "key", "more"),
    [
        ("PRMTS", "PRMTS\n    PRMT R26, R20, 0x9d8c, R24", "decode", 0.5),
        ("    IMAD R25, R20, 0x10, RZ", "    IMAD R25, R20, 0x10, RZ\n    MOV R25, R20", "other", 0.5),
        ("decoded:", "decoded:\n    MOV R25, R20", "other", 1),
        ("decoded:", "decoded:\n    LOP3.LUT R9, R9, 0x7, RZ, 0xc0, !PT", "other", 1),
        ("copy:", "copy:\n    IMAD.WIDE R2, R3, 0x2, R4", "other", 4),
        ("element:", "element:\n    IMAD.WIDE R2, R3, 0x2, R4", "other", 0),
        ("element_way:", "element_way:\n    IMAD.WIDE R2, R3, 0x2, R4", "other", 0),
        ("low:", "low:\n    HMMA.16816.F32.BF16 R8, R4, R6, R8", "hmma", 0),
    ],
)
def test_what_is_added_shows(before, after, key, more):
    assert before in LISTING
    new, old = step(LISTING.replace(before, after, 1)), step(LISTING)
    assert new.counts == {**old.counts, key: old.counts[key] + more}
    assert new.slots_per_weight == old.slots_per_weight + (more * 2 / 8 if key == "decode" else 0)


@pytest.mark.parametrize(
    ("after", "more", "more_on_120"),
    [
        ("    NOP\n    HMMA.16816.F32.BF16 R12", 1, 0),
        ("    NOP\n    NOP\n    HMMA.16816.F32.BF16 R12", 2, 2),
        ("    NOP\n    MOV R1, R2\n    HMMA.16816.F32.BF16 R12", 2, 2),
    ],
)
def test_what_pads_products_counts_nothing(after, more, more_on_120):
    before = "    HMMA.16816.F32.BF16 R12"
    assert LISTING.count(before) == 1
    padded = assembled(LISTING.replace(before, after))
    old = step(LISTING).counts["other"]
    assert loops.step_of(padded, KIND, [128]).counts["other"] == old + more
    padded = replace(padded, architecture="sm_120")
    assert loops.step_of(padded, KIND, [128]).counts["other"] == old + more_on_120


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Without the jump back, without decoding, and with all HMMA before or after the loop.
        ("@P2 BRA step", "MOV R1, R2"),
        ("PRMTS", "MOV R26, R20"),
        ("    @P2 BRA step", ""),
        (LISTING[LISTING.index("decoded:") : LISTING.index("    @P2")], "decoded:\n"),
    ],
)
def test_without_a_main_loop_there_is_none(before, after):
    assert before in LISTING
    assert step(LISTING.replace(before, after)) is None


def test_the_innermost_loop_is_taken():
    around = LISTING.replace("    EXIT", "    MOV R1, R2\n    @P3 BRA low\n    EXIT")
    assert step(around).counts == step(LISTING).counts


# ---------------------------------------------------------------------------------------------- parts and pipes


def test_a_step_is_cut_by_its_barrier_and_its_products():
    parts = step(LISTING).parts
    # The barrier and its jump, four copies of five; the jump around decoding and LDSM; the last jump.
    assert vars(parts["alone"]) == {"issue": 2 + 4 * 6 + 2 + 1, "alu": 4, "fma": 0}
    # Two products, and nothing between them.
    assert vars(parts["beside"]) == {"issue": 2, "alu": 0, "fma": 0}
    # Half of what the team does: 8 PRMT, LOP3, half of IMAD.SHL and of IMAD; LDS, STS, a jump and LDG go elsewhere.
    assert vars(parts["decode"]) == {"issue": 0.5 * 15, "alu": 0.5 * 10, "fma": 0.5 * 1}
    counted = step(LISTING)
    assert sum(part.issue for part in parts.values()) == counted.total
    assert counted.decode_beside == 0


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        # Between the products; before them; in the team's part; after the loop.
        ("    HMMA.16816.F32.BF16 R12", "    SHF.R.U32 R1, R2\n    HMMA.16816.F32.BF16 R12", ("beside", 1, 1, 0)),
        ("    HMMA.16816.F32.BF16 R12", "    FFMA R1, R2\n    HMMA.16816.F32.BF16 R12", ("beside", 1, 0, 1)),
        ("    HMMA.16816.F32.BF16 R12", "    LDSM.16.M88.4 R1, [R2]\n    HMMA.16816.F32.BF16 R12", ("beside", 1, 0, 0)),
        ("decoded:", "decoded:\n    ISETP.GE.AND P1, R2", ("alone", 1, 1, 0)),
        ("decoded:", "decoded:\n    IMAD.MOV.U32 R1, R2", ("alone", 1, 0.5, 0.5)),
        ("decoded:", "decoded:\n    UIADD3 UR1, UR2", ("alone", 1, 0, 0)),
        ("    @P2 BRA step", "    IADD3 R1, R2\n    @P2 BRA step", ("alone", 1, 1, 0)),
        ("    STS.128 [R9], R24", "    STS.128 [R9], R24\n    PRMT R1, R2", ("decode", 0.5, 0.5, 0)),
        ("    EXIT", "    IADD3 R1, R2\n    EXIT", ("alone", 0, 0, 0)),
    ],
)
def test_what_is_added_goes_to_its_part_and_pipe(before, after, change):
    assert LISTING.count(before) == 1
    part, issue, alu, fma = change
    old, new = step(LISTING).parts, step(LISTING.replace(before, after)).parts
    more = {"issue": issue, "alu": alu, "fma": fma}
    for name in loops.PARTS:
        expected = {key: count + (more[key] if name == part else 0) for key, count in vars(old[name]).items()}
        assert vars(new[name]) == expected, name


ALL_DECODE = """
step:
    IADD3 R1, R1, R2
    HMMA.16816.F32.BF16 R8, R4, R6, R8
    HMMA.16816.F32.BF16 R12, R4, R6, R12
    BAR.SYNC 0x0
    PRMTS
    MOV R1, R2
    @P2 BRA step
    EXIT
"""


def test_the_stretch_after_a_barrier_goes_on_at_the_loops_beginning():
    kind = loops.Kind(decode=("PRMT",), weights=8)
    apart = loops.step_of(assembled(ALL_DECODE), kind, [])
    assert apart.decode_beside == 0
    assert [apart.parts[name].issue for name in loops.PARTS] == [4, 2, 8]
    # A second barrier before the products changes nothing: both stretches hold them, or none.
    again = loops.step_of(assembled(ALL_DECODE.replace("    IADD3", "    BAR.SYNC 0x0\n    IADD3")), kind, [])
    assert [again.parts[name].issue for name in loops.PARTS] == [5, 2, 8]


def test_decoding_between_products_shows():
    kind = loops.Kind(decode=("PRMT",), weights=8)
    mixed = ALL_DECODE.replace("    PRMTS\n", "").replace(
        "    HMMA.16816.F32.BF16 R12", "    PRMTS\n    HMMA.16816.F32.BF16 R12"
    )
    mixed = mixed.replace("    BAR.SYNC 0x0", "    BAR.SYNC 0x0\n    PRMT R26, R20, 0x9d8c, R24")
    assert loops.step_of(assembled(mixed), kind, []).decode_beside == 8 / 9


def test_without_a_barrier_nothing_is_alone():
    kind = loops.Kind(decode=("PRMT",), weights=8)
    free = loops.step_of(assembled(ALL_DECODE.replace("    BAR.SYNC 0x0\n", "")), kind, [])
    assert free.decode_beside == 1
    assert [free.parts[name].issue for name in loops.PARTS] == [0, 5, 8]


def test_constants_are_found_whose_address_is_a_lanes_own():
    code = assembled(
        """
    LDC R1, c[0x0][0x28]
    LDC.64 R2, c[0x0][UR4+0x10]
    LDC R3, c[0x3][R5]
    LDC.64 R4, c[0x0][R5+0x210]
    LDG.E R6, [R5]
    EXIT
"""
    )
    assert [one.address for one in code.indexed_constants] == [0x20, 0x30]
