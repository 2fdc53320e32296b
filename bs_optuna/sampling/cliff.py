"""The learning rate above which training diverges, as far as the trials of a study tell.

Symbols: B batch size, m momentum, c the highest stable learning rate of a setting; p position, q
and r slopes of the plane ln c = p + q (ln B - middle) + r (ln(1 - m) - middle), w the standard
deviation of settings around it, as other parameters matter too. A run that diverged had a learning
rate above its c, any other one below. Runs that broke without saying why, all of them at larger
batches than any other, had no memory and tell nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from scipy.special import log_ndtr

from bs_optuna.sampling.history import has_diverged
from bs_optuna.sampling.history import is_complete
from bs_optuna.sampling.history import is_failure
from bs_optuna.sampling.history import is_feasible
from bs_optuna.sampling.history import tells_of_divergence
from bs_optuna.sampling.space import Space


Array = NDArray[np.float64]

# A priori p is uniform over the rates that were tried and as far again on both sides. q is uniform
# between a limit set by curvature alone and one set by noise (Granziol et al. 2022, arXiv
# 2006.09092). So is r where gradients add up: curvature h alone sets c = 2 (1 + m) / h (Polyak
# 1964), noise a limit on lr / (1 - m). Each w is as likely as the others.
_POSITIONS = 241
_SLOPES = np.linspace(0.0, 1.0, 11)
_MOMENTUM_SLOPES = np.array([0.0, 0.5, 1.0])
_DEVIATIONS = np.array([0.1, 0.4, 1.6])
# So many failures, and this part of all pairs of a failed and a completed run in which the failed
# one is the higher: by chance a few studies in a hundred have that.
_FAILURES = 3
_ABOVE = 0.9


class Cliff:
    """Posterior of the plane, on a grid of p, q, r and w.

    Args:
        settings: Ln B and ln(1 - m) of the runs, (n, 2).
        log_learning_rates: ln lr of the runs, (n,).
        diverged: Which of them diverged, (n,).
        momentum_slopes: The values of r that may be.

    Attributes:
        diverged: How many did.
    """

    def __init__(
        self,
        settings: Array,
        log_learning_rates: Array,
        diverged: NDArray[np.bool_],
        momentum_slopes: Array,
    ) -> None:
        self.diverged = int(diverged.sum())
        self._middle = (settings.min(0) + settings.max(0)) / 2.0
        low, high = float(log_learning_rates.min()), float(log_learning_rates.max())
        beyond = max(high - low, 1.0)
        positions = np.linspace(low - beyond, high + beyond, _POSITIONS)
        grid = np.meshgrid(positions, _SLOPES, momentum_slopes, _DEVIATIONS)
        p, q, r, self._w = (axis.ravel() for axis in grid)
        self._plane = np.stack([p, q, r])
        above = (log_learning_rates - self._limits(settings).T) / self._w[:, None]
        log_likelihood = log_ndtr(np.where(diverged, above, -above)).sum(1)
        weights = np.exp(log_likelihood - log_likelihood.max())
        self._weights = weights / weights.sum()

    @classmethod
    def seen_in(
        cls,
        trials: Sequence[FrozenTrial],
        space: Space,
        *,
        failed: Collection[int] = (),
        adds_up: bool = False,
    ) -> Cliff | None:
        """What trials tell; None if none of them diverged.

        Args:
            trials: With every parameter of the space.
            space: With a ridge.
            failed: What `failed_above` says.
            adds_up: Whether the optimizer adds gradients up, so that momentum matters.
        """
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        ran = [
            t
            for t in trials
            if is_feasible(t) and (t.state in ended or has_diverged(t) or t.number in failed)
        ]
        diverged = np.array([has_diverged(t) or t.number in failed for t in ran], dtype=bool)
        coordinates = space.coordinates([t.params for t in ran])
        assert space.ridge is not None
        untold = diverged & np.array(
            [t.state in ended and not tells_of_divergence(t) for t in ran], dtype=bool
        )
        sizes, rates = (coordinates[:, j] for j in space.ridge)
        if _are_too_large(sizes, rates, untold, ~diverged):
            coordinates, diverged = coordinates[~untold], diverged[~untold]
        if not diverged.any():
            return None
        slopes = _MOMENTUM_SLOPES if adds_up and space.momentum is not None else np.zeros(1)
        return cls(_settings(space, coordinates), coordinates[:, space.ridge[1]], diverged, slopes)

    def draws(self, space: Space, point: Array, rng: np.random.Generator, count: int) -> Array:
        """Ln c of settings with the batch size and momentum of a point (P,), (count,)."""
        k = rng.choice(len(self._weights), size=count, p=self._weights)
        plane = self._limits(_settings(space, point[None]))[0, k]
        drawn: Array = plane + self._w[k] * rng.standard_normal(count)
        return drawn

    def _limits(self, settings: Array) -> Array:
        """Middle of ln c at settings (n, 2) for each plane, (n, K)."""
        p, q, r = self._plane
        from_middle = settings - self._middle
        limits: Array = p + q * from_middle[:, :1] + r * from_middle[:, 1:]
        return limits


def failed_above(trials: Sequence[FrozenTrial], space: Space) -> frozenset[int]:
    """Numbers of the failed trials that diverged, if where they lie says so.

    Optuna stores a run that returns NaN as failed, like one with a mistake in it, and keeps no word
    of that. Mistakes strike anywhere, divergence at high learning rates.

    Args:
        trials: With every parameter of the space.
        space: The parameters.
    """
    failed = [t for t in trials if is_failure(t)]
    fine = [t for t in trials if is_complete(t)]
    if space.ridge is None or len(failed) < _FAILURES or not fine:
        return frozenset()
    (b, lr), a = space.ridge, space.coordinates([t.params for t in failed])
    c = space.coordinates([t.params for t in fine])
    for slope in (_SLOPES[0], _SLOPES[-1]):
        higher = (a[:, [lr]] - slope * a[:, [b]]) > (c[:, lr] - slope * c[:, b])
        if higher.mean() >= _ABOVE:
            return frozenset(t.number for t in failed)
    return frozenset()


def _are_too_large(
    sizes: Array, rates: Array, untold: NDArray[np.bool_], fine: NDArray[np.bool_]
) -> bool:
    """Whether runs that broke without saying why did so for want of memory.

    Memory runs out above a batch size whatever the learning rate; no larger one then ends well.
    """
    if not untold.any() or not fine.any():
        return False
    by_size, by_rate = (x[untold].min() > x[fine].max() for x in (sizes, rates))
    return bool(by_size and not by_rate)


def _settings(space: Space, coordinates: Array) -> Array:
    assert space.ridge is not None
    sizes = coordinates[:, space.ridge[0]]
    none = np.zeros(len(coordinates))
    momenta = none if space.momentum is None else coordinates[:, space.momentum]
    return np.stack([sizes, momenta], axis=1)
