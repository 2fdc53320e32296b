"""The learning rate above which training diverges, as far as the trials of a study tell.

Symbols: B batch size, c the highest stable learning rate of a setting; p and q position and slope
of the line ln c = p + q (ln B - middle), w the standard deviation of settings around it, as other
parameters matter too. A run that diverged had a learning rate above its c, any other one below.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from scipy.special import log_ndtr

from bs_optuna.sampling.history import has_diverged
from bs_optuna.sampling.history import is_feasible


Array = NDArray[np.float64]

# A priori p is uniform over the rates that were tried and as far again on both sides. q is uniform
# between a limit set by curvature alone and one set by noise (Granziol et al. 2022, arXiv
# 2006.09092); each w is as likely as the others.
_POSITIONS = 241
_SLOPES = np.linspace(0.0, 1.0, 11)
_DEVIATIONS = np.array([0.1, 0.4, 1.6])


class Cliff:
    """Posterior of the line, on a grid of p, q and w.

    Args:
        log_batch_sizes: ln B of the runs, (n,).
        log_learning_rates: ln lr of the runs, (n,).
        diverged: Which of them diverged, (n,).

    Attributes:
        diverged: How many did.
    """

    def __init__(
        self, log_batch_sizes: Array, log_learning_rates: Array, diverged: NDArray[np.bool_]
    ) -> None:
        self.diverged = int(diverged.sum())
        self._middle = float(log_batch_sizes.min() + log_batch_sizes.max()) / 2.0
        low, high = float(log_learning_rates.min()), float(log_learning_rates.max())
        beyond = max(high - low, 1.0)
        positions = np.linspace(low - beyond, high + beyond, _POSITIONS)
        grid = np.meshgrid(positions, _SLOPES, _DEVIATIONS)
        self._p, self._q, self._w = (axis.ravel() for axis in grid)
        limits = self._p[:, None] + self._q[:, None] * (log_batch_sizes - self._middle)
        above = (log_learning_rates - limits) / self._w[:, None]
        log_likelihood = log_ndtr(np.where(diverged, above, -above)).sum(1)
        weights = np.exp(log_likelihood - log_likelihood.max())
        self._weights = weights / weights.sum()

    @classmethod
    def seen_in(cls, trials: Sequence[FrozenTrial], names: tuple[str, str]) -> Cliff | None:
        """What trials tell that have both parameters, batch size first; None if none diverged."""
        ran = [
            t
            for t in trials
            if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and is_feasible(t)
        ]
        diverged = np.array([has_diverged(t) for t in ran], dtype=bool)
        if not diverged.any():
            return None
        sizes, rates = (np.log([t.params[name] for t in ran]) for name in names)
        return cls(sizes, rates, diverged)

    def draws(self, log_batch_size: float, rng: np.random.Generator, count: int) -> Array:
        """Ln c of settings with that batch size, (count,)."""
        k = rng.choice(len(self._weights), size=count, p=self._weights)
        line = self._p[k] + self._q[k] * (log_batch_size - self._middle)
        drawn: Array = line + self._w[k] * rng.standard_normal(count)
        return drawn
