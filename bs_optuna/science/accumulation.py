"""How one batch is cut into microbatches: sizes and weights.

B: samples per optimizer step (batch_size); b_j: samples in microbatch j; sum(b_j) = B.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class AccumulationPlan:
    """The cut of a batch into the fewest microbatches of at most a given size, as equal as can be.

    100 samples with at most 32 in a microbatch are four of 25, not three of 32 and one of 4: peak
    memory is lower and no microbatch is so small that its normalization statistics are poor.

    Attributes:
        batch_size: Samples per optimizer step, at least 1.
        microbatch_limit: Most samples that one microbatch may hold, at least 1.
    """

    batch_size: int
    microbatch_limit: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; must be at least 1.")
        if self.microbatch_limit < 1:
            raise ValueError(f"microbatch_limit={self.microbatch_limit}; must be at least 1.")

    @classmethod
    def within(cls, batch_size: int, limit: int | None) -> AccumulationPlan:
        """The cut by a limit that may be larger than the batch; None is the whole batch."""
        return cls(batch_size, batch_size if limit is None else min(limit, batch_size))

    @cached_property
    def accumulation_steps(self) -> int:
        """Number of microbatches, ceil(B / limit)."""
        return -(-self.batch_size // self.microbatch_limit)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples in each microbatch, larger ones first; they differ by at most one."""
        small, larger = divmod(self.batch_size, self.accumulation_steps)
        return (small + 1,) * larger + (small,) * (self.accumulation_steps - larger)

    @property
    def slices(self) -> Iterator[slice]:
        """Where each microbatch lies in the batch."""
        ends = itertools.accumulate(self.sizes, initial=0)
        return (slice(start, end) for start, end in itertools.pairwise(ends))

    @property
    def microbatch_size(self) -> int:
        """Samples in the largest microbatch."""
        return self.sizes[0]

    def halved(self) -> AccumulationPlan:
        """The plan to go on with when the largest microbatch of this one did not fit.

        Raises:
            ValueError: The microbatch is a single sample already.
        """
        if self.microbatch_size == 1:
            raise ValueError("microbatch_size=1 cannot be halved.")
        return AccumulationPlan(self.batch_size, self.microbatch_size // 2)


def weights(counts: Sequence[float]) -> tuple[float, ...]:
    """The weight of each microbatch's mean loss in the mean loss of the batch.

    Args:
        counts: What each microbatch's mean is taken over: its samples or its target tokens.

    Returns:
        counts / sum(counts). Their sum is 1, so that weighted means of the microbatches add up to
        the mean of the batch; an unweighted mean of means is wrong for every ragged split.

    Raises:
        ValueError: A count is negative, or all of them are zero.
    """
    total = sum(counts)
    if total <= 0 or min(counts) < 0:
        raise ValueError(
            f"counts={list(counts)}; must be non-negative with a positive sum: "
            "a batch without any target has no mean loss."
        )
    return tuple(count / total for count in counts)
