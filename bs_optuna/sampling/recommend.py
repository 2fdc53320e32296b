"""recommend: what the evidence of a study supports, with what is still uncertain about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.study import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.errors import StudyError
from bs_optuna.sampling import history
from bs_optuna.sampling.blas import one_thread
from bs_optuna.sampling.cliff import Cliff
from bs_optuna.sampling.fit import THOROUGH
from bs_optuna.sampling.fit import Fit
from bs_optuna.sampling.recommendation import Interval
from bs_optuna.sampling.recommendation import Recommendation
from bs_optuna.sampling.sampler import CoupledSampler
from bs_optuna.sampling.space import Names
from bs_optuna.sampling.space import Space
from bs_optuna.science.prior import ScalingPrior


Array = NDArray[np.float64]

MINIMUM_TRIALS = 3
_DRAWS = 40  # functions for each of the hyper-parameter samples
_GRID = 121
# The best learning rate may lie outside the searched range, by this factor at most.
_BEYOND = 30.0
# Chance of divergence that a recommended learning rate may have. A run that breaks is lost, one at
# half the best learning rate hardly worse.
_ACCEPTED_RISK = 0.1


def recommend(
    study: Study,
    *,
    batch_size: int | None = None,
    prior: str | ScalingPrior | None = None,
    batch_size_name: str = "batch_size",
    learning_rate_name: str = "lr",
    momentum_name: str = "momentum",
    weight_decay_name: str = "weight_decay",
    seed: int = 0,
) -> Recommendation:
    """The setting that a study supports, by posterior mean instead of the luckiest trial.

    Args:
        study: Any Optuna study with one objective and the two parameters, whoever sampled it.
        batch_size: Ask for the learning rate of this batch size, tried or not; the other
            parameters are those of the best trial. None asks for the best setting tried.
        prior: Optimizer or belief; None takes that of the study's CoupledSampler, if it has one.
        batch_size_name: Name of the batch size in the study.
        learning_rate_name: Name of the learning rate in the study.
        momentum_name: Name of the momentum in the study, if it has one; as in `CoupledSampler`.
        weight_decay_name: Name of the weight decay, likewise.
        seed: Of the random numbers behind the averages.

    Raises:
        StudyError: The study lacks the parameters, has too few finished trials or several
            objectives, or the batch size is not positive.
    """
    if len(study.directions) > 1:
        raise StudyError(
            f"Study {study.study_name!r} has {len(study.directions)} objectives; "
            "recommend answers for one. Choose among study.best_trials instead."
        )
    if batch_size is not None and batch_size < 1:
        raise StudyError(f"batch_size is {batch_size}; ask for 1 or more.")
    names = (batch_size_name, learning_rate_name)
    trials = _usable(study, names)
    called = Names(
        batch_size=batch_size_name,
        learning_rate=learning_rate_name,
        momentum=momentum_name,
        weight_decay=weight_decay_name,
    )
    space = Space(_space(trials, names), called)
    if space.ridge is None:
        raise StudyError(
            f"Parameters {names[0]!r} and {names[1]!r} are not both positive numbers; "
            "name two that are."
        )
    belief = _prior(study, prior)
    cliff = Cliff.seen_in(trials, space, adds_up=belief.momentum_exponent > 0)
    trials = [t for t in trials if not history.has_diverged(t)]
    seen = history.read(trials, study.directions, [axis.name for axis in space.axes])
    rng = np.random.default_rng(seed)
    belief = history.informed(belief, trials)
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    with one_thread():
        fit = Fit(space, belief, seen, rng, effort=THOROUGH)
        return _Answer(fit, seen, trials, rng, sign, cliff).at(batch_size)


class _Answer:
    """One fitted study, ready to be asked."""

    def __init__(
        self,
        fit: Fit,
        seen: history.History,
        trials: Sequence[FrozenTrial],
        rng: np.random.Generator,
        sign: float,
        cliff: Cliff | None,
    ) -> None:
        self._fit, self._seen, self._rng, self._sign = fit, seen, rng, sign
        self._cliff = cliff
        self._params = {t.number: t.params for t in trials}
        self._completed = {t.number for t in trials if _is_complete(t)}
        assert fit.space.ridge is not None
        self._b, self._lr = fit.space.ridge
        assert fit.anchor is not None
        self._momentum_exponent = fit.anchor.momentum_exponent

    def at(self, batch_size: int | None) -> Recommendation:
        draws = self._draws(self._fit.tried)
        # A pruned trial has taught the model something, but nobody has seen it end.
        finite = np.array([number in self._completed for number in self._seen.numbers])
        best = int(np.where(finite, draws.mean(0), math.inf).argmin())
        number: int | None = self._seen.numbers[best]
        params = dict(self._params[self._seen.numbers[best]])
        point = self._fit.tried[best].copy()
        chance: float | None = float((draws.argmin(1) == best).mean())
        if batch_size is not None:
            point[self._b] = math.log(batch_size)
        optimum, interval = self._best_learning_rate(point)
        if batch_size is not None:
            number, chance = None, None
            point[self._lr] = math.log(optimum)
            params[self._fit.space.axes[self._b].name] = batch_size
            params[self._fit.space.axes[self._lr].name] = optimum
            draws = self._draws(point[None])
            best = 0
        return self._answer(params, number, interval, draws[:, best], chance)

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

        Each function drawn has its lowest point somewhere. Far beyond the data that is chance, so
        each counts by the prior of where the best learning rate lies: within a factor of five of
        the ridge, one standard deviation, as for the sampler. Where runs have diverged, the lowest
        point is one below the cliff: no smooth function can follow that, and a diverged run tells
        nothing else about the function. The learning rate keeps a distance from it.
        """
        low, high = self._fit.space.axes[self._lr].bounds
        grid = np.linspace(low - math.log(_BEYOND), high + math.log(_BEYOND), _GRID)
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
        posterior = self._fit.posterior
        z = posterior.model.distance(posterior.theta, self._fit.points(points))
        sample = np.repeat(np.arange(len(z)), _DRAWS)
        weights = np.exp(-0.5 * z[sample, lowest] ** 2)
        low, middle, high = np.exp(
            np.quantile(found, [0.05, 0.5, 0.95], weights=weights, method="inverted_cdf")
        )
        return float(max(min(middle, safe), low)), (float(low), float(high))

    def _momentum(self, params: Mapping[str, Any]) -> float | None:
        if self._fit.space.momentum is None:
            return None
        axis = self._fit.space.axes[self._fit.space.momentum]
        return 1.0 - math.exp(axis.coordinate(params[axis.name]))

    def _draws(self, coordinates: Array) -> Array:
        return self._fit.posterior.draws(self._fit.points(coordinates), self._rng, _DRAWS)


def _usable(study: Study, names: tuple[str, str]) -> list[FrozenTrial]:
    """Trials with both parameters, enough of them completed.

    Raises:
        StudyError: There are too few, or none.
    """
    trials = study.get_trials(deepcopy=False)
    completed = [t for t in trials if t.state == TrialState.COMPLETE]
    for name in names:
        if completed and not any(name in t.params for t in completed):
            known = ", ".join(sorted({n for t in completed for n in t.params})) or "none"
            raise StudyError(
                f"Study {study.study_name!r} has no parameter {name!r}; it has {known}. "
                "Name them with batch_size_name and learning_rate_name."
            )
    usable = [t for t in trials if all(name in t.params for name in names)]
    finished = sum(map(_is_complete, usable))
    if finished < MINIMUM_TRIALS:
        raise StudyError(
            f"Study {study.study_name!r} has {finished} completed trials; "
            f"a recommendation takes {MINIMUM_TRIALS}. Run more."
        )
    return usable


def _is_complete(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0])


def _space(trials: Sequence[FrozenTrial], names: tuple[str, str]) -> dict[str, BaseDistribution]:
    """The shared space; a range of the two that changed is replaced by what was tried."""
    space = dict(history.shared_space(trials))
    for name in names:
        if name not in space:
            tried = [t.params[name] for t in trials]
            if not all(isinstance(v, int | float) and v > 0 for v in tried):
                continue
            if all(isinstance(v, int) for v in tried):
                space[name] = IntDistribution(min(tried), max(tried), log=True)
            else:
                space[name] = FloatDistribution(min(tried), max(tried), log=True)
    return space


def _prior(study: Study, prior: str | ScalingPrior | None) -> ScalingPrior:
    if isinstance(prior, ScalingPrior):
        return prior
    if prior is None and isinstance(study.sampler, CoupledSampler):
        return study.sampler.prior
    return ScalingPrior.for_optimizer(prior or "unknown")


def _interval(draws: Array) -> Interval:
    low, high = np.quantile(draws, [0.05, 0.95])
    return float(low), float(high)
