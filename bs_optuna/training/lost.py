"""What running out of memory has cost: attempts that were undone, and their time."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bs_optuna.errors import ThrashingError
from bs_optuna.science.memory import most_attempts


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


def check_thrashing(lost: Lost, batch_size: int, seconds: float, oom_budget: float) -> None:
    """Lets a run go on unless it loses too much, beyond what any search for a size needs.

    Args:
        lost: What running out of memory has cost the run.
        batch_size: Samples per optimizer step.
        seconds: Time since the run began.
        oom_budget: Largest part of it that may be lost.

    Raises:
        ThrashingError: More was lost.
    """
    if lost.attempts > most_attempts(batch_size) and lost.seconds > oom_budget * seconds:
        raise ThrashingError(
            f"{lost.attempts} attempts that ran out of memory took {lost.seconds:.2g} of "
            f"{seconds:.2g} s, more than oom_budget={oom_budget:g}; "
            "give the training memory that does not come and go, or raise oom_budget."
        )
