"""The noisy quadratic model: exact expected losses of SGD over batch size and learning rate.

Zhang et al. 2019, arXiv 1907.04164. Symbols, per dimension i: h curvature, c/B variance of the
gradient, a learning rate, t steps;

    E l(t) = (1 - a h)^(2t) l(0) + (1 - (1 - a h)^(2t)) a c / (2 B (2 - a h)),

which diverges where |1 - a h| > 1. A preconditioner h^-q stands for Adam-like optimizers:
h -> h^(1-q), c -> c h^-q, the loss being unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize


DIMENSIONS = 10_000
BATCH_SIZES = (16, 4096)
LEARNING_RATE_SPAN = math.log(1000.0)
STABLE_BELOW = 2.0  # learning rate; the largest curvature is 1
WORST = 10.0  # times the initial loss: what a diverged run counts as


@dataclass(frozen=True)
class Surface:
    """Log loss against batch size and learning rate under one budget.

    Attributes:
        name: For tables.
        decay: p of the spectrum h_i = i^-p.
        preconditioner: q.
        budget: "seconds" of a device that is busy from `knee` samples on, or "samples".
        knee: Batch size in samples at which a step takes twice as long as with one.
        amount: Steps of a batch of one within the budget, or samples.
    """

    name: str
    decay: float
    preconditioner: float
    budget: str
    knee: float
    amount: float

    @property
    def batch_sizes(self) -> tuple[int, int]:
        """Smallest and largest."""
        return BATCH_SIZES

    @property
    def optimizer(self) -> str:
        """Name of the prior that fits."""
        return "sgd" if self.preconditioner == 0 else "adamw"

    def steps(self, batch_size: float) -> float:
        """Optimizer steps within the budget."""
        if self.budget == "samples":
            return self.amount / batch_size
        return self.amount / (1.0 + batch_size / self.knee)

    def value(self, batch_size: float, learning_rate: float) -> float:
        """Log expected loss at the end of the budget."""
        h = np.arange(1.0, DIMENSIONS + 1) ** -self.decay
        curvature, noise = h ** (1 - self.preconditioner), h ** (1 - self.preconditioner)
        initial = 0.5 * h
        factor = 1.0 - learning_rate * curvature
        if np.abs(factor).max() >= 1.0:
            return math.log(WORST * initial.sum())
        left = np.exp(2.0 * self.steps(batch_size) * np.log(np.abs(factor) + 1e-300))
        # In the preconditioned coordinates the loss of a dimension is 0.5 * curvature * x^2.
        steady = learning_rate * noise / (2.0 * batch_size * (2.0 - learning_rate * curvature))
        return math.log(min((left * initial + (1.0 - left) * steady).sum(), WORST * initial.sum()))

    def best_learning_rate(self, batch_size: float) -> float:
        """By golden section on a grid's best cell."""
        grid = np.exp(np.linspace(math.log(1e-5), math.log(1.999), 80))
        values = [self.value(batch_size, lr) for lr in grid]
        i = int(np.argmin(values))
        fine = np.exp(np.linspace(*np.log(grid[[max(i - 1, 0), min(i + 1, 79)]]), 40))
        return float(fine[np.argmin([self.value(batch_size, lr) for lr in fine])])

    @cached_property
    def ridge(self) -> dict[int, float]:
        """Best learning rate at powers of two."""
        sizes = [2**k for k in range(4, 13)]
        return {b: self.best_learning_rate(b) for b in sizes}

    def studies(self) -> list[list[tuple[int, float, float]]]:
        """Values at the ridge's batch sizes and seven learning rates for each, of two draws.

        They are drawn one from each seventh of the searched range, since no two trials of a study
        have the same. A run that diverges has no value (inf), as when a real one ends in NaN.
        """
        low, high = np.log(self.learning_rates(0))
        studies = []
        for seed in range(2):
            rng = np.random.default_rng(seed)
            share = (np.arange(7) + rng.random((len(self.ridge), 7))) / 7
            rates = np.exp(low + share * (high - low)).tolist()
            runs = [(b, lr) for b, row in zip(self.ridge, rates, strict=True) for lr in row]
            studies.append(
                [(b, lr, self.value(b, lr) if lr < STABLE_BELOW else math.inf) for b, lr in runs]
            )
        return studies

    @cached_property
    def best(self) -> float:
        """Lowest value, also between the batch sizes of the ridge."""
        start = min(self.ridge.items(), key=lambda at: self.value(*at))
        found = minimize(
            lambda at: self.value(*np.exp(at)),
            np.log(start),
            method="Nelder-Mead",
            bounds=[tuple(np.log(BATCH_SIZES)), (None, math.log(STABLE_BELOW))],
            options={"xatol": 1e-3, "fatol": 1e-6},
        )
        return min(float(found.fun), self.value(*start))

    def learning_rates(self, seed: int) -> tuple[float, float]:
        """A range of three decades in which the best is not in the middle, as with real users."""
        middle = float(np.mean(np.log(list(self.ridge.values()))))
        middle += float(np.random.default_rng(seed).uniform(-1.0, 1.0)) * math.log(5.0)
        return math.exp(middle - LEARNING_RATE_SPAN / 2), math.exp(middle + LEARNING_RATE_SPAN / 2)

    @cached_property
    def median(self) -> float:
        """Median value over the range in the middle."""
        rng = np.random.default_rng(0)
        low, high = np.mean(np.log(list(self.ridge.values()))) + LEARNING_RATE_SPAN / 2 * np.array(
            [-1.0, 1.0]
        )
        sizes = np.exp(rng.uniform(*np.log(BATCH_SIZES), 200))
        rates = np.exp(rng.uniform(low, high, 200))
        return float(np.median([self.value(b, lr) for b, lr in zip(sizes, rates, strict=True)]))


def surfaces() -> Iterator[Surface]:
    """Twelve surfaces: two spectra, SGD and Adam-like, wall-clock and sample budgets."""
    for decay in (0.8, 1.2):
        for q in (0.0, 0.5):
            kind = f"p={decay:g} {'sgd' if q == 0 else 'adam'}"
            for knee in (32.0, 256.0):
                yield Surface(f"{kind} seconds knee={knee:g}", decay, q, "seconds", knee, 2e3)
            yield Surface(f"{kind} samples", decay, q, "samples", 1.0, 2e5)
