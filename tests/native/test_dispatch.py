"""The dispatch tables, and what they print."""

from __future__ import annotations

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
