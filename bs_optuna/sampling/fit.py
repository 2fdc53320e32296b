"""The model of one study at one moment, and the point that it would try next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx
from scipy.special import logsumexp
from scipy.special import ndtr

from bs_optuna.sampling.history import History
from bs_optuna.sampling.history import Scale
from bs_optuna.sampling.history import scalarised
from bs_optuna.sampling.space import Space
from bs_optuna.sampling.start import anchored
from bs_optuna.sampling.surrogate import Model
from bs_optuna.sampling.surrogate import Observations
from bs_optuna.sampling.surrogate import Points
from bs_optuna.sampling.surrogate import Posterior
from bs_optuna.sampling.surrogate import explore
from bs_optuna.science.prior import ScalingPrior
from bs_optuna.science.prior import ridge


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effort:
    """How thoroughly the hyper-parameters are explored.

    Attributes:
        walkers: Size of the ensemble; even.
        fresh_sweeps: Sweeps of an ensemble that starts from the prior.
        sweeps: Sweeps of one that an earlier fit has left behind.
        samples: Walkers that the posterior is averaged over.
    """

    walkers: int
    fresh_sweeps: int
    sweeps: int
    samples: int


QUICK = Effort(walkers=48, fresh_sweeps=10, sweeps=2, samples=12)
THOROUGH = Effort(walkers=96, fresh_sweeps=40, sweeps=40, samples=48)
_CANDIDATES = 256
_ROUNDS = 2


class Fit:
    """Posterior over the objective of a study.

    Args:
        space: The parameters.
        prior: The belief about the ridge, not yet anchored.
        seen: The trials.
        rng: Random numbers.
        effort: How thoroughly to explore.
        walkers: Where an earlier fit left the hyper-parameters.
    """

    def __init__(
        self,
        space: Space,
        prior: ScalingPrior,
        seen: History,
        rng: np.random.Generator,
        *,
        effort: Effort,
        walkers: Array | None = None,
    ) -> None:
        self.space = space
        self.tried = space.coordinates(seen.params)
        bounds = None if space.ridge is None else space.axes[space.ridge[0]].bounds
        owners = space.features(self.tried)[1]
        nominal = np.array([space.axes[j].nominal for j in owners], dtype=bool)
        self.model = Model(anchored(space, prior), bounds, owners, nominal)
        values = scalarised(seen.values, rng)
        self.scale = Scale.of(values)
        observed = Observations(
            self.points(self.tried), self.scale.standardised(values), seen.doubts
        )
        sweeps = effort.sweeps
        if walkers is None or walkers.shape != (effort.walkers, self.model.size):
            walkers = rng.standard_normal((effort.walkers, self.model.size))
            sweeps = effort.fresh_sweeps
        self.walkers = explore(self.model, observed, walkers, rng, sweeps)
        w = self.walkers[rng.permutation(len(self.walkers))[: effort.samples]]
        self.posterior = Posterior(self.model, w, observed)
        self.running = space.coordinates(seen.running)
        if len(self.running):
            self._believe(observed)

    def _believe(self, observed: Observations) -> None:
        """Take running trials to end as predicted: what they cost is their uncertainty."""
        points = self.points(self.running)
        expected = self.posterior.predict(points)[0].mean(0)
        everything = Observations(
            self.points(np.concatenate([self.tried, self.running])),
            np.concatenate([observed.values, expected]),
            np.concatenate([observed.doubts, np.zeros(len(self.running))]),
        )
        self.posterior = Posterior(self.model, self.posterior.w, everything)

    def suggest(self, rng: np.random.Generator, fixed: Mapping[int, float]) -> Array:
        """The point (P,) of the largest expected improvement, averaged over hyper-parameters."""
        incumbent = self.posterior.predict(self.points(self.tried))[0]
        order = np.argsort(incumbent.mean(0))[:4]
        parents = self.tried[order]
        batches = [self.space.uniform(rng, _CANDIDATES), self._around(parents, rng, _CANDIDATES)]
        candidates = np.zeros((0, self.tried.shape[1]))
        scores = np.zeros(0)
        for _ in range(_ROUNDS + 1):
            fresh = self._allowed(np.concatenate(batches), fixed)
            score = self._log_improvement(fresh, incumbent.min(1))
            candidates = np.concatenate([candidates, fresh])
            scores = np.concatenate([scores, score])
            best = np.argsort(-scores)[:6]
            batches = [self._around(candidates[best], rng, _CANDIDATES // 2, 0.3)]
        best_one: Array = candidates[scores.argmax()]
        return best_one

    def _allowed(self, candidates: Array, fixed: Mapping[int, float]) -> Array:
        """Candidates that may be suggested, without those tried or running already."""
        candidates = self.space.snapped(candidates)
        for j, coordinate in fixed.items():
            candidates[:, j] = coordinate
        taken = np.concatenate([self.tried, self.running])
        new: NDArray[np.bool_] = ~(np.abs(candidates[:, None] - taken) < 1e-9).all(-1).any(-1)
        return candidates[new] if new.any() else candidates

    def _around(
        self, parents: Array, rng: np.random.Generator, count: int, width: float = 1.0
    ) -> Array:
        """Variations of parents: steps of many sizes, in some coordinates or along the ridge."""
        chosen = parents[rng.integers(len(parents), size=count)]
        span = np.array([a.bounds[1] - a.bounds[0] for a in self.space.axes])
        scale = width * 0.3 * 10.0 ** rng.uniform(-1.5, 0.0, (count, 1))
        moved = rng.random(chosen.shape) < np.maximum(0.5, rng.random((count, 1)))
        children: Array = chosen + moved * scale * span * rng.standard_normal(chosen.shape)
        for j, axis in enumerate(self.space.axes):
            if axis.nominal:
                swap = rng.random(count) < 0.2
                children[:, j] = np.where(swap, axis.uniform(rng, count), chosen[:, j])
        if self.space.ridge is not None:
            b, lr = self.space.ridge
            theta = self.posterior.theta[rng.integers(len(self.posterior.theta), size=count)]
            children[:, b] = self.space.axes[b].snapped(children[:, b])
            children[:, lr] += ridge(children[:, b], theta[:, 0], theta[:, 1])
            children[:, lr] -= ridge(chosen[:, b], theta[:, 0], theta[:, 1])
        return children

    def _log_improvement(self, candidates: Array, incumbent: Array) -> Array:
        mean, sd = self.posterior.predict(self.points(candidates))
        each = log_expected_improvement((incumbent[:, None] - mean) / sd, sd)
        together: Array = logsumexp(each, axis=0)
        return together

    def points(self, coordinates: Array) -> Points:
        """Coordinates (N, P) as the model wants them."""
        other = self.space.features(coordinates)[0]
        b, lr = self.space.ridge or (0, 0)
        return Points(coordinates[:, b], coordinates[:, lr], other)


def log_expected_improvement(z: Array, sd: Array) -> Array:
    """Ln E[max(improvement, 0)], exact far into the tail (Ament 2023, arXiv 2310.20708).

    Args:
        z: Distance by which the mean is better than the incumbent, in standard deviations.
        sd: Standard deviation.
    """
    near = np.maximum(z, -1.0)
    density = np.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)
    log_near = np.log(density + near * ndtr(near))
    far = np.minimum(z, -1.0)
    mills = np.maximum(1.0 + math.sqrt(math.pi / 2) * far * erfcx(-far / math.sqrt(2)), 1e-300)
    log_mills = np.where(far < -1e3, -2.0 * np.log(-far), np.log(mills))
    log_far = -0.5 * far * far - 0.5 * math.log(2 * math.pi) + log_mills
    return np.where(z > -1.0, log_near, log_far) + np.log(sd)
