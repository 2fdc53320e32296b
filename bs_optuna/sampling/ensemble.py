"""The posterior over hyper-parameters, explored by an ensemble of walkers.

Stretch moves (Goodman & Weare 2010) take no gradients and no tuning, and from one trial to the next
the walkers only have to move a little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bs_optuna.sampling.surrogate import Model
from bs_optuna.sampling.surrogate import Observations


Array = NDArray[np.float64]

_STUCK = 10.0  # a walker that is so much below the median of their log posteriors


def explore(
    model: Model, seen: Observations, walkers: Array, rng: np.random.Generator, sweeps: int
) -> Array:
    """Move walkers (S, T) towards the posterior of w by stretch moves, half of them at a time.

    Halfway those that are stuck far from it go to where others are: by stretch moves alone some
    never come back from a place that is e^50 times less likely (Hou et al. 2012, arXiv 1104.2612).
    """
    w = walkers.copy()
    half = len(w) // 2
    log_p = model.log_posterior(w, seen)
    for sweep in range(2 * sweeps):
        if sweep == sweeps:
            stuck = log_p < np.median(log_p) - _STUCK
            place = rng.choice(np.flatnonzero(~stuck), stuck.sum())
            w[stuck], log_p[stuck] = w[place], log_p[place]
        movers = np.arange(half) + half * (sweep % 2)
        others = rng.permutation(np.arange(half) + half * (1 - sweep % 2))
        stretch = (1.0 + rng.random(half)) ** 2 / 2.0
        proposal = w[others] + stretch[:, None] * (w[movers] - w[others])
        proposal = np.clip(proposal, -4.0, 4.0)
        log_q = model.log_posterior(proposal, seen)
        accepted = np.log(rng.random(half)) < (
            (model.size - 1) * np.log(stretch) + log_q - log_p[movers]
        )
        w[movers[accepted]], log_p[movers[accepted]] = proposal[accepted], log_q[accepted]
    return w
