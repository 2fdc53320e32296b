"""What one fitted study says about a setting: the best learning rate there, and what to expect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from bs_optuna.sampling import history
from bs_optuna.sampling.cliff import Cliff
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.recommendation import Interval
from bs_optuna.sampling.recommendation import Recommendation
from bs_optuna.sampling.surrogate import RIDGE_UNIT


Array = NDArray[np.float64]

_DRAWS = 20  # functions for each of the hyper-parameter samples
_GRID = 121
# Trials, the best by posterior mean, that any other has next to no chance of being better than.
_RIVALS = 64
# The best learning rate may lie outside the searched range, by this factor.
_BEYOND = 30.0
# Chance of divergence that a recommended learning rate may have. A run that breaks is lost, one at
# half the best learning rate hardly worse.
_ACCEPTED_RISK = 0.1


class Answer:
    """One fitted study, ready to be asked.

    Args:
        fit: In a space with a ridge.
        seen: The trials that it was fitted to.
        trials: The same, and others of the study.
        seed: Of the random numbers, which are the same for every question.
        sign: -1 where the study maximises, else 1.
        cliff: Where training diverges; None if it never has.
    """

    def __init__(
        self,
        fit: Fit,
        seen: history.History,
        trials: Sequence[FrozenTrial],
        seed: int,
        sign: float,
        cliff: Cliff | None,
    ) -> None:
        self._fit, self._seen, self._seed, self._sign = fit, seen, seed, sign
        self._cliff = cliff
        self._params = {t.number: t.params for t in trials}
        self._completed = {t.number for t in trials if history.is_complete(t)}
        assert fit.space.ridge is not None
        self._b, self._lr = fit.space.ridge
        assert fit.anchor is not None
        self._momentum_exponent = fit.anchor.momentum_exponent

    def at(self, batch_size: int | None) -> Recommendation:
        """The best trial by posterior mean; with another batch size where one is given."""
        # Anew for each, so that no answer depends on what else was asked for.
        self._rng = np.random.default_rng([self._seed, 1])
        best = self._best
        params = dict(self._params[self._fit.numbers[best]])
        point = self._fit.tried[best].copy()
        if batch_size is not None:
            return self._at(batch_size, params, point)
        rivals, draws = self._rivals
        own = int(np.searchsorted(rivals, best))
        chance = float((draws.argmin(1) == own).mean())
        _, (low, high) = self._best_learning_rate(point)
        tried = math.exp(point[self._lr])
        # Where all is alike the best trial is anywhere, and so may be the best learning rate.
        interval = (min(low, tried), max(high, tried))
        return self._answer(params, self._fit.numbers[best], interval, draws[:, own], chance)

    @cached_property
    def _best(self) -> int:
        """Index of the best trial by posterior mean, of those that ended."""
        # A pruned trial has taught the model something, but nobody has seen it end.
        ended = np.array([number in self._completed for number in self._fit.numbers])
        return int(np.where(ended, self._expected, math.inf).argmin())

    @cached_property
    def _expected(self) -> Array:
        """Posterior mean of each trial."""
        tried = self._fit.points(self._fit.tried)
        expected: Array = self._fit.posterior.predict(tried)[0].mean(0)
        return expected

    @cached_property
    def _rivals(self) -> tuple[NDArray[np.int_], Array]:
        """Indices (R,) of the trials that may be the best, and functions drawn there (S', R)."""
        rivals = np.union1d(np.argsort(self._expected)[:_RIVALS], self._best)
        points = self._fit.points(self._fit.tried[rivals])
        rng = np.random.default_rng([self._seed, 2])
        return rivals, self._fit.posterior.draws(points, rng, _DRAWS)

    def _at(self, batch_size: int, params: dict[str, Any], point: Array) -> Recommendation:
        """With a batch size that may be untried, all but the learning rate as at a point."""
        point[self._b] = math.log(batch_size)
        optimum, interval = self._best_learning_rate(point)
        point[self._lr] = math.log(optimum)
        params[self._fit.space.axes[self._b].name] = batch_size
        params[self._fit.space.axes[self._lr].name] = optimum
        return self._answer(params, None, interval, self._draws(point[None])[:, 0], None)

    def _answer(
        self,
        params: dict[str, Any],
        number: int | None,
        interval: Interval,
        draws: Array,
        chance: float | None,
    ) -> Recommendation:
        batch_size, learning_rate = (
            params[self._fit.space.axes[j].name] for j in (self._b, self._lr)
        )
        theta = self._fit.model.theta(self._fit.walkers)
        values = self._sign * self._fit.scale.restored(draws)
        mean = float(self._sign * self._fit.scale.restored(draws.mean()))
        critical = np.exp(theta[:, 1])
        return Recommendation(
            batch_size=int(batch_size),
            learning_rate=float(learning_rate),
            learning_rate_interval=interval,
            momentum=self._momentum(params),
            momentum_exponent=self._momentum_exponent,
            params=params,
            trial_number=number,
            value=mean,
            value_interval=_interval(values),
            probability_best=chance,
            exponent=float(np.median(theta[:, 0])),
            exponent_interval=_interval(theta[:, 0]),
            critical_batch_size=float(np.median(critical)),
            critical_batch_size_interval=_interval(critical),
            trials=len(self._seen) + (self._cliff.diverged if self._cliff else 0),
        )

    def _best_learning_rate(self, point: Array) -> tuple[float, Interval]:
        """Best learning rate with everything else as at a point, and its interval.

        Each function drawn has its lowest point somewhere. Far from the data that is chance, so
        each counts by a belief about where that point lies: as far from the ridge as the trials do
        that may be the best, within a factor of five, one standard deviation. Where runs have
        diverged, the lowest point is one below the cliff: no smooth function can follow that, and a
        diverged run tells nothing else about the function. The learning rate keeps a distance.
        """
        low, high = self._fit.space.axes[self._lr].bounds
        down, up = self._beyond(point)
        grid = np.linspace(low + down, high + up, _GRID)
        points = np.repeat(point[None], len(grid), axis=0)
        points[:, self._lr] = grid
        drawn, safe = self._draws(points), math.inf
        if self._cliff is not None:
            limits = self._cliff.draws(self._fit.space, point, self._rng, len(drawn))
            drawn = np.where(grid < limits[:, None], drawn, math.inf)
            safe = float(np.exp(np.quantile(limits, _ACCEPTED_RISK)))
        lowest = drawn.argmin(1)
        # Anywhere in its cell.
        found = grid[lowest] + (grid[1] - grid[0]) * self._rng.uniform(-0.5, 0.5, len(lowest))
        off = np.repeat(self._off_the_best(points), _DRAWS, axis=0)
        off = off[np.arange(len(lowest)), lowest]
        weights = np.exp(-0.5 * (off**2 - (off**2).min()))
        low, middle, high = np.exp(
            np.quantile(found, [0.05, 0.5, 0.95], weights=weights, method="inverted_cdf")
        )
        return float(max(min(middle, safe), low)), (float(low), float(high))

    def _beyond(self, point: Array) -> tuple[float, float]:
        """How far below and above the range the best rate at a point may lie, as ln lr.

        By a fixed factor, and at a batch size outside its range by what the ridge changes on the
        way there.
        """
        low, high = self._fit.space.axes[self._b].bounds
        near = point.copy()
        near[self._b] = min(max(near[self._b], low), high)
        posterior = self._fit.posterior
        far = self._fit.points(np.stack([near, point]))
        change = -np.diff(posterior.model.distance(posterior.theta, far))[:, 0] * RIDGE_UNIT
        return (
            min(float(change.min()), 0.0) - math.log(_BEYOND),
            max(float(change.max()), 0.0) + math.log(_BEYOND),
        )

    def _off_the_best(self, points: Array) -> Array:
        """How much further from the ridge points (N, P) lie than the best trials do, (S, N).

        In factors of five, for each of the hyper-parameter samples.
        """
        posterior, (rivals, draws) = self._fit.posterior, self._rivals
        chances = np.bincount(draws.argmin(1), minlength=len(rivals)) / len(draws)
        here, there = (
            posterior.model.distance(posterior.theta, self._fit.points(p))
            for p in (points, self._fit.tried[rivals])
        )
        return here - (there @ chances)[:, None]

    def _momentum(self, params: Mapping[str, Any]) -> float | None:
        if self._fit.space.momentum is None:
            return None
        axis = self._fit.space.axes[self._fit.space.momentum]
        return 1.0 - math.exp(axis.coordinate(params[axis.name]))

    def _draws(self, coordinates: Array) -> Array:
        return self._fit.posterior.draws(self._fit.points(coordinates), self._rng, _DRAWS)


def _interval(draws: Array) -> Interval:
    low, high = np.quantile(draws, [0.05, 0.95])
    return float(low), float(high)
