"""One parameter of a study as a coordinate: a real number, and back.

A coordinate is ln v for batch size, learning rate and logarithmic parameters, ln(1 - v) for
momentum, v for other numbers, and the index of the choice for nominal parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution


Array = NDArray[np.float64]
Warp = Literal["none", "log", "log of 1 - v"]

# A batch-size range at least this wide is searched on round numbers: 137 teaches nothing that 128
# does not, and hardware likes the latter.
_ROUND_ABOVE = 8.0
# Zero has no logarithm: a linear range from 0 is searched down to this fraction of its end, and a
# range of momenta up to 1 to within this fraction of its width: 0 to 1 up to 0.999.
_SMALLEST_FRACTION = 1e-6
_SMALLEST_COMPLEMENT = 1e-3
# Two values are the same if they differ by rounding, and no more than so.
_SAME = 1e-9
# Parts of a step by which its ends may be off.
_ROUNDED = 1e-6


@dataclass(frozen=True)
class Axis:
    """One parameter as a coordinate.

    Attributes:
        name: The parameter's name.
        distribution: Its Optuna distribution.
        warp: What the coordinate of a value v is.
        levels: Coordinates that may be suggested, ascending; None where any value may.
        choices: What the levels stand for, where the parameter is categorical.
        nominal: Whether the order of the levels means nothing.
    """

    name: str
    distribution: BaseDistribution
    warp: Warp
    levels: tuple[float, ...] | None = None
    choices: tuple[Any, ...] | None = None
    nominal: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        distribution: BaseDistribution,
        *,
        ratio: Warp = "none",
        rounded: bool = False,
    ) -> Axis:
        """The axis of a distribution.

        Args:
            name: The parameter's name.
            distribution: What it is suggested from.
            ratio: The warp of a parameter of which only ratios matter (batch size, learning rate,
                1 - momentum), used where its values allow; "none" leaves it to the distribution.
            rounded: Whether a wide integer range is searched on round numbers only.
        """
        if isinstance(distribution, CategoricalDistribution):
            if ratio != "none" and all(map(_is_number, distribution.choices)):
                values = np.array(distribution.choices, dtype=float)
                order = np.argsort(_measure(values, ratio))
                if _measure(values, ratio).min() > 0 <= values.min():
                    logs = tuple(np.log(_measure(values[order], ratio)).tolist())
                    choices = tuple(distribution.choices[i] for i in order)
                    return cls(name, distribution, ratio, logs, choices)
            indices = tuple(float(i) for i in range(len(distribution.choices)))
            return cls(name, distribution, "none", indices, tuple(distribution.choices), True)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        warp: Warp = "log" if distribution.log else "none"
        if _allows(distribution, ratio):
            warp = ratio
        levels = None
        if rounded and isinstance(distribution, IntDistribution) and distribution.step == 1:
            levels = _round_levels(distribution.low, distribution.high)
        return cls(name, distribution, warp, levels)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest coordinate."""
        if self.levels is not None:
            return self.levels[0], self.levels[-1]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        low, high = float(self.distribution.low), float(self.distribution.high)
        if self.warp == "log":
            low = max(low, high * _SMALLEST_FRACTION)
        if self.warp == "log of 1 - v" and high == 1.0:
            high -= (1.0 - low) * _SMALLEST_COMPLEMENT
        ends = self._warped(np.array([low, high]))
        return float(ends.min()), float(ends.max())

    def may_recur(self, value: Any) -> bool:
        """Whether two suggestions may be this value: one of few, or an end of the range."""
        if isinstance(self.distribution, FloatDistribution) and self.distribution.step is None:
            at = self.coordinate(value)
            return any(abs(at - end) < _SAME for end in self.bounds)
        return True

    def coordinate(self, value: Any) -> float:
        """The coordinate of a parameter's value."""
        if self.nominal:
            return float(self.distribution.to_internal_repr(value))
        if self.warp == "none":
            return float(value)
        far = math.exp(self.bounds[0]) * 1e-3  # of a value without a logarithm, by another range
        return math.log(max(float(_measure(np.array(float(value)), self.warp)), far))

    def snapped(self, coordinates: Array) -> Array:
        """The nearest coordinates that may be suggested; any shape."""
        if self.levels is not None:
            levels = np.array(self.levels)
            nearest: Array = levels[np.abs(coordinates[..., None] - levels).argmin(-1)]
            return nearest
        low, high = self.bounds
        clipped = np.clip(coordinates, low, high)
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        if self.distribution.step is None:
            return clipped
        start, step = self.distribution.low, self.distribution.step
        ends = np.sort((self._values(np.array([low, high])) - start) / step)
        first, last = math.ceil(ends[0] - _ROUNDED), math.floor(ends[1] + _ROUNDED)
        steps = np.round((self._values(clipped) - start) / step)
        return self._warped(start + step * np.clip(steps, first, max(first, last)))

    def value(self, coordinate: float) -> Any:
        """The parameter's value at a coordinate, in range, as a plain Python object."""
        if self.choices is not None:
            assert self.levels is not None
            return self.choices[int(np.abs(np.array(self.levels) - coordinate).argmin())]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        low, high = self.distribution.low, self.distribution.high
        value = float(self._values(self.snapped(np.array(coordinate))))
        if isinstance(self.distribution, IntDistribution):
            return int(min(max(round(value), low), high))
        # The ends as they were given, and not exp(ln(low)).
        ends = (end for end in (low, high) if math.isclose(value, end, rel_tol=_SAME))
        return float(next(ends, min(max(value, low), high)))

    def uniform(self, rng: np.random.Generator, count: int) -> Array:
        """Coordinates drawn uniformly, (count,)."""
        if self.levels is not None:
            return rng.choice(np.array(self.levels), count)
        low, high = self.bounds
        return self.snapped(rng.uniform(low, high, count))

    def scaled(self, coordinates: Array) -> Array:
        """Features (N, k) of coordinates (N,).

        A number is scaled to [-1, 1]; a nominal parameter has one column for each choice, two
        different choices being as far apart as the ends of half a range.
        """
        if self.nominal:
            assert self.levels is not None
            hot: Array = (coordinates[:, None] == np.array(self.levels)) / math.sqrt(2.0)
            return hot
        low, high = self.bounds
        return (2.0 * coordinates[:, None] - low - high) / max(high - low, 1e-12)

    def _warped(self, values: Array) -> Array:
        if self.warp == "none":
            return values
        logs: Array = np.log(np.maximum(_measure(values, self.warp), 1e-300))
        return logs

    def _values(self, coordinates: Array) -> Array:
        if self.warp == "none":
            return coordinates
        return _measure(np.exp(coordinates), self.warp)


def _allows(distribution: FloatDistribution | IntDistribution, ratio: Warp) -> bool:
    """Whether the values of a range, but maybe for its end, have the logarithm of a ratio."""
    if ratio == "log":
        return distribution.high > 0
    return ratio != "none" and 0 <= distribution.low < 1 >= distribution.high


def _measure(values: Array, warp: Warp) -> Array:
    """What the logarithm is taken of; its own inverse."""
    return 1.0 - values if warp == "log of 1 - v" else values


def _round_levels(low: int, high: int) -> tuple[float, ...] | None:
    """Ln of the powers of two and one and a half times them, with both ends of the range."""
    if low < 1 or high / low < _ROUND_ABOVE:
        return None
    sizes = {low, high}
    power = 1
    while power <= high:
        sizes |= {size for size in (power, power + power // 2) if low <= size <= high}
        power *= 2
    return tuple(math.log(size) for size in sorted(sizes))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
