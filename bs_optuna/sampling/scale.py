"""The scale on which a model sees the values of a study."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

# Beyond this many times the distance from best to median a loss only says "bad".
_CLIP = 5.0
# The median may be a penalty for what failed, such as 1e9, and no loss of a setting. Then the last
# quantile counts before the distance from the best jumps by so much.
_QUANTILES = (0.125, 0.25, 0.5)
_PENALTY = 1000.0


@dataclass(frozen=True)
class Scale:
    """A scale on which a Gaussian process can follow the values: finite, mean 0, deviation 1.

    ln(1 + t) with t the distance from the best, in units of that from the best to the median: it
    tells the good ones apart and keeps a diverged run (11 beside 2.4) from hiding everything
    else. Broken runs count as the clip.

    Attributes:
        best: Lowest value.
        unit: Distance from it to the median, or to a lower quantile where that is a penalty.
        centre: Mean of the logarithms.
        spread: Their standard deviation.
    """

    best: float
    unit: float
    centre: float
    spread: float

    @classmethod
    def of(cls, values: Array) -> Scale:
        """The scale of values (n,), some of which may be infinite."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return cls(0.0, 1.0, 0.0, 1.0)
        best = float(finite.min())
        unit = 0.0
        for distance in np.quantile(finite, _QUANTILES) - best:
            if unit > 0.0 and distance > _PENALTY * unit:
                break
            unit = float(distance)
        unit = unit or float(finite.max()) - best or 1.0
        scaled = np.log1p(np.minimum((values - best) / unit, _CLIP))
        return cls(best, unit, float(scaled.mean()), float(scaled.std()) or 1.0)

    def standardised(self, values: Array) -> Array:
        """Values on the scale, same shape."""
        scaled = np.log1p(np.minimum((values - self.best) / self.unit, _CLIP))
        return (scaled - self.centre) / self.spread

    def restored(self, standardised: Array) -> Array:
        """Values off the scale, same shape; below the best one the scale goes on linearly."""
        scaled = standardised * self.spread + self.centre
        return self.best + self.unit * np.where(scaled > 0, np.expm1(scaled), scaled)
