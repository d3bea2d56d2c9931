"""Rates of cards, each with where it is from."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What has been reached on an H200, of its data sheet: copying 4.3 of 4.8 TB/s, and 790 of 989.4 TFLOP/s in a large
#: dense bf16 product of random data. Other cards are taken to reach the same shares.
COPY_SHARE = 4.3 / 4.8
DENSE_SHARE = 790 / 989.4
#: mma.sync's share of the rate in the data sheet on Hopper, whose full rate takes wgmma: the average of its shapes on
#: an H800 (arXiv 2501.12084, as others quote it: 62.9%, and 65.3% for 16 x 8 x 16). One tool that multiplies zeros
#: shows nearly all of it on an H100, so a card has to say; tensor_rate.py asks it.
HOPPER_MMA_SYNC = 0.629
#: wgmma's share where its left operand comes from registers and each block's sums are scaled by themselves: what
#: DeepGEMM's FP8 products, built in the same way, are published to reach (1,350 of 1,979 TFLOP/s on an H800). cuBLAS
#: reaches more.
HOPPER_WGMMA = 0.68
SCHEDULERS = 4


@dataclass(frozen=True)
class Card:
    """What is needed of a card; rates by its data sheet.

    Attributes:
        arch: its architecture.
        code: whose code in the static table stands for it, where the table lacks its own.
        clock: GHz, the one that the tensor rate is stated for.
        memory: TB/s.
        tensor: dense bf16 TFLOP/s with float32 sums.
        mma_sync: the share of that rate that mma.sync has, where power lets it.
        fma: float32 lanes of an SM.
        l2_bytes: a clock, of all SMs together.
        latency: clocks of a load that no cache has.
        shared: bytes of an SM, and the most of one thread block.
    """

    name: str
    arch: str
    code: str
    sms: int
    clock: float
    memory: float
    tensor: float
    mma_sync: float
    fma: int
    l2_bytes: float
    latency: float
    shared: tuple[int, int]

    @property
    def architecture(self) -> int:
        """90 for sm_90a."""
        digits = re.search(r"\d+", self.arch)
        assert digits is not None, self.arch
        return int(digits[0])

    @property
    def hertz(self) -> float:
        return self.clock * 1e9

    @property
    def copy_rate(self) -> float:
        """Bytes a second."""
        return self.memory * COPY_SHARE * 1e12

    @property
    def dense_rate(self) -> float:
        """FLOP a second of a dense product."""
        return self.tensor * DENSE_SHARE * 1e12

    @property
    def mma_rate(self) -> float:
        """FLOP a second of mma.sync. What keeps a dense product below the data sheet is power; it takes more of that
        than a slower instruction does."""
        return min(self.mma_sync * self.tensor * 1e12, self.dense_rate)

    @property
    def wgmma_rate(self) -> float:
        """FLOP a second of wgmma with a scaled sum for each block of weights."""
        return HOPPER_WGMMA * self.tensor * 1e12


_KIB = 1024
_BIG, _SMALL = (228 * _KIB, 227 * _KIB), (100 * _KIB, 99 * _KIB)
# SMs, clocks, memory and tensor rates, float32 lanes: NVIDIA's data sheets and architecture white papers of A100, H100,
# GA102, Ada and the RTX version of Blackwell.
# Shared memory: CUDA C++ Programming Guide, technical specifications by compute capability.
# L2: 5120 bytes a clock in A100's white paper, and no other figure for Hopper; the others are taken to have as many.
# Latency: measured in arXiv 2402.13499 (A100, H800, RTX 4090); RTX 3090 and 5090 are taken to be like the RTX 4090.
CARDS = {
    "h200": Card("H200", "sm_90a", "sm_90a", 132, 1.83, 4.8, 989.4, HOPPER_MMA_SYNC, 128, 5120, 479, _BIG),
    "h100": Card("H100 SXM", "sm_90a", "sm_90a", 132, 1.83, 3.35, 989.4, HOPPER_MMA_SYNC, 128, 5120, 479, _BIG),
    "a100": Card(
        *("A100 80 GB", "sm_80", "sm_80", 108, 1.41, 2.039, 312.0, 1.0, 64, 5120, 466, (164 * _KIB, 163 * _KIB))
    ),
    "3090": Card("RTX 3090", "sm_86", "sm_80", 82, 1.695, 0.936, 71.0, 1.0, 128, 5120, 542, _SMALL),
    "4090": Card("RTX 4090", "sm_89", "sm_80", 128, 2.52, 1.008, 165.2, 1.0, 128, 5120, 542, _SMALL),
    "5090": Card("RTX 5090", "sm_120", "sm_80", 170, 2.407, 1.792, 209.5, 1.0, 128, 5120, 542, _SMALL),
}
