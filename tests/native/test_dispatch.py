"""The dispatch tables, and what they print."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.native import dispatch


def test_ptx_of_an_older_card_gets_kernels_that_have_code_there():
    from dataclasses import replace

    h200 = dispatch.CARDS[90]
    for architecture in (75, 86, 89):
        old = replace(h200, architecture=architecture)
        native = replace(h200, architecture=architecture, shared_bytes=dispatch.CARDS[architecture].shared_bytes)
        for m in (1, 10, 40, 100, 5000):
            chosen = [dispatch.choose(card, m, 4096, 4096, torch.float16, False) for card in (old, native)]
            assert chosen[0] == chosen[1]


def test_every_range_of_the_dispatch_is_what_runs():
    for card in dispatch.CARDS.values():
        for backward in (False, True):
            for dtype in dispatch.DTYPES.values():
                end = 0
                for first, last, plan in dispatch.ranges(card, 1024, 2048, dtype, backward):
                    assert first == end + 1
                    chosen = dispatch.choose(card, first, 1024, 2048, dtype, backward)
                    assert chosen["kernel"] == plan["kernel"]
                    if chosen["tiles"] <= card.multiprocessors or plan["shared_tiles"] > 1:
                        assert all(chosen[key] == plan[key] for key in ("splits", "shared_tiles"))
                    assert 0 <= plan["scratch"] <= 2**24
                    assert (chosen["splits"] > 1 and not chosen["cluster"]) == (chosen["scratch"] > 0)
                    end = last
                assert end is None
                for m in (30000, 10**6):
                    assert dispatch.choose(card, m, 1024, 2048, dtype, backward)["kernel"] == plan["kernel"]


#: Architecture, M, N, K, and of the plan: blocks that share tiles, whether as a cluster, how many tiles they share, and
#: how many come first with a block each.
SHARED = {
    "32 tiles: clusters of four are all on the card at once": (90, 64, 4096, 4096, 4, True, 1, 0),
    "64 tiles of 32 rows without clusters, on 108 multiprocessors": (80, 64, 4096, 4096, 108, False, 64, 0),
    "8 tiles: a cluster has at most eight blocks": (90, 16, 1024, 8192, 8, True, 1, 0),
    "80 tiles: cut anywhere, sooner done than two rounds of clusters": (90, 64, 10240, 14336, 132, False, 80, 0),
    "112 tiles of 16 steps: what a cut costs is more than the steps that it saves": (
        90,
        16,
        14336,
        4096,
        1,
        False,
        1,
        0,
    ),
    "112 tiles on 108 multiprocessors: two rounds, or one and a bit": (80, 16, 14336, 4096, 108, False, 112, 0),
    "224 tiles of 32 steps: 132, then 92 cut anywhere": (90, 256, 14336, 8192, 132, False, 92, 132),
    "448 tiles: 396, then 52 by two blocks each": (90, 512, 14336, 4096, 2, False, 1, 396),
    "sm_120 has no clusters here": (120, 16, 2048, 4096, 8, False, 1, 0),
}


@pytest.mark.parametrize("case", SHARED)
def test_how_tiles_are_shared(case):
    architecture, m, n, k, *expected = SHARED[case]
    plan = dispatch.choose(dispatch.CARDS[architecture], m, n, k, torch.bfloat16, False)
    assert [plan[key] for key in ("splits", "cluster", "shared_tiles", "whole_tiles")] == expected
    if plan["cluster"]:
        assert plan["scratch"] == 0


def test_clusters_can_be_forbidden(monkeypatch):
    card = dispatch.CARDS[90]
    assert dispatch.choose(card, 64, 4096, 4096, torch.bfloat16, False)["cluster"]
    monkeypatch.setenv("QLORA_KERNELS_CUDA_CLUSTERS", "0")
    plan = dispatch.choose(card, 64, 4096, 4096, torch.bfloat16, False)
    assert not plan["cluster"]
    assert plan["splits"] > 1
    assert plan["scratch"] > 0


def test_tiles_of_one_step_are_not_cut_as_one():
    # Their kernel has no barrier between two such tiles of a thread block.
    for n in (2048, 20480, 204800):
        assert dispatch.choose(dispatch.CARDS[90], 16, n, 512, torch.bfloat16, False)["shared_tiles"] == 1
