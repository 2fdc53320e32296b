"""What the trials of a study say, as lists and arrays: lower is better, inf is a broken run."""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.sampling import attributes
from bs_optuna.science.prior import ScalingPrior


Array = NDArray[np.float64]

# Extra noise, in standard deviations of the values, of what is known at second hand: a pruned
# trial's final value is extrapolated, and a trial may fail for reasons unlike its parameters.
_DOUBT_PRUNED = 0.3
_DOUBT_FAILED = 1.0
_LARGEST = 700.0  # logarithm of a float
# How trials end that had all of their parameters, as a rule.
TOLD = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class History:
    """Trials as a model sees them.

    Attributes:
        numbers: Trial numbers, n of them.
        params: Their parameters.
        values: Objective values, turned so that lower is better; inf where training broke or a
            constraint is violated; (n, k) for k objectives.
        doubts: Extra noise variances on the scale of standardised values, (n,).
        running: Parameters of the trials that are not finished.
    """

    numbers: list[int]
    params: Sequence[Mapping[str, Any]]
    values: Array
    doubts: Array
    running: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.numbers)


def shared_space(trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The parameters that every finished trial has, with the range that the newest one had.

    Completed trials decide; without any, pruned ones; without those, failed ones: a trial that
    broke off early may lack parameters that all the others have.
    """
    trials = list(trials)
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        spaces = [t.distributions for t in trials if t.state == state and t.distributions]
        if spaces:
            return {
                name: distribution
                for name, distribution in sorted(spaces[-1].items())
                if all(is_alike(space.get(name), distribution) for space in spaces)
                and not distribution.single()
            }
    return {}


def whole(trials: Sequence[FrozenTrial], coupled: Collection[str]) -> list[FrozenTrial]:
    """All but those that broke off before they had batch size and learning rate.

    Whether the study has these two the trials with a value show. Before there is one, a single
    failure that lacks one of them has broken off; two such failures mean that the study has no such
    parameter. A failure that is the only one is always left out: a reference is tried once more.

    Args:
        trials: All trials of the study.
        coupled: The names of the two.
    """
    trials = [t for t in trials if t.params or not t.state.is_finished()]
    failed = [t for t in trials if is_failure(t)]
    trials = [t for t in trials if len(failed) != 1 or t is not failed[0]]
    told = [t.params for t in trials if t.state in TOLD]
    names = set(coupled).intersection(*told)
    those = [t for t in trials if t.state != TrialState.FAIL or names <= t.params.keys()]
    return those if told or len(trials) - len(those) < 2 else trials


def is_alike(one: BaseDistribution | None, other: BaseDistribution) -> bool:
    """Whether values of one distribution mean the same in the other, maybe out of its range."""
    if isinstance(one, CategoricalDistribution) or isinstance(other, CategoricalDistribution):
        return one == other
    same_scale = getattr(one, "log", None) == getattr(other, "log", None)
    return isinstance(one, type(other)) and same_scale


def telling(trials: Sequence[FrozenTrial], names: Collection[str]) -> list[FrozenTrial]:
    """The trials that have all of the named parameters, without those that say nothing.

    That is a trial which failed, or was pruned without a word, where another one has run: tried
    again, or told to be a repetition; and a failure that is the only one and may have any reason.
    """
    able = [t for t in trials if all(n in t.params for n in names)]
    completed = {_key(t, names) for t in able if t.state == TrialState.COMPLETE}
    ran = completed | {_key(t, names) for t in able if t.state == TrialState.PRUNED}
    again = {
        t.number
        for t in able
        if (t.state == TrialState.FAIL and _key(t, names) in ran)
        or (_is_silent(t) and _key(t, names) in completed)
    }
    left = [t for t in able if t.number not in again]
    failed = [t for t in left if is_failure(t)]
    return [t for t in left if len(failed) != 1 or t is not failed[0]]


def is_failure(trial: FrozenTrial) -> bool:
    """Whether it failed, and neither of divergence nor for want of memory as far as it says."""
    failed = trial.state == TrialState.FAIL
    return failed and is_feasible(trial) and not tells_of_divergence(trial)


def _is_silent(trial: FrozenTrial) -> bool:
    """Whether it was pruned without saying why, or how it was doing."""
    said = trial.intermediate_values or attributes.PRUNE_REASON in trial.user_attrs
    return trial.state == TrialState.PRUNED and is_feasible(trial) and not said


def read(
    trials: Sequence[FrozenTrial],
    directions: Sequence[StudyDirection],
    diverged: Collection[int] = (),
) -> History:
    """The history of trials, as `telling` gives them.

    Args:
        trials: With all parameters that the model sees.
        directions: One for each objective.
        diverged: Numbers of failed trials that are known to have diverged.
    """
    signs = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions])
    lost = _typical_loss_after(trials, float(signs[0]))
    numbers, params, values, doubts = [], [], [], []
    for t in trials:
        value, doubt = np.full(len(signs), math.inf), 0.0
        feasible = is_feasible(t)
        if t.state == TrialState.COMPLETE:
            value = signs * np.array(t.values) if feasible else value
        elif t.state == TrialState.PRUNED:
            doubt = _DOUBT_PRUNED if feasible else doubt
            whole = feasible and not has_diverged(t)
            if whole and len(signs) == 1 and t.last_step is not None:
                reached = float(signs[0]) * t.intermediate_values[t.last_step]
                value = np.array([reached + lost.get(t.last_step, 0.0)])
        elif t.state == TrialState.FAIL:
            broke = has_diverged(t) or t.number in diverged
            doubt = _DOUBT_PRUNED if broke else _DOUBT_FAILED
        else:
            continue
        numbers.append(t.number)
        params.append(t.params)
        values.append(np.where(np.isfinite(value), value, math.inf))
        doubts.append(doubt**2)
    running = [t.params for t in trials if t.state == TrialState.RUNNING]
    stacked = np.array(values, dtype=float).reshape(len(values), len(signs))
    return History(numbers, params, stacked, np.array(doubts), running)


def has_diverged(trial: FrozenTrial) -> bool:
    """Whether training broke: ended for that, or pruned without a finite value to show for it."""
    if not is_feasible(trial):
        return False
    if trial.state == TrialState.FAIL:
        return tells_of_divergence(trial)
    if trial.state == TrialState.PRUNED:
        reports = trial.intermediate_values.values()
        return tells_of_divergence(trial) or not any(map(math.isfinite, reports))
    return trial.state == TrialState.COMPLETE and not all(map(math.isfinite, trial.values))


def tells_of_divergence(trial: FrozenTrial) -> bool:
    """Whether it says that it ended for that, or has reported a value that is not finite."""
    reason = str(trial.user_attrs.get(attributes.PRUNE_REASON, ""))
    reports = trial.intermediate_values.values()
    return reason.startswith(attributes.DIVERGED) or not all(map(math.isfinite, reports))


def is_complete(trial: FrozenTrial) -> bool:
    """Whether it ended with a finite value, and is one that may be used."""
    ended = trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0])
    return ended and is_feasible(trial)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether it violates no constraint; out of memory is one."""
    return all(c <= 0.0 for c in trial.constraints.values())


def scalarised(values: Array, rng: np.random.Generator) -> Array:
    """One value of several objectives (n, k), for a random trade-off between them (n,).

    ParEGO (Knowles 2006): the augmented Chebyshev norm of the normalised objectives with weights
    drawn uniformly from the simplex; over the trials it visits the whole Pareto front.
    """
    if values.shape[1] == 1:
        return values[:, 0]
    weights = rng.dirichlet(np.ones(values.shape[1]))
    usable = np.isfinite(values).all(1)
    if not usable.any():
        return np.full(len(values), math.inf)
    low, high = values[usable].min(0), values[usable].max(0)
    weighted = weights * (values - low) / np.where(high > low, high - low, 1.0)
    weighted[~usable] = math.inf
    norm: Array = weighted.max(1) + 0.05 * weighted.sum(1)
    return norm


def informed(prior: ScalingPrior, trials: Iterable[FrozenTrial]) -> ScalingPrior:
    """The prior after the gradient noise scales that trials have measured."""
    readings = [t.user_attrs.get(attributes.NOISE_SCALE) for t in trials]
    usable = [r for r in readings if isinstance(r, int | float) and 0 < r < math.inf]
    logs = [math.log(r) for r in usable]  # of an int of any size
    return prior.with_noise_scale(math.exp(min(np.median(logs), _LARGEST))) if logs else prior


def _typical_loss_after(trials: Iterable[FrozenTrial], sign: float) -> dict[int, float]:
    """Median change of the value from each reported step to the end, among completed trials."""
    changes: dict[int, list[float]] = {}
    for t in trials:
        if t.state == TrialState.COMPLETE and t.values is not None:
            for step, reported in t.intermediate_values.items():
                changes.setdefault(step, []).append(sign * (t.values[0] - reported))
    medians = {step: float(np.median(c)) for step, c in changes.items()}
    return {step: change for step, change in medians.items() if math.isfinite(change)}


def _key(trial: FrozenTrial, names: Collection[str]) -> tuple[float, ...]:
    # As numbers: a choice may be a list, which has no hash.
    sorted_names = sorted(names)
    return tuple(trial.distributions[n].to_internal_repr(trial.params[n]) for n in sorted_names)
