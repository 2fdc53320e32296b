"""The first trials: the anchor, then a walk along the ridge; no random phase."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bs_optuna.sampling.space import Space
from bs_optuna.science.prior import LOG_3
from bs_optuna.science.prior import ScalingPrior
from bs_optuna.science.ridge import Anchor


Array = NDArray[np.float64]

# The first trials: batch size, in half ranges from the reference, and ln of the factor by which
# the learning rate is off the believed ridge. A walk exactly on it would not tell on which side
# the true one lies. Further trials, where results are slow to come, fill the range.
_WALK = ((0.0, 0.0), (0.5, -LOG_3), (-0.5, LOG_3))
# How often a point that was tried already is replaced by a random one.
_TRIES = 32


def anchored(space: Space, prior: ScalingPrior) -> Anchor | None:
    """The scaling prior in a space; None if that lacks batch size or learning rate."""
    if space.ridge is None:
        return None

    def ends(axis: int) -> tuple[float, float]:
        low, high = space.axes[axis].bounds
        return math.exp(low), math.exp(high)

    b, lr = space.ridge
    return prior.anchored_in(
        ends(b), ends(lr), None if space.momentum is None else ends(space.momentum)
    )


def momentum_shift(space: Space, anchor: Anchor, points: Array) -> Array | float:
    """How much higher ln lr* is for the momentum of points (N, P) than at the reference's, (N,)."""
    return 0.0 if space.momentum is None else anchor.momentum_shift(points[:, space.momentum])


def start_point(
    space: Space,
    prior: ScalingPrior,
    index: int,
    rng: np.random.Generator,
    fixed: Mapping[int, float],
    taken: Array,
) -> Array:
    """Coordinates (P,) of the trial with that number before any model.

    Args:
        space: The search space.
        prior: The belief about the ridge, not yet anchored.
        index: Number of the trial.
        rng: Its random numbers.
        fixed: Coordinates that are given already, by the number of their axis.
        taken: Points tried or running, (n, P); avoided where the space is large enough.
    """
    point = _walk(space, prior, index, rng, fixed)
    for _ in range(_TRIES):
        if not (np.abs(taken - space.snapped(point[None])) < 1e-9).all(1).any():
            break
        point = space.uniform(rng, 1)[0]
        point[list(fixed)] = list(fixed.values())
    return point


def _walk(
    space: Space,
    prior: ScalingPrior,
    index: int,
    rng: np.random.Generator,
    fixed: Mapping[int, float],
) -> Array:
    anchor = anchored(space, prior)
    # The other parameters stay in the middle, the best guess there is, until the model has a say:
    # what differs between the trials of the walk is then due to the ridge.
    walks = index == 0 or (anchor is not None and index < len(_WALK))
    point = space.middle() if walks else space.uniform(rng, 1)[0]
    if walks and space.momentum is not None and prior.momentum_exponent != 0.0:
        # The momentum that the learning rate of the prior goes with.
        axis = space.axes[space.momentum]
        point[space.momentum] = axis.snapped(np.array(math.log1p(-prior.reference_momentum)))
    for j, coordinate in fixed.items():
        point[j] = coordinate
    if anchor is None or space.ridge is None:
        return point
    b, lr = space.ridge
    low, high = space.axes[b].bounds
    if index < len(_WALK):
        step, off = _WALK[index]
    else:
        step, off = rng.uniform(-1.0, 1.0), anchor.log_learning_rate_sd * rng.standard_normal()
    if b not in fixed:
        point[b] = anchor.log_batch_size + step * 0.5 * (high - low)
        point[[b]] = space.axes[b].snapped(point[[b]])
    if lr not in fixed:
        shift = momentum_shift(space, anchor, point[None])
        point[lr] = anchor.best(point[[b]], shift)[0] + off
    return point
