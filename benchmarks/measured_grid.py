"""Measured validation losses of the digits as surfaces over batch size and learning rate.

`digits_grid.py` made the file. Between its points a surface is bilinear in the logarithms of both,
so its best value is that of the best cell; beside a cell with a diverged run it has diverged too.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]
Run = tuple[int, float, float]

FILE = Path(__file__).with_name("digits_grid.csv")
# Of the searched range, which lies anywhere within the grid's: real users do not know the middle.
LEARNING_RATE_SPAN = math.log(300.0)
# A study that tries each setting with so many seeds; the others say how far it may be trusted.
SEEDS_OF_A_STUDY = 3


@dataclass(frozen=True)
class MeasuredGrid:
    """Loss after one budget at every batch size and learning rate.

    Attributes:
        optimizer: Name of the optimizer, and of the prior that fits.
        sizes: Batch sizes in samples, ascending, (B,).
        rates: Learning rates, ascending, (L,).
        losses: Of each seed, (S, B, L); inf where a run diverged.
    """

    optimizer: str
    sizes: Array
    rates: Array
    losses: Array

    @property
    def name(self) -> str:
        """For tables."""
        return f"digits {self.optimizer}"

    @cached_property
    def mean(self) -> Array:
        """Mean loss over the seeds, (B, L); inf where one of them diverged."""
        return self.losses.mean(0)

    @property
    def batch_sizes(self) -> tuple[int, int]:
        """Smallest and largest."""
        return int(self.sizes[0]), int(self.sizes[-1])

    def learning_rates(self, seed: int) -> tuple[float, float]:
        """A range of 2.5 decades somewhere within the grid."""
        low, high = np.log(self.rates[[0, -1]])
        start = np.random.default_rng(seed).uniform(low, high - LEARNING_RATE_SPAN)
        return math.exp(start), math.exp(start + LEARNING_RATE_SPAN)

    def value(self, batch_size: float, learning_rate: float) -> float:
        """Mean loss there; inf for a run that diverges."""
        (i, s), (j, t) = _cell(self.sizes, batch_size), _cell(self.rates, learning_rate)
        corners = self.mean[i : i + 2, j : j + 2]
        weights = np.outer([1 - s, s], [1 - t, t])
        return float(corners[weights > 0] @ weights[weights > 0])

    @property
    def best(self) -> float:
        """Lowest mean loss."""
        return float(self.mean.min())

    @property
    def median(self) -> float:
        """Median mean loss of all cells."""
        return float(np.median(self.mean))

    @cached_property
    def ridge(self) -> dict[int, float]:
        """Best learning rate at every batch size: of a parabola through the five best-placed cells.

        In the logarithms of loss and learning rate, around the lowest mean; it evens out the seeds.
        """
        rows = zip(self.sizes, self.mean, strict=True)
        return {int(b): self._lowest(np.log(row)) for b, row in rows}

    def studies(self) -> list[list[Run]]:
        """What groups of three seeds measured, (batch size, learning rate, loss) of each run."""
        groups = range(0, max(1, len(self.losses) - SEEDS_OF_A_STUDY + 1), SEEDS_OF_A_STUDY)
        return [
            [
                (int(b), float(lr), float(losses[i, j]))
                for losses in self.losses[first : first + SEEDS_OF_A_STUDY]
                for i, b in enumerate(self.sizes)
                for j, lr in enumerate(self.rates)
            ]
            for first in groups
        ]

    def _lowest(self, log_losses: Array) -> float:
        k = int(log_losses.argmin())
        near = slice(max(k - 2, 0), k + 3)
        x, y = np.log(self.rates[near]), log_losses[near]
        finite = np.isfinite(y)
        curvature, slope, _ = np.polyfit(x[finite], y[finite], 2)
        step = math.log(self.rates[1] / self.rates[0])
        bottom = -slope / (2 * curvature) if curvature > 0 else x[y.argmin()]
        centre = math.log(self.rates[k])
        return math.exp(min(max(bottom, centre - step), centre + step))


def measured_grids(file: Path = FILE) -> Iterator[MeasuredGrid]:
    """One surface for each optimizer in the file."""
    runs: defaultdict[str, dict[tuple[int, float, int], float]] = defaultdict(dict)
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            setting = int(row["batch_size"]), float(row["lr"]), int(row["seed"])
            runs[row["optimizer"]][setting] = float(row["valid_loss"])
    for optimizer, losses in sorted(runs.items()):
        sizes, rates, seeds = (sorted({key[k] for key in losses}) for k in range(3))
        table = np.array([[[losses[b, lr, s] for lr in rates] for b in sizes] for s in seeds])
        yield MeasuredGrid(optimizer, np.array(sizes, float), np.array(rates), table)


def _cell(points: Array, at: float) -> tuple[int, float]:
    """Index of the point below and how far towards the next one it lies, on a log scale."""
    i = int(np.clip(np.searchsorted(points, at, side="right") - 1, 0, len(points) - 2))
    part = math.log(at / points[i]) / math.log(points[i + 1] / points[i])
    return i, min(max(part, 0.0), 1.0)
