"""Laws of growing back: few tries where memory stays, full size soon after a spike has passed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.science.regrowth import MicrobatchLimit
from bs_optuna.science.regrowth import Smaller


BATCHES = st.integers(2, 2000)
WAITS = st.integers(1, 50)


class Steps:
    """Runs steps in a memory that holds some samples at each of them, and counts."""

    def __init__(
        self,
        batch_size: int,
        regrow_after: int | None,
        most: int | None = None,
        smaller: Smaller | None = None,
    ) -> None:
        self.limit = MicrobatchLimit(most, regrow_after=regrow_after, smaller=smaller)
        self.cut = partial(AccumulationPlan.within, batch_size)
        self.failures: list[int] = []  # of each step
        self.sizes: list[int] = []  # that ran

    def run(self, steps: int, holds: Callable[[int], int]) -> None:
        for number in range(steps):
            plan, failures = self.limit.plan(self.cut), 0
            while plan.microbatch_size > max(1, holds(number)):
                plan, failures = self.limit.failed(plan, self.cut), failures + 1
            self.limit.succeeded(plan)
            self.failures.append(failures)
            self.sizes.append(plan.microbatch_size)


@given(batch_size=BATCHES, fits=BATCHES, wait=WAITS, steps=st.integers(1, 500))
def test_tries_are_logarithmic_in_the_steps_while_memory_stays(
    batch_size: int, fits: int, wait: int, steps: int
) -> None:
    run = Steps(batch_size, wait)
    run.run(steps, lambda number: fits)
    assert run.failures[0] <= math.log2(batch_size)
    assert sum(run.failures[1:]) <= math.log2(steps / wait + 1)
    if batch_size <= fits:
        assert sum(run.failures) == 0


@given(batch_size=BATCHES, memory=st.lists(BATCHES, min_size=1, max_size=300), wait=WAITS)
def test_failures_are_bounded_whatever_memory_does(
    batch_size: int, memory: list[int], wait: int
) -> None:
    run = Steps(batch_size, wait)
    run.run(len(memory), lambda number: memory[number])
    assert sum(run.failures) <= math.log2(batch_size) + len(memory) / wait
    without = Steps(batch_size, None)
    without.run(len(memory), lambda number: memory[number])
    assert sum(without.failures) <= math.log2(batch_size)
    assert without.sizes == sorted(without.sizes, reverse=True)


@given(batch_size=BATCHES, spike=st.integers(1, 1000), wait=WAITS, lasts=st.integers(1, 100))
def test_the_full_size_is_back_soon_after_a_spike(
    batch_size: int, spike: int, wait: int, lasts: int
) -> None:
    run = Steps(batch_size, wait)
    run.run(lasts, lambda number: spike)
    longest = 2 * (lasts + wait)  # a wait doubles only when one of its length has passed
    run.run(longest * math.ceil(math.log2(batch_size)), lambda number: batch_size)
    assert run.sizes[-1] == batch_size
    assert sum(run.failures[lasts:]) == 0


@given(batch_size=BATCHES, most=BATCHES, memory=st.lists(BATCHES, min_size=1, max_size=200))
def test_it_never_grows_beyond_where_it_began(
    batch_size: int, most: int, memory: list[int]
) -> None:
    run = Steps(batch_size, 1, most)
    run.run(len(memory), lambda number: memory[number])
    assert max(run.sizes) <= most


@given(
    batch_size=BATCHES,
    memory=st.lists(BATCHES, min_size=1, max_size=200),
    wait=WAITS,
    whims=st.randoms(use_true_random=False),
)
def test_a_size_that_is_chosen_can_only_be_smaller(
    batch_size: int, memory: list[int], wait: int, whims: random.Random
) -> None:
    def smaller(failed: int, half: int) -> int:
        assert half < failed or failed == 1
        return whims.randint(0, 2 * half)

    run = Steps(batch_size, wait, smaller=smaller)
    run.run(len(memory), lambda number: memory[number])
    assert sum(run.failures) <= math.log2(batch_size) + len(memory) / wait
    assert all(1 <= size <= max(1, least) for size, least in zip(run.sizes, memory, strict=True))


def test_a_try_that_fails_goes_back_to_what_has_run_and_waits_twice_as_long() -> None:
    run = Steps(100, 4)
    run.run(40, lambda number: 30)
    assert set(run.sizes) == {25}
    assert [n for n, failures in enumerate(run.failures) if failures] == [0, 4, 12, 28]


def test_spikes_that_pass_far_apart_do_not_lengthen_the_wait() -> None:
    run = Steps(64, 4)
    for _ in range(10):
        run.run(20, lambda number: 64)
        run.run(1, lambda number: 32)
        run.run(4, lambda number: 64)
        assert run.sizes[-1] == 64


def test_a_batch_too_small_to_tell_is_no_try() -> None:
    limit = MicrobatchLimit(None, regrow_after=1)
    large, small = (partial(AccumulationPlan.within, size) for size in (64, 10))
    limit.succeeded(limit.failed(limit.plan(large), large))
    for _ in range(5):
        limit.succeeded(limit.plan(small))
    assert limit.value == 32
    assert limit.plan(large).microbatch_size == 64
