"""A search space as coordinates: one real number for each parameter, and features for a model.

A coordinate is ln v for batch size, learning rate and logarithmic parameters, v for other numbers,
and the index of the choice for nominal parameters. N points in P parameters are an (N, P) array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution


Array = NDArray[np.float64]

# A batch-size range at least this wide is searched on round numbers: 137 teaches nothing that 128
# does not, and hardware likes the latter.
_ROUND_ABOVE = 8.0
# Zero has no logarithm: a linear range from 0 is searched down to this fraction of its end.
_SMALLEST_FRACTION = 1e-6


@dataclass(frozen=True)
class Axis:
    """One parameter as a coordinate.

    Attributes:
        name: The parameter's name.
        distribution: Its Optuna distribution.
        log: Whether the coordinate is the logarithm of the value.
        levels: Coordinates that may be suggested, ascending; None where any value may.
        choices: What the levels stand for, where the parameter is categorical.
        nominal: Whether the order of the levels means nothing.
    """

    name: str
    distribution: BaseDistribution
    log: bool
    levels: tuple[float, ...] | None = None
    choices: tuple[Any, ...] | None = None
    nominal: bool = False

    @classmethod
    def of(cls, name: str, distribution: BaseDistribution, *, ratio: bool, rounded: bool) -> Axis:
        """The axis of a distribution.

        Args:
            name: The parameter's name.
            distribution: What it is suggested from.
            ratio: Whether only ratios of its values matter (batch size, learning rate).
            rounded: Whether a wide integer range is searched on round numbers only.
        """
        if isinstance(distribution, CategoricalDistribution):
            if ratio and all(_is_positive_number(choice) for choice in distribution.choices):
                choices = tuple(sorted(distribution.choices, key=_as_float))
                logs = tuple(math.log(_as_float(choice)) for choice in choices)
                return cls(name, distribution, True, logs, choices)
            indices = tuple(float(i) for i in range(len(distribution.choices)))
            return cls(name, distribution, False, indices, tuple(distribution.choices), True)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        log = distribution.log or (ratio and distribution.high > 0)
        levels = None
        if rounded and isinstance(distribution, IntDistribution) and distribution.step == 1:
            levels = _round_levels(distribution.low, distribution.high)
        return cls(name, distribution, log, levels)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest coordinate."""
        if self.levels is not None:
            return self.levels[0], self.levels[-1]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        low, high = float(self.distribution.low), float(self.distribution.high)
        if self.log:
            return math.log(max(low, high * _SMALLEST_FRACTION)), math.log(high)
        return low, high

    def coordinate(self, value: Any) -> float:
        """The coordinate of a parameter's value."""
        if self.nominal:
            return float(self.distribution.to_internal_repr(value))
        number = _as_float(value)
        return math.log(max(number, math.exp(self.bounds[0]) * 1e-3)) if self.log else number

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
        values = np.exp(clipped) if self.log else clipped
        start, step = self.distribution.low, self.distribution.step
        values = start + step * np.round((values - start) / step)
        values = np.clip(values, self.distribution.low, self.distribution.high)
        return np.log(np.maximum(values, 1e-300)) if self.log else values

    def value(self, coordinate: float) -> Any:
        """The parameter's value at a coordinate, in range, as a plain Python object."""
        if self.choices is not None:
            assert self.levels is not None
            return self.choices[int(np.abs(np.array(self.levels) - coordinate).argmin())]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        low, high = self.distribution.low, self.distribution.high
        value = float(self.snapped(np.array(coordinate)))
        value = math.exp(value) if self.log else value
        if isinstance(self.distribution, IntDistribution):
            return int(min(max(round(value), low), high))
        return float(min(max(value, low), high))

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


class Space:
    """The parameters of a study that one model sees together.

    Args:
        distributions: Parameter names and distributions, none of them of a single value.
        batch_size: Name of the batch size.
        learning_rate: Name of the learning rate.
    """

    def __init__(
        self, distributions: Mapping[str, BaseDistribution], *, batch_size: str, learning_rate: str
    ) -> None:
        self.axes = tuple(
            Axis.of(
                name,
                distribution,
                ratio=name in (batch_size, learning_rate),
                rounded=name == batch_size,
            )
            for name, distribution in distributions.items()
        )
        names = [axis.name for axis in self.axes]
        ridge = [
            names.index(name)
            for name in (batch_size, learning_rate)
            if name in names and self.axes[names.index(name)].log
        ]
        self.ridge: tuple[int, int] | None = (ridge[0], ridge[1]) if len(ridge) == 2 else None

    def coordinates(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """Coordinates of parameter dictionaries that hold every axis, (N, P)."""
        rows = [[axis.coordinate(row[axis.name]) for axis in self.axes] for row in params]
        return np.array(rows, dtype=float).reshape(len(params), len(self.axes))

    def fixed(self, params: Mapping[str, Any]) -> dict[int, float]:
        """Coordinates of the parameters that are given, by the number of their axis."""
        return {
            j: axis.coordinate(params[axis.name])
            for j, axis in enumerate(self.axes)
            if axis.name in params
        }

    def params(self, coordinates: Array) -> dict[str, Any]:
        """Parameter values at the coordinates of one point, (P,)."""
        return {
            axis.name: axis.value(float(coordinate))
            for axis, coordinate in zip(self.axes, coordinates, strict=True)
        }

    def snapped(self, coordinates: Array) -> Array:
        """The nearest points that may be suggested, (N, P)."""
        columns = [axis.snapped(coordinates[:, j]) for j, axis in enumerate(self.axes)]
        return np.stack(columns, axis=1)

    def uniform(self, rng: np.random.Generator, count: int) -> Array:
        """Points drawn uniformly, (count, P)."""
        return np.stack([axis.uniform(rng, count) for axis in self.axes], axis=1)

    def middle(self) -> Array:
        """The point in the middle of every range, or the first choice, (P,)."""
        return np.array(
            [0.0 if axis.nominal else 0.5 * (axis.bounds[0] + axis.bounds[1]) for axis in self.axes]
        )

    def features(self, coordinates: Array) -> tuple[Array, NDArray[np.int_]]:
        """Features of the parameters off the ridge, and which parameter each belongs to.

        Returns:
            Arrays of shapes (N, D) and (D,).
        """
        off = [j for j in range(len(self.axes)) if self.ridge is None or j not in self.ridge]
        if not off:
            return np.zeros((len(coordinates), 0)), np.zeros(0, dtype=int)
        blocks = [self.axes[j].scaled(coordinates[:, j]) for j in off]
        return np.concatenate(blocks, axis=1), np.repeat(off, [b.shape[1] for b in blocks])

    def scaled(self, coordinates: Array) -> Array:
        """Features of all parameters, (N, D)."""
        blocks = [axis.scaled(coordinates[:, j]) for j, axis in enumerate(self.axes)]
        return np.concatenate(blocks, axis=1)


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


def _as_float(value: Any) -> float:
    return float(value)


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
