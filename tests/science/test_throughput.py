"""Laws of the choice of a microbatch by its throughput."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.science.throughput import TOLERANCE
from bs_optuna.science.throughput import samples_per_second
from bs_optuna.science.throughput import smallest_fast


SIZES = st.integers(1, 10**5)
POSITIVE = st.floats(1e-6, 1e6)
RATES = st.dictionaries(SIZES, POSITIVE, min_size=1)


@given(RATES)
def test_it_is_fast_enough_and_nothing_smaller_is(rates: dict[int, float]) -> None:
    chosen = smallest_fast(rates)
    enough = (1 - TOLERANCE) * max(rates.values())
    assert rates[chosen] >= enough
    assert all(rate < enough for size, rate in rates.items() if size < chosen)


@given(rates=RATES, slower=st.integers(-20, 20))
def test_another_clock_gives_the_same_choice(rates: dict[int, float], slower: int) -> None:
    scaled = {size: rate * 2.0**slower for size, rate in rates.items()}
    assert smallest_fast(scaled) == smallest_fast(rates)


@given(rates=RATES, low=st.floats(0, 1), high=st.floats(0, 1))
def test_tolerance_makes_it_smaller(rates: dict[int, float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert smallest_fast(rates, tolerance=high) <= smallest_fast(rates, tolerance=low)


def test_three_percent_less_is_enough() -> None:
    assert smallest_fast({8: 50.0, 16: 96.9, 32: 97.1, 64: 99.0, 128: 100.0}) == 32


@given(
    seconds=st.dictionaries(SIZES, POSITIVE, min_size=1),
    update=st.floats(0, 1e6),
    batch_size=SIZES,
    smaller=SIZES,
)
def test_what_is_fast_enough_for_a_batch_is_so_for_smaller_ones(
    seconds: dict[int, float], update: float, batch_size: int, smaller: int
) -> None:
    smaller, batch_size = sorted((smaller, batch_size))

    def rates(batch_size: int) -> dict[int, float]:
        return {
            size: samples_per_second(
                batch_size, size, backward_seconds=backward, update_seconds=update
            )
            for size, backward in seconds.items()
        }

    chosen = smallest_fast(rates(batch_size))
    found = rates(smaller)
    assert found[chosen] >= (1 - TOLERANCE) * max(found.values()) * (1 - 1e-12)


def test_a_full_step_is_all_its_microbatches_and_one_update() -> None:
    rate = samples_per_second(100, 25, backward_seconds=2.0, update_seconds=2.0)
    assert rate == pytest.approx(100 / (4 * 2.0 + 2.0))
