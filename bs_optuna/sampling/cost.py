"""What a trial costs, as a function of its parameters, learned from the trials that told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from bs_optuna.sampling import attributes
from bs_optuna.sampling.history import is_complete
from bs_optuna.sampling.space import Space


Array = NDArray[np.float64]

# Improvement counts per cost at first and for itself in the end (CArBO, Lee 2020, arXiv 2003.10870,
# whose exponent is the share of the budget that is left; a sampler is not told the budget, so
# here half of the exponent is gone after ten trials).
_COOLING_TRIALS = 10.0
_SHRINKAGE = 0.1


def measured(trials: Sequence[FrozenTrial], attribute: str) -> dict[int, float]:
    """Cost by trial number: a user attribute; for "seconds" also the trial's duration.

    Of trials that were completed: one that ended at once makes its setting look cheap.
    """
    costs = {}
    for t in filter(is_complete, trials):
        cost = t.user_attrs.get(attribute)
        if cost is None and attribute == attributes.SECONDS and t.duration is not None:
            cost = t.duration.total_seconds()
        if isinstance(cost, int | float) and math.isfinite(cost) and cost > 0:
            costs[t.number] = float(cost)
    return costs


def log_penalty(
    space: Space, tried: Array, numbers: Sequence[int], costs: Mapping[int, float], asked: Array
) -> Array:
    """Cooled ln cost of points, to be subtracted from ln improvement.

    A ridge regression of ln cost on the scaled coordinates: time is close to a product of powers of
    batch size, width, depth and the like.

    Args:
        space: The parameters.
        tried: Coordinates of the trials, (n, P).
        numbers: Their trial numbers.
        costs: Cost by trial number, of some of them.
        asked: Coordinates, (N, P).
    """
    told = [i for i, number in enumerate(numbers) if number in costs]
    if len(told) < 2:
        return np.zeros(len(asked))
    log_cost = np.log([costs[numbers[i]] for i in told])
    x = space.scaled(tried[told])
    weights = np.linalg.solve(
        x.T @ x + _SHRINKAGE * np.eye(x.shape[1]), x.T @ (log_cost - log_cost.mean())
    )
    cooling = _COOLING_TRIALS / (_COOLING_TRIALS + len(tried))
    penalty: Array = cooling * (space.scaled(asked) @ weights)
    return penalty
