"""Laws of what is known about memory: few failures, no size twice, nothing forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.memory import MicrobatchBounds
from bs_optuna.science.memory import beside
from bs_optuna.science.memory import close
from bs_optuna.science.memory import fits_surely
from bs_optuna.science.memory import largest_fitting
from bs_optuna.science.memory import largest_from_below
from bs_optuna.science.memory import on_the_line


SIZES = st.integers(1, 5000)
MOST = 5000


def trial(bounds: MicrobatchBounds, batch_size: int, predicted: int | None,
          holds: Callable[[int], bool]) -> tuple[MicrobatchBounds, list[int]]:  # fmt: skip
    """What a trial learns as the training does, and the sizes that failed on the way."""
    plan = AccumulationPlan(batch_size, bounds.start(batch_size, predicted=predicted))
    failed: list[int] = []
    while not holds(plan.microbatch_size):
        failed.append(plan.microbatch_size)
        if plan.microbatch_size == 1:
            return MicrobatchBounds(0, 1), failed
        plan = plan.halved()
    return MicrobatchBounds(plan.microbatch_size, min(failed, default=None)), failed


def study(batch_sizes: list[int], predicted: int | None,
          holds: Callable[[int], bool]) -> tuple[MicrobatchBounds, list[int]]:  # fmt: skip
    """What trials one after the other learn, and every size that failed."""
    seen: list[MicrobatchBounds] = []
    failed: list[int] = []
    for batch_size in batch_sizes:
        known = MicrobatchBounds.merged(seen)
        if known.sample_fails:
            break
        learned, failures = trial(known, batch_size, predicted, holds)
        seen.append(learned)
        failed += failures
    return MicrobatchBounds.merged(seen), failed


@given(
    batch_sizes=st.lists(SIZES, min_size=1, max_size=30),
    predicted=st.none() | st.integers(0, MOST),
    capacity=st.integers(0, MOST),
)
def test_a_study_sees_few_failures_and_never_one_size_twice(
    batch_sizes: list[int], predicted: int | None, capacity: int
) -> None:
    known, failed = study(batch_sizes, predicted, lambda size: size <= capacity)
    assert len(failed) <= math.log2(max(batch_sizes)) + (1 if predicted is None else 2)
    assert len(set(failed)) == len(failed)
    assert known.fits <= capacity
    assert known.fails is None or known.fails > capacity


@given(
    batch_sizes=st.lists(SIZES, min_size=1, max_size=60),
    predicted=st.none() | st.integers(0, MOST),
    whims=st.randoms(use_true_random=False),
)
def test_memory_that_differs_each_time_ends_in_few_failures_too(
    batch_sizes: list[int], predicted: int | None, whims: object
) -> None:
    _, failed = study(batch_sizes, predicted, lambda _: whims.random() < 0.7)  # type: ignore[attr-defined]
    assert len(failed) <= 2 * math.log2(MOST) + 2


@given(batch_size=SIZES, fits=SIZES, fails=st.none() | SIZES, predicted=st.none() | SIZES)
def test_the_start_is_a_size_that_nothing_speaks_against(
    batch_size: int, fits: int, fails: int | None, predicted: int | None
) -> None:
    bounds = MicrobatchBounds.merged([MicrobatchBounds(fits, fails)])
    start = bounds.start(batch_size, predicted=predicted)
    assert 1 <= start <= batch_size
    assert start >= min(bounds.fits, batch_size)
    assert bounds.fails is None or start < bounds.fails or bounds.sample_fails


@given(capacity=st.integers(1, MOST), error=st.floats(-0.1, 0.1))
def test_a_prediction_within_a_tenth_costs_one_failure_and_wastes_a_tenth_at_most(
    capacity: int, error: float
) -> None:
    predicted = round(capacity * (1 + error))
    known, failed = study([MOST] * 2, predicted, lambda size: size <= capacity)
    assert len(failed) <= 1
    # An equal cut of the batch may hold less than what fits, whoever cuts it.
    least = AccumulationPlan(MOST, max(1, math.floor(0.9 * capacity) - 1)).microbatch_size
    assert known.fits >= least


def test_a_failed_prediction_is_lowered_once_and_then_halved() -> None:
    assert MicrobatchBounds().start(512, predicted=100) == 100
    assert MicrobatchBounds(fits=50, fails=100).start(512, predicted=100) == 90
    assert MicrobatchBounds(fits=50, fails=90).start(512, predicted=100) == 50
    assert MicrobatchBounds(fits=0, fails=90).start(512, predicted=100) == 45


def test_what_was_seen_is_more_than_what_was_predicted() -> None:
    assert MicrobatchBounds(fits=200).start(512, predicted=100) == 200
    assert MicrobatchBounds(fits=16).start(512, predicted=100) == 100
    assert MicrobatchBounds(fits=16, fails=80).start(512, predicted=100) == 40
    assert MicrobatchBounds().start(512, predicted=0) == 1


def test_without_a_prediction_the_whole_batch_is_tried_and_then_halved() -> None:
    assert MicrobatchBounds().start(512) == 512
    assert MicrobatchBounds(fits=16, fails=512).start(512) == 256
    assert MicrobatchBounds(fits=300, fails=512).start(512) == 300


def test_a_failure_leaves_only_clearly_smaller_successes() -> None:
    seen = [MicrobatchBounds(fits=100), MicrobatchBounds(fits=40, fails=90), MicrobatchBounds(60)]
    assert MicrobatchBounds.merged(seen) == MicrobatchBounds(fits=40, fails=90)
    assert MicrobatchBounds.merged([]) == MicrobatchBounds()


@given(size=SIZES, claims=st.lists(SIZES, max_size=8), batch_size=SIZES, fits=st.integers(0, MOST))
def test_what_is_tried_beside_others_is_close_to_nothing_that_they_try(
    size: int, claims: list[int], batch_size: int, fits: int
) -> None:
    found = beside(size, claims, batch_size=batch_size, fits=fits)
    assert 1 <= found <= min(size, batch_size)
    alone = AccumulationPlan.within(batch_size, size).microbatch_size
    near = [claim for claim in claims if close(found, claim)]
    singles = [AccumulationPlan.within(batch_size, max(1, c // 2)).sizes[-1] == 1 for c in near]
    assert found <= fits or all(singles)
    assert found == alone or AccumulationPlan(batch_size, found).sizes[-1] > 1
    assert found == alone or found >= min(fits, alone) / 2  # an equal cut may halve it
    assert beside(size, [], batch_size=batch_size, fits=fits) == alone
    if alone <= fits:
        assert found == alone


def test_a_claim_leaves_room_above_and_below() -> None:
    def try_beside(*claims: int) -> int:
        return beside(512, claims, batch_size=512, fits=16)

    assert [try_beside(c) for c in (1024, 1023, 512, 257, 256, 64)] == [
        512,
        256,
        256,
        128,
        512,
        512,
    ]
    assert try_beside(512, 256, 128) == 64
    assert try_beside(128, 512) == 256
    assert try_beside(512, 256, 128, 64, 32) == 16  # which is known to fit


PIECES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 300)), min_size=1, max_size=4)


@given(pieces=PIECES, limit=st.integers(0, 500_000), most=SIZES, seen=st.lists(SIZES, max_size=4))
def test_the_largest_fitting_is_found_on_every_convex_peak(
    pieces: list[tuple[int, int]], limit: int, most: int, seen: list[int]
) -> None:
    asked: list[int] = []

    def peak(size: int) -> int:
        asked.append(size)
        return max(constant + slope * size for constant, slope in pieces)

    found = largest_fitting(peak, limit, most=most, seen=seen)
    calls = len(set(asked) - set(seen))
    truth = max((size for size in range(1, most + 1) if peak(size) <= limit), default=0)
    assert truth * 0.99 - 1 <= found <= truth
    assert calls <= 3 * math.log2(MOST) + 3
    assert found == 0 or found in asked


def test_an_affine_peak_takes_four_predictions() -> None:
    asked: list[int] = []

    def peak(size: int) -> int:
        asked.append(size)
        return 1000 + 7 * size

    assert largest_fitting(peak, 2000, most=100_000) == 142
    assert len(asked) == 4


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (1, 1), (2, 1)])
def test_a_single_sample_is_a_size_too(limit: int, found: int) -> None:
    assert largest_fitting(lambda size: size, limit, most=1) == found


@given(
    constant=st.integers(0, 10_000), slope=st.integers(1, 300), limit=st.integers(0, 500_000),
    most=SIZES,
)  # fmt: skip
def test_from_below_an_affine_peak_is_met_and_never_exceeded(
    constant: int, slope: int, limit: int, most: int
) -> None:
    asked: list[int] = []

    def peak(size: int) -> int:
        asked.append(size)
        return constant + slope * size

    least = min(2, most)
    found = largest_from_below(peak, limit, least=least, most=most)
    calls = list(asked)
    truth = max((size for size in range(1, most + 1) if peak(size) <= limit), default=0)
    assert found == (truth if truth >= least else 1)
    # Two sizes make a line; what is asked beyond them is what the line has promised.
    assert all(peak(size) <= limit for size in calls[2:])
    assert len(calls) <= math.log2(MOST) + 2


@given(pieces=PIECES, limit=st.integers(0, 500_000), most=st.integers(2, MOST))
def test_from_below_no_more_than_one_size_is_too_large(
    pieces: list[tuple[int, int]], limit: int, most: int
) -> None:
    asked: list[int] = []

    def peak(size: int) -> int:
        asked.append(size)
        return max(constant + slope * size for constant, slope in pieces)

    found = largest_from_below(peak, limit, least=2, most=most)
    calls = list(asked)
    assert found is not None
    assert 1 <= found <= most
    assert sum(peak(size) > limit for size in calls) <= 1
    if peak(calls[-1]) > limit and found > 1:  # between two that were asked, not beyond them
        assert peak(found) <= limit


def test_from_below_what_has_no_peak_says_nothing() -> None:
    assert largest_from_below(lambda size: None, 100, least=2, most=64) is None
    some = {2: 20.0, 4: 40.0}
    assert largest_from_below(some.get, 1000, least=2, most=64) is None
    assert largest_from_below(some.get, 70, least=2, most=64) == 7


@given(
    st.lists(st.integers(1, 4096), min_size=2, unique=True),
    st.integers(0, 10**9),
    st.integers(0, 10**7),
    st.integers(1, 8192),
)
def test_on_the_line_an_affine_peak_is_met(
    sizes: list[int], base: int, slope: int, size: int
) -> None:
    peaks = {known: base + slope * known for known in sizes}
    expected = base + slope * max(size, min(sizes))
    assert on_the_line(size, peaks) == pytest.approx(expected, rel=1e-9)


@given(st.dictionaries(st.integers(1, 4096), st.integers(0, 10**9), min_size=1))
def test_on_the_line_what_was_measured_stays(peaks: dict[int, float]) -> None:
    assert all(on_the_line(size, peaks) == pytest.approx(peaks[size]) for size in peaks)


def test_on_the_line_a_single_size_stands_for_all() -> None:
    assert on_the_line(1, {2: 7.0}) == on_the_line(9, {2: 7.0}) == 7.0


def test_from_below_what_only_is_too_much_leaves_the_size_before_it() -> None:
    def peak(size: int) -> float:
        return size if size <= 8 else math.inf

    assert largest_from_below(peak, 100, least=2, most=64) == 8
    assert largest_from_below(lambda size: math.inf, 100, least=2, most=64) == 1


@given(
    parts=st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0, 1e4)).filter(any), min_size=1, max_size=5
    ),
    limit=st.floats(0, 1e9),
    most=st.integers(1, MOST),
)
def test_what_fits_surely_fits_and_asking_costs_little(
    parts: list[tuple[float, float]], limit: float, most: int
) -> None:
    asked: list[int] = []

    def peak(size: int) -> float:
        asked.append(size)
        return max(fixed + each * size for fixed, each in parts)

    least = min(2, most)
    sure = fits_surely(peak, limit, least=least, most=most)
    needed = peak(most)
    asked.pop()
    assert not sure or needed <= limit * (1 + 1e-9)
    # A fixed part counts up to 16 times, at the largest size that may be asked for.
    assert sure or most < 32 or 16 * needed > limit
    first, *others = asked
    assert first == least
    assert all(peak(size) <= limit for size in others)
    assert sum(others) <= most / 4


def test_a_peak_that_only_grows_with_the_size_is_told_by_the_first() -> None:
    assert fits_surely(lambda size: 3.0 * size, 300, least=2, most=100)
    assert not fits_surely(lambda size: 3.0 * size, 299, least=2, most=100)


def test_a_fixed_part_takes_larger_sizes_to_tell() -> None:
    asked = []

    def peak(size: int) -> float:
        asked.append(size)
        return 100.0 + size

    assert fits_surely(peak, 1700, least=2, most=256)
    assert asked == [2, 16, 32]


def test_what_has_no_peak_is_not_sure_to_fit() -> None:
    assert not fits_surely(lambda size: None, 1e9, least=2, most=100)
    assert not fits_surely(lambda size: None if size > 2 else 1e8, 1e9, least=2, most=100)
