"""The noisy quadratic model with momentum, against simulation-free references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from noisy_momentum import second_moments


@given(st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.floats(1e-3, 0.5), st.integers(1, 200))
def test_without_momentum_it_is_plain_sgd(h: float, c: float, a: float, steps: int) -> None:
    left = (1.0 - a * h) ** (2 * steps)
    expected = left + (1.0 - left) * a * c / (h * (2.0 - a * h))
    found = second_moments(np.array([h]), np.array([c]), a, 0.0, steps)
    assert found[0] == pytest.approx(expected, rel=1e-9)


@given(st.floats(0.1, 1.0), st.floats(0.1, 1.0), st.floats(1e-2, 0.5), st.floats(0.0, 0.9))
def test_it_settles_where_theory_says(h: float, c: float, a: float, m: float) -> None:
    """Loss (1 + m) a c / (2 (1 - m) (2 + 2 m - a h)) per dimension."""
    expected = (1.0 + m) * a * c / ((1.0 - m) * (2.0 + 2.0 * m - a * h)) / h
    found = second_moments(np.array([h]), np.array([c]), a, m, 100_000)
    assert found[0] == pytest.approx(expected, rel=1e-6)


@given(st.floats(0.01, 1.0), st.floats(1e-3, 2.0), st.floats(0.0, 0.99), st.integers(1, 60))
def test_without_noise_it_is_the_path_of_the_weight(h: float, a: float, m: float, n: int) -> None:
    w, v = 1.0, 0.0
    for _ in range(n):
        v = m * v + h * w
        w -= a * v
    found = second_moments(np.array([h]), np.array([0.0]), a, m, n)
    assert found[0] == pytest.approx(w * w, rel=1e-6, abs=1e-9)
