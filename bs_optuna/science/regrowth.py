"""How large a microbatch may be from step to step: halved by a failure, tried larger after calm.

W: steps without failure before the first try, `regrow_after`; n: steps; B: samples in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from typing import Self
from typing import TypeVar


class Plan(Protocol):
    """A cut of a batch into microbatches of at most ``microbatch_limit``."""

    @property
    def accumulation_steps(self) -> int:
        """Number of microbatches."""

    @property
    def microbatch_limit(self) -> int:
        """The most that one microbatch may hold, in samples or elements."""

    @property
    def largest(self) -> int:
        """The most that one holds, in the unit of the limit."""

    def halved(self) -> Self:
        """The plan to go on with when this one did not fit."""


_P = TypeVar("_P", bound=Plan)

# What ran out of memory and half of it, to what shall be tried instead: at most that half.
Smaller = Callable[[int, int], int]


class MicrobatchLimit:
    """The most that a microbatch may hold, which shrinks at once and grows back with patience.

    After W steps without a failure twice the limit is tried, at most where it began. A try that
    fails costs that one attempt and doubles the wait, and so does a failure soon after a success.
    A failure after a whole wait of calm is taken for another passing spike: the wait is W again.

    So with memory that stays as it is there are at most log2(n / W + 1) failed tries in n steps,
    and with memory that does what it likes at most log2(B) + n / W failures in all.

    Args:
        most: Where it begins; None is the whole batch, whatever its size.
        regrow_after: W, at least 1; None never tries a larger one again.
        smaller: Asked after each failure whether to go on with even less; None halves.

    Raises:
        ValueError: W is below 1.
    """

    def __init__(
        self, most: int | None, *, regrow_after: int | None, smaller: Smaller | None = None
    ) -> None:
        if regrow_after is not None and regrow_after < 1:
            raise ValueError(f"regrow_after={regrow_after}; must be at least 1, or None for never.")
        self._most = most
        self._value = most
        self._regrow_after = regrow_after
        self._smaller = smaller
        self._wait = regrow_after or 0
        self._calm = 0
        self._tries = False

    @property
    def value(self) -> int | None:
        """What is thought to fit; None is the whole batch."""
        return self._value

    @property
    def tries(self) -> bool:
        """Whether the plan of this step is larger than what is thought to fit."""
        return self._tries

    def plan(self, cut: Callable[[int | None], _P]) -> _P:
        """The plan to begin a step with.

        Args:
            cut: The plan of this step's batch for a limit.
        """
        plan = cut(self._value)
        self._tries = False
        if (larger := self._larger()) is not None:
            wider = cut(larger)
            # A small batch may be cut alike by both, and would prove nothing.
            self._tries = wider.accumulation_steps < plan.accumulation_steps
            plan = wider if self._tries else plan
        return plan

    def failed(self, plan: _P, cut: Callable[[int | None], _P]) -> _P:
        """The plan to go on with when one of this step has run out of memory."""
        failed = plan.largest
        if self._tries:
            self.give_way()
            plan = cut(self._value)
        else:
            plan = plan.halved()
            self.shrink(plan.microbatch_limit)
        if (
            self._smaller is not None
            and (size := self._smaller(failed, plan.largest)) < plan.largest
        ):
            self.shrink(max(1, size))
            plan = cut(self._value)
        return plan

    def succeeded(self, plan: Plan) -> None:
        """Notes that a plan of this step has run."""
        self.hold(plan.microbatch_limit if self._tries else None)

    # The three below are what several ranks, each with a part of the batch, note alike.

    def give_way(self) -> None:
        """Notes that a larger limit was tried and has failed."""
        self._tries = False
        self._wait *= 2
        self._calm = 0

    def shrink(self, limit: int | None) -> None:
        """Notes that a step has failed and goes on with less."""
        self._value = limit
        if self._calm >= self._wait:
            self._wait = self._regrow_after or 0
        elif self._calm > 0:  # 0 is the same step's second failure
            self._wait *= 2
        self._calm = 0

    def hold(self, limit: int | None) -> None:
        """Notes that a step has run.

        Args:
            limit: The larger one that was tried; None where none was.
        """
        if limit is not None:
            self._value = limit
            self._calm = 0
        self._calm += 1

    def _larger(self) -> int | None:
        if self._regrow_after is None or self._value is None or self._calm < self._wait:
            return None
        return 2 * self._value if self._most is None else min(self._most, 2 * self._value)
