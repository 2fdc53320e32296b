"""The model of a study with more trials than it can hold."""

from __future__ import annotations

import math

import numpy as np
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from bs_optuna.sampling.acquisition import suggest
from bs_optuna.sampling.fit import QUICK
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.history import History
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space
from bs_optuna.science.prior import ScalingPrior


SPACE = Space(
    {
        "batch_size": IntDistribution(8, 1024, log=True),
        "lr": FloatDistribution(1e-5, 0.1, log=True),
    },
    Names(),
)


def fit_of(count: int) -> Fit:
    rng = np.random.default_rng(0)
    tried = [SPACE.params(point) for point in SPACE.uniform(rng, count)]
    off = [math.log(p["lr"] / 1e-3) - 0.5 * math.log(p["batch_size"] / 64) for p in tried]
    values = np.log1p(np.square(off))
    seen = History(list(range(count)), tried, values[:, None], np.zeros(count), [])
    return Fit(SPACE, ScalingPrior.for_optimizer("adamw"), seen, rng, effort=QUICK)


def test_of_many_trials_the_best_half_and_some_others_are_kept() -> None:
    fit = fit_of(900)
    assert len(fit.tried) == len(fit.numbers) == len(fit.posterior.seen.values) == 500
    assert len(fit.taken) == 900
    every = fit.taken[:, 1] - math.log(1e-3) - 0.5 * (fit.taken[:, 0] - math.log(64))
    best = np.argsort(np.abs(every))
    assert set(best[:250]) <= set(fit.numbers)
    assert len(set(best[250:]) & set(fit.numbers)) == 250
    np.testing.assert_array_equal(fit.tried, fit.taken[fit.numbers])
    point = suggest(fit, np.random.default_rng(1), {}, {})
    assert abs(point[1] - math.log(1e-3) - 0.5 * (point[0] - math.log(64))) < 1.0


def test_of_few_trials_all_are_kept() -> None:
    fit = fit_of(40)
    assert fit.numbers == list(range(40))
    np.testing.assert_array_equal(fit.tried, fit.taken)
