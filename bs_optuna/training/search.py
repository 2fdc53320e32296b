"""What a run and the search for its microbatch size know of each other."""

from __future__ import annotations

from typing import Protocol


class Seen(Protocol):
    """What a run has seen of memory so far; see `TrainingRun`."""

    fits: int
    ran: int
    failed_sizes: list[int]
    evaluation_fits: int | None


class Search(Protocol):
    """A search that several runs may share, in several processes; see `SizeSearch`."""

    def smaller(self, failed: int, size: int) -> int:
        """The next size, at most the given one; asked while the first step runs out of memory."""

    def learned(self, run: Seen) -> None:
        """Called after each step whose microbatch was larger than before, or had to be smaller."""
