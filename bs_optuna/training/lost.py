"""What running out of memory has cost: attempts that were undone, and their time."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Lost:
    """A count of attempts that ran out of memory.

    Attributes:
        attempts: How many there were.
        seconds: What they took, undoing them included.
    """

    attempts: int = 0
    seconds: float = 0.0

    def add(self, began: float) -> None:
        """Counts one more that ends now.

        Args:
            began: What ``time.perf_counter()`` gave at its beginning.
        """
        self.attempts += 1
        self.seconds += time.perf_counter() - began

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.attempts + other.attempts, self.seconds + other.seconds)
