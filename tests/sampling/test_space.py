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

from bs_optuna.sampling.axis import Axis
from bs_optuna.sampling.axis import Warp
from bs_optuna.sampling.space import Names
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


def made_of(distributions: dict[str, BaseDistribution]) -> Space:
    return Space(distributions, Names())


def space() -> Space:
    return made_of(DISTRIBUTIONS)


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
    made = made_of(distributions)
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


@pytest.mark.parametrize(
    ("name", "distribution", "value", "coordinate"),
    [
        ("momentum", FloatDistribution(0.5, 0.99), 0.9, math.log(0.1)),
        ("momentum", FloatDistribution(0.5, 0.99, step=0.01), 0.9, math.log(0.1)),
        ("momentum", CategoricalDistribution([0.9, 0.0, 0.99]), 0.9, math.log(0.1)),
        ("momentum", IntDistribution(0, 1), 0, 0.0),
        ("one_minus_momentum", FloatDistribution(0.01, 0.5, log=True), 0.1, math.log(0.1)),
        ("one_minus_momentum", FloatDistribution(0.01, 0.5), 0.1, math.log(0.1)),
    ],
)
def test_momentum_is_seen_by_how_far_it_is_from_one(
    name: str, distribution: BaseDistribution, value: float, coordinate: float
) -> None:
    made = made_of({name: distribution})
    assert made.momentum == 0
    assert made.coordinates([{name: value}])[0, 0] == pytest.approx(coordinate)
    assert made.params(np.array([coordinate]))[name] == pytest.approx(value)


@pytest.mark.parametrize("name", ["slowness", "one_minus_slowness"])
def test_a_momentum_may_be_named_by_either(name: str) -> None:
    distribution = FloatDistribution(0.01, 0.5, log=True)
    made = Space({"one_minus_slowness": distribution}, Names(momentum=name))
    assert made.momentum == 0
    assert made.coordinates([{"one_minus_slowness": 0.1}])[0, 0] == pytest.approx(math.log(0.1))


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(0.5, 1.5),
        FloatDistribution(-0.5, 0.5),
        CategoricalDistribution([0.9, 1.0]),
        CategoricalDistribution([-0.1, 0.9]),
        CategoricalDistribution(["low", "high"]),
    ],
)
def test_what_cannot_be_a_momentum_is_an_ordinary_parameter(distribution: BaseDistribution) -> None:
    assert made_of({"momentum": distribution}).momentum is None


@pytest.mark.parametrize(
    ("name", "distribution", "lowest", "highest"),
    [
        ("momentum", FloatDistribution(0.0, 1.0), 0.0, 0.999),
        ("momentum", FloatDistribution(0.9, 1.0), 0.9, 0.9999),
        ("momentum", FloatDistribution(0.9995, 0.9999), 0.9995, 0.9999),
        ("momentum", FloatDistribution(0.0, 1.0, step=0.1), 0.0, 0.9),
        ("momentum", FloatDistribution(0.0, 0.95, step=0.05), 0.0, 0.95),
        ("momentum", IntDistribution(0, 1), 0, 0),
        ("one_minus_momentum", FloatDistribution(0.0, 1.0, step=0.1), 0.1, 1.0),
        ("lr", FloatDistribution(0.0, 0.1, step=0.02), 0.02, 0.1),
        ("lr", FloatDistribution(0.01, 0.1, step=0.03), 0.01, 0.1),
    ],
)
def test_what_has_no_logarithm_is_never_suggested(
    name: str, distribution: BaseDistribution, lowest: float, highest: float
) -> None:
    axis = made_of({name: distribution}).axes[0]
    found = [axis.value(coordinate) for coordinate in np.linspace(-100.0, 1.0, 2001)]
    assert min(found) == pytest.approx(lowest)
    assert max(found) == pytest.approx(highest)
    for value in found:  # where the model looks is where the value is
        here = axis.coordinate(value)
        assert axis.snapped(np.array([here]))[0] == pytest.approx(here, abs=1e-9)
    drawn = axis.uniform(np.random.default_rng(0), 100)
    assert np.abs(axis.scaled(drawn)).max() <= 1.0 + 1e-9


@pytest.mark.parametrize(
    ("distribution", "ratio"),
    [
        *((FloatDistribution(low, 0.1, log=True), "log") for low in (1e-6, 5e-5, 1e-4, 3e-4, 1e-3)),
        (FloatDistribution(0.0, 0.1), "log"),
        (FloatDistribution(0.0, 1.0), "log of 1 - v"),
        (FloatDistribution(0.8, 0.999), "log of 1 - v"),
        (FloatDistribution(-1.0, 3.0), "none"),
    ],
)
def test_only_the_ends_of_a_range_may_recur(distribution: FloatDistribution, ratio: Warp) -> None:
    axis = Axis.of("x", distribution, ratio=ratio)
    low, high = axis.bounds
    for end in axis.bounds:
        assert axis.may_recur(axis.value(end))
    assert not axis.may_recur(axis.value(0.3 * low + 0.7 * high))
    if distribution.log:
        assert axis.value(low) == distribution.low  # and not exp(ln(low))
