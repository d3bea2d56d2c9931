"""A card whose clock stands still, on the emulator."""

from __future__ import annotations

from qlora_kernels.bench.timing import cuda_timing


class FakeCard(cuda_timing.Card):
    """A card whose clock moves by what calls cost; a graph's calls cost half."""

    def __init__(self, l2_bytes: int = 50_000) -> None:
        self.l2_bytes, self.now, self.occupied, self.captured = l2_bytes, 0.0, 0, 0

    def event(self):
        return self.now

    def microseconds(self, begin, end):
        return end - begin

    def wait(self):
        pass

    def occupy(self, microseconds):
        self.now += microseconds
        self.occupied += 1

    def capture(self, function):
        before = self.now
        function()
        cost = (self.now - before) / 2
        self.captured += 1

        def replay():
            self.now += cost

        return replay


class SteadyCard(FakeCard):
    """One on which time passes evenly, by a microsecond for every event."""

    def event(self):
        self.now += 1.0
        return self.now
