"""Coordinates of every kind of parameter, there and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from bs_optuna.sampling.space import Space


DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "batch_size": IntDistribution(16, 5000, log=True),
    "lr": FloatDistribution(1e-6, 1e-1, log=True),
    "dropout": FloatDistribution(0.0, 0.5, step=0.05),
    "momentum": FloatDistribution(0.5, 0.99),
    "layers": IntDistribution(2, 8, step=2),
    "width": IntDistribution(1, 1000, log=True),
    "activation": CategoricalDistribution(["relu", "gelu", None]),
    "decay": CategoricalDistribution([0.0, 1e-4]),
}


def space() -> Space:
    return Space(DISTRIBUTIONS, batch_size="batch_size", learning_rate="lr")


@given(st.integers(0, 2**32 - 1))
def test_whatever_is_suggested_is_in_range_and_comes_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wild = rng.normal(0.0, 100.0, (3, len(DISTRIBUTIONS)))
    for point in space().snapped(wild):
        params = space().params(point)
        for name, value in params.items():
            distribution = DISTRIBUTIONS[name]
            assert type(value).__module__ == "builtins"
            assert distribution.to_external_repr(distribution.to_internal_repr(value)) == value
            if isinstance(distribution, FloatDistribution | IntDistribution):
                assert distribution.low <= value <= distribution.high
        np.testing.assert_allclose(space().coordinates([params])[0], point, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("choices", "ridge"),
    [([64, 16, 32], True), ([16.0, 32.0], True), (["16", "32"], False), ([True, False], False)],
)
def test_categorical_batch_sizes_make_a_ridge_if_they_are_numbers(
    choices: list[Any], ridge: bool
) -> None:
    distributions = {"batch_size": CategoricalDistribution(choices), "lr": DISTRIBUTIONS["lr"]}
    made = Space(distributions, batch_size="batch_size", learning_rate="lr")
    assert (made.ridge is not None) == ridge


def test_round_batch_sizes_keep_the_ends() -> None:
    axis = space().axes[0]
    assert axis.levels is not None
    sizes = [round(math.exp(level)) for level in axis.levels]
    assert sizes[:5] == [16, 24, 32, 48, 64]
    assert sizes[-3:] == [3072, 4096, 5000]


def test_features_are_scaled() -> None:
    rng = np.random.default_rng(0)
    features, owners = space().features(space().uniform(rng, 500))
    assert features.shape == (500, len(owners))
    assert np.abs(features).max() <= 1.0 + 1e-12
    hot = features[:, owners == 6]
    np.testing.assert_allclose((hot**2).sum(1), 0.5)
