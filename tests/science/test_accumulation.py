"""Laws of the cut of a batch into microbatches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.accumulation import TokenPlan
from bs_optuna.science.accumulation import weights


SIZES = st.integers(1, 5000)
LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=60).map(tuple)


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


@pytest.mark.parametrize(
    ("counts", "message"), [([0, 0], "without any target"), ([2, -1], "none may be negative")]
)
def test_weights_of_nothing_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(counts)


@given(lengths=LENGTHS, tokens=SIZES)
def test_every_sample_is_in_one_microbatch_within_the_budget_or_alone(
    lengths: tuple[int, ...], tokens: int
) -> None:
    plan = TokenPlan(lengths, tokens)
    assert sorted(sample for part in plan.parts for sample in part) == list(range(len(lengths)))
    elements = [
        len(part) * max(1, longest) for part, longest in zip(plan.parts, plan.longest, strict=True)
    ]
    assert all(n <= tokens or len(part) == 1 for n, part in zip(elements, plan.parts, strict=True))
    assert plan.longest == tuple(max(lengths[i] for i in part) for part in plan.parts)
    assert plan.largest == elements[0] == max(elements)
    assert plan.microbatch_size == max(plan.sizes)
    assert list(plan.sizes) == [len(part) for part in plan.parts]


def fewest(lengths: tuple[int, ...], tokens: int) -> int:
    """Microbatches of the best partition there is, by looking at all of them."""

    def search(left: tuple[int, ...], groups: list[list[int]]) -> int:
        if not left:
            fits = (len(group) * max(1, *group) <= tokens or len(group) == 1 for group in groups)
            return len(groups) if all(fits) else len(lengths) + 1
        first, rest = left[0], left[1:]
        alone = search(rest, [*groups, [first]])
        joined = (
            search(rest, [*groups[:k], [*group, first], *groups[k + 1 :]])
            for k, group in enumerate(groups)
        )
        return min([alone, *joined])

    return search(lengths, [])


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).map(tuple),
    tokens=st.integers(1, 40),
)
def test_no_cut_within_the_budget_has_fewer_microbatches(
    lengths: tuple[int, ...], tokens: int
) -> None:
    assert TokenPlan(lengths, tokens).accumulation_steps == fewest(lengths, tokens)


@given(lengths=LENGTHS, tokens=SIZES)
def test_halving_a_budget_ends_with_samples_alone(lengths: tuple[int, ...], tokens: int) -> None:
    plan, halvings = TokenPlan(lengths, tokens), 0
    while plan.microbatch_size > 1:
        smaller = plan.halved()
        assert smaller.microbatch_limit <= plan.microbatch_limit / 2
        assert smaller.parts != plan.parts
        plan, halvings = smaller, halvings + 1
    assert halvings <= math.log2(tokens) + 1
    with pytest.raises(ValueError, match="one sample cannot be halved"):
        plan.halved()


def test_samples_of_like_length_go_together_and_the_most_elements_first() -> None:
    plan = TokenPlan((3, 10, 2, 3, 9, 1), 20)
    assert plan.parts == ((1, 4), (0, 3, 2, 5))
    assert plan.largest == 20
    assert TokenPlan((50, 4, 4), 20).parts == ((0,), (1, 2))


@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        ((), 4, "must be at least one"),
        ((2, -1), 4, "none below 0"),
        ((2,), 0, "microbatch_limit=0; must be at least 1"),
    ],
)
def test_lengths_that_are_none_are_refused(
    lengths: tuple[int, ...], tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenPlan(lengths, tokens)
