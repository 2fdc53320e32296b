"""The law of the best learning rate, and a belief about it that is at home in one search space.

Symbols: B batch size (samples per optimizer step), lr learning rate, a exponent, Bc critical batch
size, (B0, lr0) the reference. The ridge is the saturating law

    ln lr*(B) = ln lr0 + a * (ln(1 + Bc/B0) - ln(1 + Bc/B)),

a power law of slope a below Bc that goes flat above it (McCandlish et al. 2018, arXiv 1812.06162,
eq. 2.10 and its generalisation for Adam). One power law is never right over the whole range
(Shallue et al. 2019, arXiv 1811.03600). Where the momentum m of heavy-ball SGD is tuned too,
lr/(1 - m) takes the place of lr: so much do the steps after one gradient add up to (Smith et al.
2018, arXiv 1711.00489; Shallue et al. call it the effective learning rate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

# The momentum that published learning rates of SGD go with (He et al. 2016; Goyal et al. 2017).
TYPICAL_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A scaling prior at home in one search space: normal beliefs, logarithms of samples and lr.

    Attributes:
        exponent: Mean of a.
        exponent_sd: Its standard deviation.
        log_critical: Mean of ln Bc.
        log_critical_sd: Its standard deviation.
        log_batch_size: ln B0.
        log_learning_rate: Mean of ln lr0.
        log_learning_rate_sd: Its standard deviation.
        momentum_exponent: Power of 1 - m that lr* is proportional to.
        log_one_minus_momentum: ln(1 - m) that ln lr0 goes with.
    """

    exponent: float
    exponent_sd: float
    log_critical: float
    log_critical_sd: float
    log_batch_size: float
    log_learning_rate: float
    log_learning_rate_sd: float
    momentum_exponent: float = 0.0
    log_one_minus_momentum: float = math.log1p(-TYPICAL_MOMENTUM)

    def best(self, log_batch_size: Array, shift: Array | float = 0.0) -> Array:
        """Ln lr* of the mean ridge, elementwise.

        Args:
            log_batch_size: ln B.
            shift: What `momentum_shift` says, where momentum is tuned.
        """
        origin = np.array(self.log_batch_size)
        rise = ridge(log_batch_size, self.exponent, self.log_critical) - ridge(
            origin, self.exponent, self.log_critical
        )
        return self.log_learning_rate + rise + shift

    def momentum_shift(self, log_one_minus_momentum: Array) -> Array:
        """How much higher ln lr* is at ln(1 - m) than at the reference's momentum, elementwise."""
        return self.momentum_exponent * (log_one_minus_momentum - self.log_one_minus_momentum)


def ridge(log_batch_size: Array, exponent: Array | float, log_critical: Array | float) -> Array:
    """Ln lr* up to a constant: -a ln(1 + Bc/B), elementwise with broadcasting.

    Args:
        log_batch_size: ln B.
        exponent: a.
        log_critical: ln Bc.
    """
    scale: Array = np.logaddexp(0.0, log_critical - log_batch_size)
    return -exponent * scale
