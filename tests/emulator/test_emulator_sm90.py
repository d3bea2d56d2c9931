"""The emulator on the features of sm_90: mbarriers, bulk copies, clusters, warpgroup products.

Kernels that are right, the same with one of their parts missing, and small ones with one fault each.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import counters, emulated, module
from engines import ORDERS

LANDINGS = ("earliest", "latest", "random")
STEPS = 5


def product_operands() -> tuple[list[int], list[int]]:
    """bf16 [2, 64, 64 * STEPS] and the bits of what the product gives."""
    elements = torch.from_numpy(np.random.default_rng(0).integers(-8, 9, (2, 64, 64 * STEPS))).to(torch.bfloat16)
    product = elements[0].float() @ elements[1].float().T
    return words(elements.view(torch.int32)), words(product.view(torch.int32))


def words(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).numpy().view(np.uint32).tolist()


def cluster_operands() -> tuple[list[int], list[int]]:
    given = np.arange(1, 513, dtype=np.uint32)
    sums = np.zeros(64, np.uint32)
    for block in given.reshape(2, 64, 4):
        sums = sums * np.uint32(31) + block @ np.array([1, 3, 5, 7], np.uint32)
    return given.tolist(), [*(sums + 1).tolist(), *sums.tolist()]


OPERANDS = {"product": product_operands(), "cluster": cluster_operands()}


def run(name, **options):
    given = OPERANDS.get(name.split()[0], ([7] * 4096, None))[0]
    with emulated(**options):
        return module().run_sm90_sample(name, given)


def every_way():
    for order in ORDERS:
        for landing in LANDINGS:
            for seed in range(3) if "random" in (order, landing) else (0,):
                yield {"order": order, "landing": landing, "seed": seed}


@pytest.mark.parametrize("name", OPERANDS)
def test_right_kernels_are_right_every_way(name):
    for options in every_way():
        assert run(f"{name} kNone", **options) == OPERANDS[name][1], options


#: The error for a kernel that lacks a part, in any order.
MISSING = {
    "product kInitFence": "no fence has made visible to the asynchronous proxy",
    "product kInitBarrier": "a race|has not initialised",
    "product kFull": "a race: an asynchronous operation (reads|writes)|no thread has waited|arrivals at an mbarrier",
    "product kEmpty": "a race: an asynchronous operation (reads|writes)|no thread has waited|arrivals at an mbarrier",
    "product kFewerBytes": "it expected too few bytes|expects -8192 bytes more|a race|deadlock",
    "product kFence": "no wgmma.fence",
    "product kCommit": "has ended, and has not waited|a race|deadlock",
    "product kWait": "a race: an asynchronous operation writes .* an asynchronous operation read",
    "product kLastWait": "has ended, and has not waited for a product of wgmma",
    "product kRelease": r"deadlock: .* in an mbarrier at sm90_kernels",
    "product kStoreFence": "no fence.proxy.async",
    "product kStoreBarrier": "a race: an asynchronous operation reads|a race: it writes",
    "product kStoreWait": "has not waited for a bulk copy out of shared memory",
    "cluster kFirstBarrier": "has not initialised|a race|no fence has made visible",
    "cluster kFull": "a race: it reads .* an asynchronous operation wrote|a race: an asynchronous|has ended",
    "cluster kArrive": "deadlock",
    "cluster kReady": "a race: it (reads|writes)",
    "cluster kLastBarrier": "has ended|before the end of that block",
}


def test_every_part_is_missing_once():
    assert {name for name in module().sm90_samples() if name.split()[0] in OPERANDS} == {
        *MISSING,
        "product kNone",
        "cluster kNone",
    }


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_part_is_an_error_every_way(name):
    for options in every_way():
        with pytest.raises(module().EmulatorError, match=MISSING[name]):
            run(name, **options)


#: Waits whose absence shows in what the kernel computes, for some order, even if races are not looked for.
SEEN_IN_RESULTS = ("kFull", "kEmpty", "kWait", "kStoreBarrier")


@pytest.mark.parametrize("wait", SEEN_IN_RESULTS)
def test_a_missing_wait_gives_wrong_results(wait):
    def is_seen(options):
        try:
            return run(f"product {wait}", find_races=False, **options) != OPERANDS["product"][1]
        except module().EmulatorError:
            return True

    assert any(is_seen(options) for options in every_way())


FAULTS = {
    "arrivals beyond": "1 arrivals at an mbarrier that waits for 0 more|no thread has waited",
    "nobody waits": "although no thread has waited for the previous phase",
    "not made": "on memory that mbarrier.init has not initialised",
    "made twice": "an mbarrier that exists already",
    "plain access": "a plain access to an mbarrier object",
    "never arrives": r"deadlock: .* 128 threads in an mbarrier at samples_sm90",
    "copy of 20": "a bulk copy of 20 bytes",
    "copy misaligned": "not a multiple of 16",
    "copy beyond": "a bulk copy of 32 bytes at offset",
    "copy left": "has ended, and a copy into its shared memory is under way",
    "copy twice": "a race: an asynchronous operation writes .* an asynchronous operation wrote",
    "barrier for a wait": "a race: it reads .* an asynchronous operation wrote",
    "one gives back early": "a race: it (reads|writes)",
    "sums too early": "sums of wgmma were written before",
    "fragment too early": "registers of wgmma's A have changed",
    "operand too early": "a race: it writes .* an asynchronous operation read",
    "three warps": "deadlock: .* in wgmma.wait_group, for the other warps",
    "half a warpgroup": "of a warpgroup that lacks warps",
    "other operand": "another warp of the warpgroup has asked for a different product",
    "beyond shared memory": "wgmma reads shared memory at offset",
    "copy over a copy": "a race: an asynchronous operation writes .* an asynchronous operation wrote",
    "fence after arriving": "no fence.proxy.async of that thread comes between",
    "fence after a named barrier": "no fence.proxy.async of that thread comes between",
    "half a fence": "no fence.proxy.async of that thread comes between",
    "who knows has ended": "a race: it reads .* an asynchronous operation wrote",
    "made for others": "has not initialised|a race: it writes .* of the block wrote",
    "warp without its group": "setmaxnreg of a warpgroup that lacks warps",
    "warp of its group": "setmaxnreg, and not all warps of the warpgroup",
    "other may have ended": "uses shared memory of block 1 of the cluster, and nothing orders|has ended",
    "arrives at one that may have ended": "uses shared memory of block 1 of the cluster, and nothing orders|has ended",
    "told only copies": "a race: it writes",
}
#: Seen only where copies and products are late: otherwise they have ended before it matters.
LATE = {"copy left", "sums too early", "fragment too early"}


def test_every_fault_is_tried():
    assert {n for n in module().sm90_samples() if n.split()[0] not in OPERANDS} == {*FAULTS, "nothing committed"}


def test_a_group_with_nothing_in_it_need_not_be_waited_for():
    assert run("nothing committed") == [1] * 16


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("order", ORDERS)
def test_faults_are_errors(name, order):
    for landing in ("latest",) if name in LATE else ("earliest", "latest"):
        with pytest.raises(module().EmulatorError, match=FAULTS[name]):
            run(name, order=order, landing=landing)
    assert run("product kNone", order=order) == OPERANDS["product"][1]


def test_what_is_counted():
    with emulated():
        module().reset_counters()
        module().run_sm90_sample("product kNone", OPERANDS["product"][0])
        counts = counters()
    # Each of the four warps reads its rows of a, the first all of b: 2 KiB each, in four products a step.
    (place, products), *rest = [(p, t) for p, t in counts["shared"].items() if t["requests"] == 20 * STEPS]
    assert not rest
    assert "sm90_kernels.cuh" in place
    assert products["bytes"] == 4 * 4096 * STEPS
    assert products["actual"] == products["minimum"] == 128 * STEPS
    loads = [t for place, t in counts["global"].items() if place.endswith("load")]
    assert sum(t["bytes"] for t in loads) == 2 * 64 * 64 * 2 * STEPS
    assert all(t["actual"] == t["minimum"] for t in loads)
    assert counts["instructions"]["wgmma"] == 128 * 4 * STEPS
