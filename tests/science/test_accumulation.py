"""Laws of the cut of a batch into microbatches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.accumulation import weights


SIZES = st.integers(1, 5000)


@given(batch_size=SIZES, limit=SIZES)
def test_sizes_sum_to_the_batch_and_differ_by_at_most_one(batch_size: int, limit: int) -> None:
    plan = AccumulationPlan(batch_size, limit)
    assert sum(plan.sizes) == batch_size
    assert max(plan.sizes) - min(plan.sizes) <= 1
    assert plan.microbatch_size == max(plan.sizes) <= limit
    assert plan.accumulation_steps == len(plan.sizes) == math.ceil(batch_size / limit)


@given(batch_size=SIZES)
def test_halving_reaches_one_within_log2_steps(batch_size: int) -> None:
    plan, halvings = AccumulationPlan(batch_size, batch_size), 0
    while plan.microbatch_size > 1:
        smaller = plan.halved()
        assert smaller.microbatch_size <= plan.microbatch_size / 2
        plan, halvings = smaller, halvings + 1
    assert halvings <= math.log2(batch_size)


def test_hundred_in_at_most_thirty_two_are_four_of_twenty_five() -> None:
    assert AccumulationPlan(100, 32).sizes == (25, 25, 25, 25)


def test_a_single_sample_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="microbatch_size=1 cannot be halved"):
        AccumulationPlan(3, 1).halved()


@pytest.mark.parametrize(("batch_size", "limit"), [(0, 1), (1, 0), (-1, 4)])
def test_sizes_below_one_are_refused(batch_size: int, limit: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        AccumulationPlan(batch_size, limit)


@given(st.lists(st.integers(0, 1000), min_size=1).filter(any))
def test_weights_are_shares_of_the_whole(counts: list[int]) -> None:
    found = weights(counts)
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-12)
    assert all(w * sum(counts) == pytest.approx(c) for w, c in zip(found, counts, strict=True))


@pytest.mark.parametrize("counts", [[0, 0], [2, -1]])
def test_weights_of_nothing_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="without any target"):
        weights(counts)
