"""What else a layer's products can be computed with, by the same rates: bitsandbytes, and a layer of separate steps.

Their times are what they must at least read, write and multiply: no tiles, no fill, no tail. So they are lower bounds,
and comparisons with them lean to the other side.
"""

from __future__ import annotations

from bench.compiled import model
from bench.compiled.cards import Card
from bench.compiled.terms import BETWEEN_US, MEMBAR_US

#: Bytes that a launch moves for each block of 64 weights.
_CONSTANTS = (1 + 4, 4 + 4)  # absmax from 8 bits to float32; adding the offset to it


def _copy_us(card: Card, moved: float) -> float:
    return moved / card.copy_rate * 1e6


def _flops_us(card: Card, flops: float) -> float:
    return flops / card.dense_rate * 1e6


def bitsandbytes_us(card: Card, m: int, n: int, k: int) -> float:
    """Three launches that dequantize (constants, their offset, weights), then a dense product; for one row its own
    product by packed weights after the first two."""
    blocks = n * k / 64
    constants = [_copy_us(card, blocks * each) for each in _CONSTANTS]
    if m == 1:
        steps = [*constants, _copy_us(card, n * k / 2 + blocks * 4 + 2 * (n + k))]
    else:
        weights = _copy_us(card, n * k / 2 + blocks * 4 + 2 * n * k)
        steps = [*constants, weights, model.dense_us(card, m, n, k)]
    return sum(steps) + (len(steps) - 1) * BETWEEN_US


def separate_us(card: Card, m: int, n: int, k: int, r: int) -> float:
    """Forward and backward of a layer with an adapter: one launch that dequantizes (each way), cuBLAS, and separate
    products for the adapter."""
    dequantized = _copy_us(card, n * k * (model.BITS_PER_WEIGHT / 8 + 2))
    dense = model.dense_us(card, m, n, k)

    def product(reads: float, adds_to: float = 0) -> float:
        """One of the adapter's: elements of 16 bits that it reads, and those that it adds to."""
        return _copy_us(card, 2 * (reads + 2 * adds_to + m * r + r * max(n, k)))

    forward = [dequantized, dense, product(m * k), product(0, adds_to=m * n)]
    # v and dB each read dy; dx is added to; dA reads x.
    backward = [dequantized, dense, product(m * n), product(m * n), product(0, adds_to=m * k), product(m * k)]
    return sum(forward) + sum(backward) + (len(forward) + len(backward) - 2) * BETWEEN_US


def way_us(card: Card, m: int, n: int, k: int, r: int, backward: bool) -> float:
    """One way of a layer with an adapter by this package: u, y; or v and dB, dx, dA. The adapter's own kernels by their
    bytes, and their fill and tail; the product has the ranks as more steps."""
    ends = 2 * card.latency / card.hertz * 1e6 + MEMBAR_US
    adapter = _copy_us(card, 2 * (m * k + r * k + m * r)) + ends
    if backward:
        # Parts of sums are at most 16 MiB, and stay in L2.
        adapter += _copy_us(card, 2 * (m * n + 2 * r * n + 2 * m * r)) + ends
    found = model.predict(card, m, n, k, backward)
    # In steps of 64, by each tile's first block (or last step).
    more = -(-r // 64) * found["step_clocks"] / card.hertz * 1e6
    product = found["us"] + more * -(-found["tiles"] // card.sms)
    return adapter + product + (2 if backward else 1) * BETWEEN_US


def ours_us(card: Card, m: int, n: int, k: int, r: int) -> float:
    """Forward and backward by this package."""
    return way_us(card, m, n, k, r, False) + way_us(card, m, n, k, r, True)
