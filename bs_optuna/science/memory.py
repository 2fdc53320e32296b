"""What is known about the microbatch sizes that fit into memory.

Whether a microbatch fits is monotone in its size, so two numbers hold all that was seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class MicrobatchBounds:
    """The largest microbatch size known to fit and the smallest known not to.

    Attributes:
        fits: Largest size that ran a full step; 0 if none did.
        fails: Smallest size that ran out of memory; None if none did.
    """

    fits: int = 0
    fails: int | None = None

    @property
    def hopeless(self) -> bool:
        """Whether a single sample is known not to fit."""
        return self.fails == 1

    def start(self, batch_size: int) -> int:
        """The microbatch size to begin with: the largest that nothing speaks against.

        The whole batch as long as nothing failed. Otherwise half of what failed, as back-off would
        have it, or what is known to fit if that is more; so every further failure halves ``fails``,
        and a study sees at most log2 of the largest size of them.
        """
        if self.fails is None:
            return batch_size
        return max(1, min(batch_size, max(self.fits, self.fails // 2)))

    @classmethod
    def merged(cls, bounds: Iterable[MicrobatchBounds]) -> MicrobatchBounds:
        """What several runs know together; a failure outweighs an earlier success at that size."""
        fits, fails = 0, None
        for bound in bounds:
            fits = max(fits, bound.fits)
            if bound.fails is not None:
                fails = bound.fails if fails is None else min(fails, bound.fails)
        if fails is not None:
            fits = min(fits, fails - 1)
        return cls(fits, fails)
