"""What is known about the microbatch sizes that fit into memory.

Whether a microbatch fits is monotone in its size, so two numbers hold all that was seen.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass

from bs_optuna.science.accumulation import AccumulationPlan


# What is left of a prediction that has failed: it is rarely wrong by more.
PREDICTION_LOWERED = 0.9


def most_attempts(size: int) -> int:
    """Attempts within which every search for a size up to this one ends: 2 log2(size) + 2."""
    return 2 * math.ceil(math.log2(size)) + 2


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
    def sample_fails(self) -> bool:
        """Whether a single sample is known not to fit."""
        return self.fails == 1

    def start(self, batch_size: int, *, predicted: int | None = None) -> int:
        """The microbatch size to begin with: the largest that nothing speaks against.

        Without a prediction: the whole batch as long as nothing failed, then half of what failed,
        as back-off would have it, or what is known to fit if that is more. A prediction takes the
        place of the whole batch, and is believed once more, less a tenth, when it has just failed.
        So every failure halves ``fails`` but for these two: in all, however wrong the predictions,
        there are at most log2 of the largest size, plus 2 for each prediction that differs.

        Args:
            batch_size: Samples per optimizer step.
            predicted: The largest microbatch size that is predicted to fit beside that batch; None
                if nothing is.
        """
        if self.fails is None:
            guess = batch_size if predicted is None else predicted
        elif predicted is None:
            guess = self.fails // 2
        else:
            lowered = int(PREDICTION_LOWERED * predicted)
            tries = (predicted, lowered, self.fails // 2)
            guess = next(size for size in tries if size < self.fails)
        return max(1, min(batch_size, max(self.fits, guess)))

    @classmethod
    def merged(cls, bounds: Iterable[MicrobatchBounds]) -> MicrobatchBounds:
        """What several runs know together.

        Where a size has fitted in one run and failed in another, memory is not the same each time:
        the failure counts, and of the successes only those at half of its size.
        """
        seen = list(bounds)
        fits = [bound.fits for bound in seen]
        fails = min((bound.fails for bound in seen if bound.fails is not None), default=None)
        if fails is not None and max(fits) >= fails:
            fits = [size for size in fits if size <= fails // 2]
        return cls(max(fits, default=0), fails)


def close(size: int, other: int) -> bool:
    """Whether two sizes are less than a factor of 2 apart, so that only one should be tried."""
    return size < 2 * other and other < 2 * size


def beside(size: int, claims: Iterable[int], *, batch_size: int, fits: int) -> int:
    """The largest microbatch size up to a given one that nobody else is trying at this moment.

    One worker on its own halves, so that the sizes that fail are a factor of 2 apart. If those are
    too that several workers try at the same time, no factor of 2 is paid for twice: all of them
    together fail at most log2(largest / smallest that fits) + 1 times, however many there are.

    A claim does not lead anybody to a microbatch of a single sample, which some models cannot train
    on: rather than that, a size is tried twice.

    Args:
        size: The most that is to be tried.
        claims: What others are trying.
        batch_size: Samples per optimizer step, of which equal microbatches are made.
        fits: Largest size known to fit, which nobody needs to try.

    Returns:
        A size that is close to no claim, unless it is known to fit or less would leave single
        samples.
    """
    size = AccumulationPlan.within(batch_size, size).microbatch_size
    for claim in sorted(claims, reverse=True):
        if size > fits and close(size, claim):
            size = lowered(size, max(fits, claim // 2), batch_size=batch_size)
    return size


def lowered(size: int, limit: int, *, batch_size: int) -> int:
    """The microbatch size by a limit; the given size if that is less, or leaves single samples."""
    plan = AccumulationPlan.within(batch_size, max(1, limit))
    return size if plan.sizes[-1] == 1 else min(size, plan.microbatch_size)


def largest_fitting(
    peak_bytes: Callable[[int], float],
    limit_bytes: float,
    *,
    most: int,
    seen: Iterable[int] = (),
) -> int:
    """The largest size whose peak is within a limit, or one at most 1 % smaller.

    Peak memory is piecewise affine in the microbatch size, and grows faster from piece to piece
    (the optimizer's temporaries, then the activations). So the size is interpolated between one
    that fits and one that doesn't, which is nearly exact on a piece: what comes next to it is tried
    then, and what lies twice as far away each time, until the size is between two that were tried.

    Args:
        peak_bytes: Peak memory of a size, not decreasing.
        limit_bytes: What must not be exceeded.
        most: The largest size of interest, at least 1.
        seen: Sizes whose peak is known already, so that asking for it costs nothing.

    Returns:
        A size from 1 to ``most`` that was seen to fit, or 0 if 1 does not.
    """
    known = [size for size in seen if 1 < size < most]
    high = min((size for size in known if peak_bytes(size) > limit_bytes), default=most)
    if (high_bytes := peak_bytes(high)) <= limit_bytes:
        return most
    low = max((size for size in known if size < high), default=1)
    if (low_bytes := peak_bytes(low)) > limit_bytes:
        return 0
    stride, fitted = 0, True
    while high - low > (nearest := max(1, low // 100)):
        if stride:
            guess = low + stride if fitted else high - stride
        else:
            slope = (high_bytes - low_bytes) / (high - low)
            guess = low + int((limit_bytes - low_bytes) / slope)
        guess = min(max(guess, low + 1), high - 1)
        guess_bytes = peak_bytes(guess)
        fits = guess_bytes <= limit_bytes
        if fits:
            low, low_bytes = guess, guess_bytes
        else:
            high, high_bytes = guess, guess_bytes
        surrounded = stride > 0 and fits != fitted
        stride = 0 if surrounded else 2 * stride or nearest
        fitted = fits
    return low


def largest_from_below(
    peak_bytes: Callable[[int], float | None], limit_bytes: float, *, least: int, most: int
) -> int | None:
    """About the largest size within a limit, where no size may be asked for that exceeds it.

    The size is doubled. Peak memory is piecewise affine in it: the line through the last two is
    drawn on, and believed up to twice the larger one; if the limit lies beyond, that is asked next.

    Args:
        peak_bytes: Peak memory of a size, not decreasing, infinity where it is only known to be too
            much; None where it cannot be found out.
        limit_bytes: What should not be exceeded.
        least: The size to begin with.
        most: The largest size of interest, at least ``least``.

    Returns:
        A size from 1 to ``most``: 1 if not even the least one fits. None where a peak is missing.
    """
    size, below, below_bytes = least, 0, 0.0
    while (peak := peak_bytes(size)) is not None:
        if size == most and peak <= limit_bytes:
            return size
        if peak == math.inf:
            return max(1, below)
        if below:
            slope = max(1.0, (peak - below_bytes) / (size - below))
            found = size + math.floor((limit_bytes - peak) / slope)
            if found <= 2 * size:
                return max(below, min(found, most))
        elif peak > limit_bytes:
            return 1
        size, below, below_bytes = min(2 * size, most), size, peak
    return None


def fits_surely(
    peak_bytes: Callable[[int], float | None], limit_bytes: float, *, least: int, most: int
) -> bool:
    """Whether a small size, or a few, tell already that the largest is within a limit.

    Peak memory is the most of several amounts, each with a fixed part and one that goes with the
    size; so of n times the size it is at most n times as much. (Not where a loss couples samples,
    such as in a table of each with each.) Asked next is the size that may tell if the fixed part
    was all, at least twice the last one; no size that may not be within the limit itself, and
    none beyond an eighth of the largest.

    Args:
        peak_bytes: Peak memory of a size; None where it cannot be found out.
        limit_bytes: What must not be exceeded.
        least: The size to begin with.
        most: The largest size.
    """
    size = least
    while (peak := peak_bytes(size)) is not None:
        if peak * most / size <= limit_bytes:
            return True
        if 2 * peak > limit_bytes:
            return False
        tells = math.ceil(peak * most / limit_bytes)
        size = max(2 * size, min(tells, int(size * limit_bytes / peak)))
        if 8 * max(size, tells) > most:
            return False
    return False


def on_the_line(size: int, peak_bytes: Mapping[int, float]) -> float:
    """The peak of a size from those of others: on the line through the two next to it.

    Beyond the largest of them that is the line through the last two; below the smallest, or where
    there is but one, its peak is given.

    Args:
        size: Any size.
        peak_bytes: At least one size with its peak.
    """
    sizes = sorted(peak_bytes)
    if size <= sizes[0] or len(sizes) == 1:
        return peak_bytes[sizes[0]]
    k = min(bisect_left(sizes, size), len(sizes) - 1)
    low, high = sizes[k - 1], sizes[k]
    slope = (peak_bytes[high] - peak_bytes[low]) / (high - low)
    return peak_bytes[high] + (size - high) * slope
