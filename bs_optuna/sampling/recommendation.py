"""Recommendation: what `recommend` answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A setting, and how sure the study is of it; intervals hold 90 % of the posterior.

    Attributes:
        batch_size: Samples per optimizer step.
        learning_rate: Learning rate for it.
        learning_rate_interval: Where the best learning rate for this batch size lies.
        momentum: Momentum that goes with it, where the study tuned that; None elsewhere.
        momentum_exponent: Power of 1 - momentum that the best learning rate was taken to be
            proportional to.
        params: All suggested parameters.
        trial_number: The trial that ran with them; None for a setting never tried.
        value: Expected objective value.
        value_interval: Where the value lies, noise of a single run apart.
        probability_best: Probability that it is the best of the settings tried, by however little:
            small where many are nearly as good, and near 1 after a few trials far apart, whatever
            lies between them. None for a setting never tried.
        exponent: Slope of ln lr* against ln B far below the critical batch size.
        exponent_interval: Where it lies.
        critical_batch_size: Batch size in samples around which the ridge goes flat.
        critical_batch_size_interval: Where it lies.
        trials: Number of finished trials behind all this.
    """

    batch_size: int
    learning_rate: float
    learning_rate_interval: Interval
    momentum: float | None
    momentum_exponent: float
    params: Mapping[str, Any]
    trial_number: int | None
    value: float
    value_interval: Interval
    probability_best: float | None
    exponent: float
    exponent_interval: Interval
    critical_batch_size: float
    critical_batch_size_interval: Interval
    trials: int
