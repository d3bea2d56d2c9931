"""The emulator itself: its results are right, it finds faults, and its counts are true."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from emulated import ROOT, VARIANT, counters, emulated, module
from engines import ORDERS

LANDINGS = ("earliest", "latest", "random")
SEEDS = range(4)


def run(name, data=None, output=64, threads=64, blocks=1, **options):
    with emulated(**options):
        data = list(range(100, 100 + max(threads, 64))) if data is None else data
        return module().run_sample(name, data, output, threads, blocks)


def every_way(landings=("latest",)):
    """All orders and landings, with several seeds where they are random."""
    for order in ORDERS:
        for landing in landings:
            for seed in SEEDS if "random" in (order, landing) else (0,):
                yield {"order": order, "landing": landing, "seed": seed}


def rounds_of(data, distance, warp=False):
    value = list(data)
    for _ in range(4):
        n = len(value)
        value = [
            1 + (value[i // 32 * 32 + (i + distance) % 32] if warp else value[(i + distance) % n]) for i in range(n)
        ]
    return value


def pipeline_of(data, threads):
    words = np.array(data, dtype=np.uint64).reshape(8, threads, 4)
    sums = np.zeros(threads, dtype=np.uint64)
    for step in range(8):
        sums = (sums * 31 + np.roll(words[step, :, 0], -1)) % 2**32
    return sums.tolist()


def consumer_of(data, half):
    words = np.array(data, dtype=np.uint64).reshape(4, half)
    sums = np.zeros(half, dtype=np.uint64)
    for step in range(4):
        sums = (sums * 31 + np.roll(words[step], -33)) % 2**32
    return sums.tolist()


DATA = list(range(100, 164))
LONG = list(range(1000, 1000 + 8 * 64 * 4))
FOUR_ROUNDS = list(range(500, 500 + 4 * 64))

RIGHT = {
    "reverse": (DATA, DATA[::-1]),
    "rounds": (DATA, rounds_of(DATA, 33)),
    "warp rounds": (DATA, rounds_of(DATA, 1, warp=True)),
    "pipeline": (LONG, pipeline_of(LONG, 64)),
    "producer and consumer": (FOUR_ROUNDS, consumer_of(FOUR_ROUNDS, 64)),
    "shared sum": (DATA, [sum(DATA)]),
    "warp sum": (DATA, [sum(DATA[:32]), sum(DATA[32:])]),
    "count odd": (DATA, [32] * 64),
    "early exit": (DATA, DATA[31::-1]),
    "stride 1": (DATA, list(range(64))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right_every_way(name):
    data, expected = RIGHT[name]
    threads = 128 if name == "producer and consumer" else 64
    for options in every_way(LANDINGS if name == "pipeline" else ("latest",)):
        result = run(name, data, len(expected), threads, **options)
        assert result == expected, options


#: A kernel with one barrier or wait removed, and the right one.
BROKEN = {
    "reverse without its barrier": "reverse",
    "rounds without the first barrier": "rounds",
    "rounds without the second barrier": "rounds",
    "warp rounds without the first barrier": "warp rounds",
    "warp rounds without the second barrier": "warp rounds",
    "pipeline that waits for too little": "pipeline",
    "pipeline that reuses a stage too early": "pipeline",
    "producer and consumer without full": "producer and consumer",
    "producer and consumer without empty": "producer and consumer",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_missing_barrier_or_wait_is_a_race_every_way(name):
    data, expected = RIGHT[BROKEN[name]]
    threads = 128 if name.startswith("producer") else 64
    for options in every_way(LANDINGS):
        with pytest.raises(module().EmulatorError, match=r"a race: it (reads|writes).*samples\.cpp:\d+|deadlock"):
            run(name, data, len(expected), threads, **options)


@pytest.mark.parametrize("name", BROKEN)
def test_a_missing_barrier_or_wait_gives_wrong_results(name):
    data, expected = RIGHT[BROKEN[name]]
    threads = 128 if name.startswith("producer") else 64

    def is_seen(options):
        try:
            return run(name, data, len(expected), threads, find_races=False, **options) != expected
        except module().EmulatorError:
            return True

    assert any(is_seen(options) for options in every_way(LANDINGS))


def test_late_copies_are_what_finds_a_missing_wait():
    data, expected = RIGHT["pipeline"]
    name = "pipeline that waits for too little"
    assert run(name, data, 64, find_races=False, landing="earliest") == expected
    assert run(name, data, 64, find_races=False, landing="latest") != expected


def test_shuffles_order_no_memory():
    for order in ORDERS:
        with pytest.raises(module().EmulatorError, match="a race: it reads"):
            run("shuffle instead of a barrier", order=order)
        assert run("shuffle instead of a barrier", order=order, find_races=False) == [
            *DATA[31::-1],
            *DATA[63:31:-1],
        ]


def test_bytes_of_one_word_are_no_race():
    for order in ORDERS:
        assert run("bytes of a word", list(range(64)), 16, order=order) == [
            0x03020100 + 0x04040404 * i for i in range(16)
        ]


@pytest.mark.parametrize("early", [True, False])
def test_a_launch_that_begins_early_sees_what_the_one_before_has_made(early):
    data = list(range(1, 129))
    for options in every_way():
        module().reset_counters()
        result = run("early", data, 128, blocks=2, early_launches=early, **options)
        assert result == [data[i] + 3 * data[(i + 1) % 128] for i in range(128)]
        assert (counters()["launches"], counters()["early"]) == (2, int(early))


FAULTS = {
    "early with another carve-out": "another carve-out of shared memory than the one before it: 100 and -1 percent",
    "early behind one that does not let it": "has ended without griddepcontrol.launch_dependents",
    "early without a wait": "reads what the launch before writes|writes to global memory before griddepcontrol.wait",
    "early of which a thread ends": r"thread \(3, 0, 0\) of block .* has ended without griddepcontrol.wait",
    "early that reads before its wait": "writes what the next launch has read at samples|reads what the launch before",
    "early that writes before its wait": "writes to global memory before griddepcontrol.wait",
    "early of which one thread waits": "reads what the launch before writes, before",
    "shared access out of range": r"samples\.cpp:\d+: thread \(\d+, 0, 0\).* shared access of 4 bytes at offset 65536",
    "misaligned access": "a misaligned access of",
    "barrier in a branch": r"deadlock: block \(0, 0, 0\); 64 threads in a barrier at samples.*; 64 threads in a",
    "lane that left": "has ended",
    "different operations": "while other lanes of its mask are in",
    "mask without self": "mask that the thread itself is not in",
    "barrier of 33": "not a multiple of 32",
    "copy of a byte too many": "more source bytes",
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("order", ORDERS)
def test_faults_are_errors_with_their_place(name, order):
    with pytest.raises(module().EmulatorError, match=FAULTS[name]):
        run(name, threads=128, output=128, order=order)
    # And the emulator still works.
    assert run("reverse", DATA, order=order) == DATA[::-1]


@pytest.mark.skipif(VARIANT != "sanitized", reason="needs the emulator under AddressSanitizer")
def test_reading_beyond_a_buffer_is_found():
    code = "from bench.emulator import module; module().run_sample('read beyond the input', list(range(64)), 64)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_an_exception_in_a_kernel_comes_out():
    for order in ORDERS:
        with pytest.raises(RuntimeError, match="from thread 3"):
            run("throws", order=order)
    assert run("reverse", DATA) == DATA[::-1]


def test_memory_starts_poisoned():
    assert run("unset shared memory") == [0xFFFFFFFF] * 64
    assert run("reverse", DATA, 66) == [*DATA[::-1], 0xFFFFFFFF, 0xFFFFFFFF]


def test_blocks_that_wait_for_each_other_need_to_be_resident():
    with pytest.raises(module().EmulatorError, match=r"deadlock.*1 blocks have not started"):
        run("wait for a block", blocks=2, output=2)
    for order in ORDERS:
        assert run("wait for a block", blocks=2, output=2, order=order, resident_blocks=2) == [42, 1]


@pytest.mark.parametrize("resident_blocks", [1, 3])
def test_what_blocks_tell_each_other_needs_fences(resident_blocks):
    blocks, threads = 3, 64
    size = 2 + blocks * threads
    for order in ORDERS:
        options = {"blocks": blocks, "threads": threads, "output": size, "order": order}
        result = run("last block adds", resident_blocks=resident_blocks, seed=5, **options)
        assert result[:2] == [blocks - 1, blocks * sum(DATA) - 1]
        for missing, words in (("publishing", "no fence has published"), ("taking up", "not taken it up")):
            with pytest.raises(module().EmulatorError, match=rf"reads what thread .* stored at .*{words}"):
                run(f"last block adds without {missing}", resident_blocks=resident_blocks, seed=5, **options)
    with pytest.raises(module().EmulatorError, match="no fence has published"):
        run("last block adds without a barrier", resident_blocks=resident_blocks, **{**options, "order": "forward"})


@pytest.mark.parametrize(
    ("threads", "blocks", "words"), [(0, 1, "block of 0"), (1025, 1, "block of 1025"), (32, 0, "grid of 0")]
)
def test_launches_that_a_card_refuses(threads, blocks, words):
    with pytest.raises(module().EmulatorError, match=words):
        run("reverse", threads=threads, blocks=blocks)
    with pytest.raises(module().EmulatorError, match="16384 bytes of shared memory"):
        run("reverse", max_shared_bytes=1000)


def traffic(name, threads=32, **options):
    with emulated(**options):
        module().reset_counters()
        module().run_sample(name, list(range(4 * threads)), 40 * threads, threads, 1)
        counts = counters()
    shared, memory = counts["shared"], counts["global"]
    return tuple(next(t for place, t in space.items() if place.endswith("store")) for space in (shared, memory))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "passes", "sectors"), [("stride 1", 1, 4), ("stride 2", 2, 8), ("stride 32", 32, 32), ("stride 33", 1, 33)]
)
def test_bank_conflicts_and_sectors(name, passes, sectors, order):
    shared, memory = traffic(name, order=order)
    assert shared == {"requests": 1, "bytes": 128, "actual": passes, "minimum": 1}
    assert memory["requests"] == 1
    # Rows of 33 words begin in 32 sectors, or one more, by where the memory begins: 16 bytes is all it promises.
    assert sectors - 1 <= memory["actual"] <= sectors + 1
    assert memory["minimum"] == 4


def test_wide_accesses_go_in_quarters():
    shared, memory = traffic("wide")
    assert shared == {"requests": 1, "bytes": 512, "actual": 4, "minimum": 4}
    assert memory["bytes"] == 512
    assert memory["minimum"] == 16


def test_counters_start_again():
    run("reverse")
    module().reset_counters()
    assert json.loads(module().counters()) == {
        "launches": 0,
        "early": 0,
        "blocks": 0,
        "instructions": {},
        "shared": {},
        "global": {},
    }


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_block_has_read_is_overwritten_only_after_fences(order):
    options = {"output": 2 + 3 * 64, "blocks": 3, "order": order}
    result = run("last block overwrites", **options)
    assert result[2:] == DATA * 3
    with pytest.raises(RuntimeError, match="has read, which no fence has published"):
        run("last block overwrites without publishing", **options)
    with pytest.raises(RuntimeError, match="has read, and has not taken that up with a fence"):
        run("last block overwrites without taking up", **options)
