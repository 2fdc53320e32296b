"""How one batch is cut into microbatches: sizes and weights.

B: samples per optimizer step (batch_size); b_j: samples in microbatch j; sum(b_j) = B; l_j: length
of its longest sample; b_j * l_j: its elements, padding included.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bs_optuna.errors import NoTargetError


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
        return -(-self.batch_size // self.accumulation_steps)

    @property
    def largest(self) -> int:
        """What the largest microbatch holds, in the unit of the limit: samples."""
        return self.microbatch_size

    def halved(self) -> AccumulationPlan:
        """The plan to go on with when the largest microbatch of this one did not fit.

        Raises:
            ValueError: The microbatch is a single sample already.
        """
        if self.microbatch_size == 1:
            raise ValueError("microbatch_size=1 cannot be halved.")
        return AccumulationPlan(self.batch_size, self.microbatch_size // 2)


@dataclass(frozen=True)
class TokenPlan:
    """The cut of samples of different lengths into the fewest microbatches within a budget.

    Samples of like length go together, which keeps padding small. The microbatch with the most
    elements is the first: what does not fit fails at once, not after all the others.

    Attributes:
        lengths: Of each sample of the batch, in elements (tokens); 0 is counted as 1.
        microbatch_limit: Most elements that one microbatch may hold, at least 1; a sample that is
            longer is a microbatch of its own.
    """

    lengths: tuple[int, ...]
    microbatch_limit: int

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths={list(self.lengths)}; must be at least one, none below 0.")
        if self.microbatch_limit < 1:
            raise ValueError(f"microbatch_limit={self.microbatch_limit}; must be at least 1.")

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The samples of each microbatch, by their places in the batch, longest ones first."""
        order = sorted(range(self.batch_size), key=lambda sample: -self.lengths[sample])
        parts, start = [], 0
        while start < self.batch_size:
            size = max(1, self.microbatch_limit // max(1, self.lengths[order[start]]))
            parts.append(tuple(order[start : start + size]))
            start += size
        return tuple(sorted(parts, key=lambda part: -self._elements(part)))

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step."""
        return len(self.lengths)

    @property
    def accumulation_steps(self) -> int:
        """Number of microbatches."""
        return len(self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples in each microbatch."""
        return tuple(map(len, self.parts))

    @property
    def longest(self) -> tuple[int, ...]:
        """Length of the longest sample of each microbatch."""
        return tuple(self.lengths[part[0]] for part in self.parts)

    @property
    def microbatch_size(self) -> int:
        """Most samples in a microbatch."""
        return max(self.sizes)

    @property
    def largest(self) -> int:
        """What the largest microbatch holds, in the unit of the limit: elements."""
        return self._elements(self.parts[0])

    def halved(self) -> TokenPlan:
        """The plan to go on with when this one did not fit.

        Its limit is half of what the largest microbatch holds that can be cut at all.

        Raises:
            ValueError: Every microbatch is a single sample already.
        """
        held = [self._elements(part) for part in self.parts if len(part) > 1]
        if not held:
            raise ValueError("microbatches of one sample cannot be halved.")
        return TokenPlan(self.lengths, max(held) // 2)

    def _elements(self, part: tuple[int, ...]) -> int:
        return len(part) * max(1, self.lengths[part[0]])


def weights(counts: Sequence[float]) -> tuple[float, ...]:
    """The weight of each microbatch's mean loss in the mean loss of the batch.

    Args:
        counts: What each microbatch's mean is taken over: its samples or its target tokens.

    Returns:
        counts / sum(counts). Their sum is 1, so that weighted means of the microbatches add up to
        the mean of the batch; an unweighted mean of means is wrong for every ragged split.

    Raises:
        ValueError: A count is negative.
        NoTargetError: All of them are zero.
    """
    total = sum(counts)
    if min(counts, default=0) < 0:
        raise ValueError(f"counts={list(counts)}; none may be negative.")
    if total <= 0:
        raise NoTargetError(
            f"counts={list(counts)}; their sum must be positive: a batch without any target has no "
            "mean loss; skip it."
        )
    return tuple(count / total for count in counts)
