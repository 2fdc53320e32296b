"""Budgets, and the rungs on which runs of every batch size meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.errors import ConfigError
from bs_optuna.training.budget import Budget
from bs_optuna.training.rungs import rungs


BATCH_SIZES = st.integers(1, 4096)
BUDGETS = st.builds(
    Budget, st.sampled_from(["samples", "steps", "seconds"]), st.integers(5, 10**6).map(float)
)


@given(BUDGETS)
def test_what_is_printed_can_be_read(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs=3", "unit must be samples, steps or seconds"),
        ("samples", "must be samples=NUMBER"),
        ("samples=many", "must be samples=NUMBER"),
        ("samples=0", "above 0"),
        ("steps=-3", "above 0"),
        ("seconds=inf", "finite"),
        ("seconds=nan", "finite"),
    ],
)
def test_a_wrong_budget_names_value_and_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget.parse(text)


@given(samples=st.integers(1, 10**6), batch_size=BATCH_SIZES)
def test_equal_samples_within_half_a_step(samples: int, batch_size: int) -> None:
    steps = Budget("samples", samples).steps(batch_size)
    assert steps is not None
    assert steps == 1 or abs(steps * batch_size - samples) <= batch_size / 2


@given(steps=st.integers(1, 10**6), batch_size=BATCH_SIZES)
def test_equal_steps_for_every_batch_size(steps: int, batch_size: int) -> None:
    assert Budget("steps", steps).steps(batch_size) == steps


@given(budget=BUDGETS, batch_size=BATCH_SIZES, count=st.integers(1, 8))
def test_rungs_rise_to_the_end(budget: Budget, batch_size: int, count: int) -> None:
    found = rungs(budget, batch_size=batch_size, count=count)
    assert 1 <= len(found) <= count
    assert found[-1].progress == 1
    assert [r.progress for r in found] == sorted({r.progress for r in found})
    resources = [r.resource for r in found if r.resource is not None]
    assert resources == sorted(set(resources))


@given(steps=st.integers(5, 1000), exponents=st.lists(st.integers(0, 3), min_size=2, max_size=4))
def test_runs_of_equal_steps_meet_at_equal_samples(steps: int, exponents: list[int]) -> None:
    sizes = [16 * 2**e for e in exponents]
    budget = Budget("steps", steps)
    resources = [{r.resource for r in rungs(budget, batch_size=b, count=5)} for b in sizes]
    assert set.intersection(*resources)
    for size in sizes:
        for rung in rungs(budget, batch_size=size, count=5):
            assert rung.resource == pytest.approx(rung.progress * steps * size)


def test_an_end_that_no_power_of_two_reaches_is_on_no_rung() -> None:
    found = rungs(Budget("steps", 10), batch_size=96, count=3)
    assert [r.resource for r in found] == [320, 640, None]
