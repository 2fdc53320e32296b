"""The model of one study at one moment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bs_optuna.sampling.ensemble import explore
from bs_optuna.sampling.history import History
from bs_optuna.sampling.history import scalarised
from bs_optuna.sampling.scale import Scale
from bs_optuna.sampling.space import Space
from bs_optuna.sampling.start import anchored
from bs_optuna.sampling.start import momentum_shift
from bs_optuna.sampling.surrogate import RIDGE_UNIT
from bs_optuna.sampling.surrogate import Model
from bs_optuna.sampling.surrogate import Observations
from bs_optuna.sampling.surrogate import Points
from bs_optuna.sampling.surrogate import Posterior
from bs_optuna.science.prior import ScalingPrior


Array = NDArray[np.float64]

# Up to here every suggestion gets the whole effort; beyond, hyper-parameters hardly change from
# one trial to the next, and the effort is spread so that a suggestion takes about as long.
_FULL_EFFORT_TRIALS = 40
# The price of a fit grows with the third power of the number of trials, that of its memory with the
# second. Hyper-parameters find their way by few of them, and then settle with those that are kept.
_FEW = 128
_MOST = 500


@dataclass(frozen=True)
class Effort:
    """How thoroughly the hyper-parameters are explored.

    Attributes:
        walkers: Size of the ensemble; even.
        fresh_sweeps: Sweeps of an ensemble that starts from the prior.
        sweeps: Sweeps of one that an earlier fit has left behind.
        samples: Walkers that the posterior is averaged over.
        spread: Whether long histories get less of it.
        log_noise_sd: See `Model`.
    """

    walkers: int
    fresh_sweeps: int
    sweeps: int
    samples: int
    spread: bool
    log_noise_sd: float


QUICK = Effort(walkers=48, fresh_sweeps=10, sweeps=2, samples=12, spread=True, log_noise_sd=1.0)
# With a quarter of the sweeps, what is recommended where the valley is flat depended on the seed:
# by a factor of 1.4 (one standard deviation) after 60 trials, by up to 12 in all after 200.
# Noise may be as large as all differences, or nothing. A sampler that thinks so repeats itself too
# often (noisy quadratic model: 0.7 trials more), but an interval that does not is too narrow: after
# 8 trials with a noise of 0.05 a quarter of them held the value, instead of five in six.
THOROUGH = Effort(
    walkers=96, fresh_sweeps=160, sweeps=160, samples=96, spread=False, log_noise_sd=2.0
)


class Fit:
    """Posterior over the objective of a study.

    Args:
        space: The parameters.
        prior: The belief about the ridge, not yet anchored.
        seen: The trials.
        rng: Random numbers.
        effort: How thoroughly to explore.
        walkers: Where an earlier fit left the hyper-parameters.

    Attributes:
        tried: Coordinates of the finished trials, (n, P); of many, the best and some others.
        running: Coordinates of the running ones.
        taken: Coordinates of all that are finished or running.
        numbers: Trial numbers of the finished ones, n of them.
        anchor: The belief about the ridge in this space; None if that has no ridge.
        scale: The scale on which the model sees the values.
        share: Part of the effort that such a long history gets, in (0, 1].
        walkers: Hyper-parameters, whitened; where the next fit starts.
        posterior: The function, given finished trials and what is expected of running ones.
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
        everything = space.coordinates(seen.params)
        self.running = space.coordinates(seen.running)
        self.taken = np.concatenate([everything, self.running])
        values = scalarised(seen.values, rng)
        kept = _thinned(values, _MOST)
        self.tried, values = everything[kept], values[kept]
        self.numbers = [seen.numbers[k] for k in kept]
        self.anchor = anchored(space, prior)
        self._decay_share = _decay_share(space, prior.exponent)
        self.share = min(1.0, _FULL_EFFORT_TRIALS / len(kept)) if effort.spread else 1.0
        bounds = None if space.ridge is None else space.axes[space.ridge[0]].bounds
        owners = space.features(self.tried)[1]
        nominal = np.array([space.axes[j].nominal for j in owners], dtype=bool)
        self.model = Model(self.anchor, bounds, owners, nominal, effort.log_noise_sd)
        self.scale = Scale.of(values)
        observed = Observations(
            self.points(self.tried), self.scale.standardised(values), seen.doubts[kept]
        )
        self.walkers = self._explored(observed, rng, effort, walkers)
        samples = max(int(effort.samples * self.share), 4)
        w = self.walkers[rng.permutation(len(self.walkers))[:samples]]
        self.posterior = Posterior(self.model, w, observed)
        if len(self.running):
            self._believe(observed)

    def points(self, coordinates: Array) -> Points:
        """Coordinates (N, P) as the model wants them."""
        b, lr = self.space.ridge or (0, 0)
        at_reference = coordinates[:, lr] - self.momentum_shift(coordinates)
        decay = self.space.weight_decay
        if self.anchor is not None and decay is not None:
            # What matters is how many samples it takes the weights to forget, B / (lr * decay): one
            # value of that is best at every lr and B (Wang & Aitchison 2024, arXiv 2405.13698).
            per_sample = at_reference - self.anchor.log_learning_rate
            per_sample -= coordinates[:, b] - self.anchor.log_batch_size
            coordinates = coordinates.copy()
            middle = sum(self.space.axes[decay].bounds) / 2.0
            own = coordinates[:, decay] - middle
            coordinates[:, decay] = middle + (own + per_sample) * self._decay_share
        return Points(coordinates[:, b], at_reference, self.space.features(coordinates)[0])

    def momentum_shift(self, coordinates: Array) -> Array | float:
        """How much the momentum of points (N, P) raises ln lr* above that at the reference's."""
        return 0.0 if self.anchor is None else momentum_shift(self.space, self.anchor, coordinates)

    def _explored(
        self, observed: Observations, rng: np.random.Generator, effort: Effort, old: Array | None
    ) -> Array:
        if old is None or old.shape != (effort.walkers, self.model.size):
            walkers = rng.standard_normal((effort.walkers, self.model.size))
            few = observed[_thinned(observed.values, _FEW)]
            walkers = explore(self.model, few, walkers, rng, effort.fresh_sweeps)
            if len(few.values) < len(observed.values):
                walkers = explore(self.model, observed, walkers, rng, effort.fresh_sweeps // 10)
            return walkers
        if rng.random() < self.share**2:
            return explore(self.model, observed, old, rng, effort.sweeps)
        return old

    def _believe(self, observed: Observations) -> None:
        """Take running trials to end as predicted: what they take away is uncertainty."""
        expected = self.posterior.predict(self.points(self.running))[0].mean(0)
        everything = Observations(
            self.points(np.concatenate([self.tried, self.running])),
            np.concatenate([observed.values, expected]),
            np.concatenate([observed.doubts, np.zeros(len(self.running))]),
        )
        self.posterior = Posterior(self.model, self.posterior.w, everything)


def _thinned(values: Array, most: int) -> NDArray[np.int_]:
    """In order: the best half of so many values, and others by chance; all if there are fewer."""
    if len(values) <= most:
        return np.arange(len(values))
    order = np.argsort(values, kind="stable")
    others = np.random.default_rng(0).choice(order[most // 2 :], most - most // 2, replace=False)
    return np.sort(np.concatenate([order[: most // 2], others]))


def _decay_share(space: Space, exponent: float) -> float:
    """The range of weight decay as a part of that of what the model sees of it.

    That depends on batch size and learning rate too. Where points matter, the learning rate is
    within a unit or so of the ridge, which a narrow range of weight decay must not hide.
    """
    if space.ridge is None or space.weight_decay is None:
        return 1.0
    own, sizes = (
        (space.axes[j].bounds[1] - space.axes[j].bounds[0]) / 2.0
        for j in (space.weight_decay, space.ridge[0])
    )
    return own / math.hypot(own, RIDGE_UNIT, (1.0 - exponent) * sizes)
