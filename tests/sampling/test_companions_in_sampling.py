"""CoupledSampler where momentum and weight decay are tuned too: both move the best lr."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from ridge_study import params
from ridge_study import run

from bs_optuna.sampling import CoupledSampler
from bs_optuna.sampling import recommend
from bs_optuna.sampling.fit import QUICK
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.history import History
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space
from bs_optuna.science.prior import ScalingPrior


def heavy_ball(trial: optuna.Trial) -> float:
    """Best where lr/(1 - momentum) is 0.03, whatever the momentum."""
    trial.suggest_int("batch_size", 64, 256, log=True)
    slow = 1.0 - trial.suggest_float("momentum", 0.0, 0.99)
    off = math.log(trial.suggest_float("lr", 1e-4, 10.0, log=True) / slow / 0.03)
    return min(off**2, 20.0) + 0.1 * math.log(slow / 0.05) ** 2


def one_minus(trial: optuna.Trial) -> float:
    """The same by another name."""
    trial.suggest_int("batch_size", 64, 256, log=True)
    slow = trial.suggest_float("one_minus_momentum", 0.01, 1.0, log=True)
    off = math.log(trial.suggest_float("lr", 1e-4, 10.0, log=True) / slow / 0.03)
    return min(off**2, 20.0) + 0.1 * math.log(slow / 0.05) ** 2


def test_a_reference_goes_with_its_momentum() -> None:
    sampler = CoupledSampler(prior="sgd", reference=(128, 0.02), seed=0)
    (first,) = params(run(heavy_ball, 1, sampler=sampler))
    assert first == {
        "batch_size": 128,
        "momentum": pytest.approx(0.9),
        "lr": pytest.approx(0.02),
    }


@pytest.mark.parametrize("order", ["batch_size momentum lr", "lr momentum batch_size"])
def test_an_enqueued_momentum_gets_its_own_learning_rate(order: str) -> None:
    """Whichever is asked for first."""
    ask: dict[str, Callable[[optuna.Trial], float]] = {
        "batch_size": lambda trial: trial.suggest_int("batch_size", 16, 1024, log=True),
        "momentum": lambda trial: trial.suggest_float("momentum", 0.0, 0.99),
        "lr": lambda trial: trial.suggest_float("lr", 1e-4, 10.0, log=True),
    }
    found = {}
    for momentum in (0.0, 0.9):
        sampler = CoupledSampler(prior="sgd", reference=(128, 0.1), seed=0)
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial({"momentum": momentum})
        trial = study.ask()
        for name in order.split():
            ask[name](trial)
        assert trial.params["momentum"] == momentum
        found[momentum] = trial.params["lr"]
    assert found == {0.0: pytest.approx(1.0), 0.9: pytest.approx(0.1)}


def test_learning_rate_follows_the_momentum_of_sgd() -> None:
    def best(prior: ScalingPrior) -> float:
        samplers = [CoupledSampler(prior=prior, seed=seed) for seed in range(8)]
        return float(np.mean([run(heavy_ball, 10, sampler=s).best_value for s in samplers]))

    sgd = ScalingPrior.for_optimizer("sgd")
    assert best(sgd) < 0.7 * best(replace(sgd, momentum_exponent=0.0))


def test_momentum_and_its_distance_from_one_are_the_same_parameter() -> None:
    sgd, same = (CoupledSampler(prior="sgd", seed=0) for _ in range(2))
    for one, other in zip(
        params(run(heavy_ball, 6, sampler=sgd)),
        params(run(one_minus, 6, sampler=same)),
        strict=True,
    ):
        assert 1.0 - one["momentum"] == pytest.approx(other["one_minus_momentum"])  # type: ignore[operator]
        assert one["lr"] == pytest.approx(other["lr"])


@given(st.floats(-4.0, 0.0), st.floats(-4.0, 4.0))
@settings(max_examples=20, deadline=None)
def test_weight_decay_is_seen_as_samples_until_weights_are_forgotten(
    faster: float, larger: float
) -> None:
    """B / (lr * decay) is the same, so the model sees the same weight decay."""
    space = Space(
        {
            "batch_size": IntDistribution(1, 10**6, log=True),
            "lr": FloatDistribution(1e-6, 1.0, log=True),
            "weight_decay": FloatDistribution(1e-9, 1e3, log=True),
        },
        Names(),
    )
    tried = [{"batch_size": 64, "lr": 1e-2 * k, "weight_decay": 1e-2} for k in (0.3, 1.0, 3.0)]
    seen = History([0, 1, 2], tried, np.array([[1.0], [0.0], [1.0]]), np.zeros(3), [])
    rng = np.random.default_rng(0)
    fit = Fit(space, ScalingPrior.for_optimizer("adamw"), seen, rng, effort=QUICK)
    here = np.array([[math.log(64), math.log(1e-2), math.log(1e-2)]])
    there = here + np.array([larger, faster, larger - faster])
    np.testing.assert_allclose(fit.points(here).other, fit.points(there).other, atol=1e-9)
    stronger = here + np.array([0.0, 0.0, 1.0])
    assert not np.allclose(fit.points(here).other, fit.points(stronger).other)


@pytest.mark.parametrize("high", [1.2e-4, 1e-3, 1.0])
def test_a_narrow_range_of_weight_decay_is_not_blown_up(high: float) -> None:
    """Near the ridge the feature is of the size of all others, about from -1 to 1."""
    space = Space(
        {
            "batch_size": IntDistribution(16, 4096, log=True),
            "lr": FloatDistribution(1e-6, 1.0, log=True),
            "weight_decay": FloatDistribution(1e-4, high, log=True),
        },
        Names(),
    )
    tried = [{"batch_size": 64, "lr": 1e-2 * k, "weight_decay": 1e-4} for k in (0.3, 1.0, 3.0)]
    seen = History([0, 1, 2], tried, np.array([[1.0], [0.0], [1.0]]), np.zeros(3), [])
    rng = np.random.default_rng(0)
    fit = Fit(space, ScalingPrior.for_optimizer("adamw"), seen, rng, effort=QUICK)
    assert fit.anchor is not None
    points = space.uniform(rng, 1000)
    points[:, 1] = fit.anchor.best(points[:, 0]) + math.log(5.0) * rng.uniform(-1.0, 1.0, 1000)
    features = np.abs(fit.points(points).other)
    assert 0.5 < features.max() < 2.0


def test_what_is_transferred_goes_with_the_momentum_that_it_was_found_at() -> None:
    advice = recommend(run(heavy_ball, 25, sampler=CoupledSampler(prior="sgd", seed=0)))
    assert advice.momentum == pytest.approx(advice.params["momentum"])
    prior = ScalingPrior.from_evidence(advice)
    assert prior.reference_momentum == advice.momentum
    assert prior.momentum_exponent == 1.0
    assert prior.learning_rate == pytest.approx(0.03 * (1.0 - advice.momentum), rel=0.5)  # type: ignore[operator]
