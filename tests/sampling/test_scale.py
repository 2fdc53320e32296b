"""The scale of values: order, units, penalties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bs_optuna.sampling.scale import Scale


finite = arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e3, 1e3))


@given(finite, st.floats(0.1, 10.0), st.floats(-100.0, 100.0))
def test_scale_ignores_units(values: np.ndarray, factor: float, shift: float) -> None:
    values = np.round(values, 3)
    here = Scale.of(values).standardised(values)
    moved = values * factor + shift
    there = Scale.of(moved).standardised(moved)
    np.testing.assert_allclose(here, there, atol=1e-4)


@given(finite)
def test_scale_keeps_the_order_and_comes_back(values: np.ndarray) -> None:
    values = np.round(values, 3)
    scale = Scale.of(values)
    standardised = scale.standardised(values)
    assert np.isfinite(standardised).all()
    assert (np.diff(standardised[np.argsort(values)]) >= 0).all()
    assert scale.restored(standardised).min() == pytest.approx(values.min(), abs=1e-6)


def test_a_diverged_run_does_not_hide_the_others() -> None:
    values = np.array([2.40, 2.41, 2.45, 2.50, 11.0, math.inf])
    standardised = Scale.of(values).standardised(values)
    assert np.isfinite(standardised).all()
    assert standardised[3] - standardised[0] > 1.0


@pytest.mark.parametrize("penalty", [1e3, 1e9])
def test_a_penalty_is_not_what_others_are_measured_by(penalty: float) -> None:
    losses = np.array([0.3, 0.31, 0.4, 0.7, 1.2])
    values = np.concatenate([losses, np.full(20, penalty)])
    assert Scale.of(values).unit < 1.0
    assert Scale.of(losses).unit == pytest.approx(0.1)
