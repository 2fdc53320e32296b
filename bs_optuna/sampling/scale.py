"""The scale on which a model sees the values of a study."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

# Beyond this many times the distance from best to middling a loss only says "bad".
_CLIP = 5.0
# Parts of the space up to which values may be looked at for a middling one, and how much further
# from the best the next may be: a penalty for what failed, such as 1e9, is no loss of a setting.
_QUANTILES = (0.125, 0.25, 0.5)
_PENALTY = 100.0


@dataclass(frozen=True)
class Scale:
    """A scale on which a Gaussian process can follow the values: finite, mean 0, deviation 1.

    ln(1 + t) with t the distance from the best, in units of that from the best to a middling
    setting: it tells the good ones apart and keeps a diverged run (11 beside 2.4) from hiding
    everything else. Broken runs count as the clip.

    Attributes:
        best: Lowest value.
        unit: Distance from it to a middling one.
        centre: Mean of the logarithms.
        spread: Their standard deviation.
    """

    best: float
    unit: float
    centre: float
    spread: float

    @classmethod
    def of(cls, values: Array, over_space: Array) -> Scale:
        """The scale of values (n,), some of which may be infinite.

        Args:
            values: Of the trials.
            over_space: What the nearest trial says at each of many places all over the space, (m,).
                Its median is the middling setting. That of the trials would be as good as the best
                where a sampler has found that, and what tells values apart then is their noise.
        """
        finite = values[np.isfinite(values)]
        if not len(finite):
            return cls(0.0, 1.0, 0.0, 1.0)
        best = float(finite.min())
        unit = 0.0
        for distance in np.quantile(over_space[np.isfinite(over_space)], _QUANTILES) - best:
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
