"""The point to try next: expected improvement, averaged over hyper-parameters, near the ridge."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx
from scipy.special import ndtr

from bs_optuna.sampling.cost import log_penalty
from bs_optuna.sampling.fit import Fit
from bs_optuna.science.ridge import ridge


Array = NDArray[np.float64]

# The belief about the ridge weighs on the choice like this many trials, as many as the start took;
# it fades as 1/n (piBO, Hvarfner 2022, arXiv 2204.11051) and never forbids anything.
_BELIEF_TRIALS = 3.0
# However good the anchor, a learning rate within a factor of five is hardly held against a point.
_BELIEF_SD = math.log(5.0)
# Starting points of the search, tried ones included, and how often the best are varied again.
_CANDIDATES = 256
_PARENTS = 6
_ROUNDS = 4
_STEP = 0.3  # of a range, the largest of the steps; the smallest is a thirtieth of it


def suggest(
    fit: Fit, rng: np.random.Generator, fixed: Mapping[int, float], costs: Mapping[int, float]
) -> Array:
    """The point (P,) to try next.

    Args:
        fit: The model of the study.
        rng: Random numbers.
        fixed: Coordinates that are given already, by the number of their axis.
        costs: Cost by trial number, where improvement is to be had per cost.
    """
    known = fit.posterior.predict(fit.points(fit.tried))[0]
    parents = fit.tried[np.argsort(known.mean(0))[:_PARENTS]]
    count = max(int(_CANDIDATES * fit.share), _CANDIDATES // 4)
    fresh = np.concatenate([fit.space.uniform(rng, count), _varied(fit, parents, rng, count)])
    candidates = _allowed(fit, fresh, fixed)

    def score(points: Array) -> Array:
        if fixed:  # somebody asks for this setting: the rest is what is expected to be best there
            expected: Array = fit.posterior.predict(fit.points(points))[0].mean(0)
            return -expected
        return _improvement(fit, points, known.min(1), costs)

    scores = score(candidates)
    for _ in range(_ROUNDS):
        parents = candidates[np.argsort(-scores)[:_PARENTS]]
        fresh = _allowed(fit, _varied(fit, parents, rng, count // 2, _STEP), fixed)
        candidates = np.concatenate([candidates, fresh])
        scores = np.concatenate([scores, score(fresh)])
    best: Array = candidates[scores.argmax()]
    return best


def log_expected_improvement(z: Array, sd: Array) -> Array:
    """The logarithm of E[max(improvement, 0)], exact far into the tail (Ament, arXiv 2310.20708).

    Args:
        z: Distance by which the mean is better than the incumbent, in standard deviations.
        sd: Standard deviation.
    """
    tail = z <= -1.0
    near, far = z[~tail], z[tail]  # each formula takes as long as a third of a prediction
    logs = np.empty(z.shape)
    density = np.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)
    logs[~tail] = np.log(density + near * ndtr(near))
    mills = np.maximum(1.0 + math.sqrt(math.pi / 2) * far * erfcx(-far / math.sqrt(2)), 1e-300)
    log_mills = np.where(far < -1e3, -2.0 * np.log(-far), np.log(mills))
    logs[tail] = -0.5 * far * far - 0.5 * math.log(2 * math.pi) + log_mills
    return logs + np.log(sd)


def _improvement(
    fit: Fit, candidates: Array, incumbent: Array, costs: Mapping[int, float]
) -> Array:
    """Log expected improvement (N,) on the incumbent (S,), per cost and near the ridge."""
    mean, sd = fit.posterior.predict(fit.points(candidates))
    # A model of many parameters is too sure of itself after few trials; as in the confidence
    # bounds of GP-UCB (Srinivas 2010), exploration grows with the root of their number.
    sd = sd * math.sqrt(max(1.0, len(fit.space.axes) / 2.0))
    expected = log_expected_improvement((incumbent[:, None] - mean) / sd, sd)
    score: Array = np.logaddexp.reduce(expected, axis=0)
    score -= log_penalty(fit.space, fit.tried, fit.numbers, costs, candidates)
    if fit.anchor is not None and fit.space.ridge is not None:
        b, lr = fit.space.ridge
        best = fit.anchor.best(candidates[:, b], fit.momentum_shift(candidates))
        off = candidates[:, lr] - best
        sd_off = max(fit.anchor.log_learning_rate_sd, _BELIEF_SD)
        score -= _BELIEF_TRIALS / len(fit.tried) * 0.5 * (off / sd_off) ** 2
    return score


def _allowed(fit: Fit, candidates: Array, fixed: Mapping[int, float]) -> Array:
    """Candidates that may be suggested, without those tried or running already."""
    candidates = fit.space.snapped(candidates)
    for j, coordinate in fixed.items():
        candidates[:, j] = coordinate
    same = np.ones((len(candidates), len(fit.taken)), dtype=bool)
    for ours, theirs in zip(candidates.T, fit.taken.T, strict=True):
        same &= np.abs(ours[:, None] - theirs) < 1e-9
    new: NDArray[np.bool_] = np.logical_not(same.any(1))
    return candidates[new] if new.any() else candidates


def _varied(
    fit: Fit, parents: Array, rng: np.random.Generator, count: int, width: float = 1.0
) -> Array:
    """Variations of parents (count, P): half of them steps of many sizes, half a few leaps.

    A change of batch size or momentum takes the learning rate along the ridge.
    """
    axes = fit.space.axes
    chosen = parents[rng.integers(len(parents), size=count)]
    span = np.array([axis.bounds[1] - axis.bounds[0] for axis in axes])
    size = width * _STEP * 10.0 ** rng.uniform(-1.5, 0.0, (count, 1))
    moved = rng.random(chosen.shape) < np.maximum(0.5, rng.random((count, 1)))
    stepped = chosen + moved * size * span * rng.standard_normal(chosen.shape)
    redrawn = rng.random(chosen.shape) < 2.0 / len(axes)
    leapt = np.where(redrawn, fit.space.uniform(rng, count), chosen)
    nominal = np.array([axis.nominal for axis in axes])
    children: Array = np.where(rng.random((count, 1)) < 0.5, leapt, stepped)
    children = np.where(nominal, leapt, children)
    if fit.space.ridge is not None:
        b, lr = fit.space.ridge
        theta = fit.posterior.theta[rng.integers(len(fit.posterior.theta), size=count)]
        children[:, b] = axes[b].snapped(children[:, b])
        children[:, lr] += ridge(children[:, b], theta[:, 0], theta[:, 1])
        children[:, lr] -= ridge(chosen[:, b], theta[:, 0], theta[:, 1])
        children[:, lr] += fit.momentum_shift(children) - fit.momentum_shift(chosen)
    return children
