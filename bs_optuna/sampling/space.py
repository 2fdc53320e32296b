"""A search space as coordinates: one real number for each parameter, and features for a model.

N points in P parameters are an (N, P) array of coordinates, as `Axis` defines them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from bs_optuna.sampling.axis import Axis
from bs_optuna.sampling.axis import Warp


Array = NDArray[np.float64]

# Prefix of the name of a parameter that holds 1 - momentum (Choi et al. 2019, arXiv 1910.05446).
_ONE_MINUS = "one_minus_"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the parameters are called that belong together.

    Attributes:
        batch_size: Name of the batch size.
        learning_rate: Name of the learning rate.
        momentum: Name of the momentum; a parameter with "one_minus_" before it is 1 - momentum.
        weight_decay: Name of the weight decay.
    """

    batch_size: str = "batch_size"
    learning_rate: str = "lr"
    momentum: str = "momentum"
    weight_decay: str = "weight_decay"

    def __post_init__(self) -> None:
        object.__setattr__(self, "momentum", self.momentum.removeprefix(_ONE_MINUS))

    @property
    def one_minus_momentum(self) -> str:
        """Name of 1 - momentum."""
        return _ONE_MINUS + self.momentum


class Space:
    """The parameters of a study that one model sees together.

    Args:
        distributions: Parameter names and distributions, none of them of a single value.
        names: What those that belong together are called.

    Attributes:
        axes: The parameters.
        ridge: Numbers of the axes of batch size and learning rate, if there are both.
        momentum: Number of the axis whose coordinate is ln(1 - momentum), if there is one.
        weight_decay: Number of the axis whose coordinate is ln(weight decay), if there is one.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], names: Names) -> None:
        warps: dict[str, Warp] = {
            names.momentum: "log of 1 - v",
            names.one_minus_momentum: "log",
            names.batch_size: "log",
            names.learning_rate: "log",
        }
        self.axes = tuple(
            Axis.of(name, d, ratio=warps.get(name, "none"), rounded=name == names.batch_size)
            for name, d in distributions.items()
        )
        # A weight decay may be 0, so its scale is left to the distribution.
        warps[names.weight_decay] = "log"
        found = {a.name: j for j, a in enumerate(self.axes) if a.warp == warps.get(a.name)}
        b, lr = found.get(names.batch_size), found.get(names.learning_rate)
        self.ridge = None if b is None or lr is None else (b, lr)
        self.momentum = found.get(names.momentum, found.get(names.one_minus_momentum))
        self.weight_decay = found.get(names.weight_decay)

    def may_recur(self, params: Mapping[str, Any]) -> bool:
        """Whether two suggestions may be the same as these."""
        return all(axis.may_recur(params[axis.name]) for axis in self.axes)

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
