"""What it is worth to know that the best learning rate of SGD is proportional to 1 - momentum.

    OMP_NUM_THREADS=1 python benchmarks/noisy_momentum.py

The noisy quadratic model (Zhang et al. 2019, arXiv 1907.04164) with momentum, tuned over batch
size, learning rate and momentum. Symbols, per dimension: h curvature, c/B variance of the gradient,
a learning rate, m momentum, w weight, v velocity. A step is v <- m v + h w + noise, w <- w - a v,
so the second moments S of (w, v) go as

    S <- A S A' + Q,   A = [[1 - a h, -a m], [h, m]],   Q = (c/B) [[a^2, -a], [-a, 1]],

and the expected loss is h S_ww / 2. It is exact; no setting of the sampler was chosen on it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from bs_optuna import CoupledSampler
from bs_optuna import ScalingPrior


# Dimensions 1 to 10,000, one for each of as many groups of about the same logarithmic width.
_GROUPS = 64
_LAST = 10_000
BATCH_SIZES = (16, 4096)
MOMENTA = (0.0, 0.997)
MARKS = (5, 10, 20, 30)
WORST = 10.0  # times the initial loss: what a diverged run counts as


@dataclass(frozen=True)
class Surface:
    """Log loss at the end of a budget.

    Attributes:
        decay: p of the spectrum h_i = i^-p.
        knee: Batch size at which a step takes twice as long as with one; None: equal samples.
        amount: Steps of a batch of one within the budget, or samples.
    """

    decay: float
    knee: float | None
    amount: float

    def steps(self, batch_size: float) -> int:
        """Optimizer steps within the budget."""
        if self.knee is None:
            return max(int(self.amount / batch_size), 1)
        return max(int(self.amount / (1.0 + batch_size / self.knee)), 1)

    def value(self, batch_size: float, learning_rate: float, momentum: float) -> float:
        """Log expected loss; at most that of ten times the initial one."""
        edges = np.geomspace(1.0, _LAST + 1.0, _GROUPS + 1)
        h = np.sqrt(edges[:-1] * edges[1:]) ** -self.decay
        moments = second_moments(h, h / batch_size, learning_rate, momentum, self.steps(batch_size))
        loss = float(0.5 * np.diff(edges) @ (h * moments))
        most = WORST * float(0.5 * np.diff(edges) @ h)
        return math.log(min(loss, most)) if math.isfinite(loss) else math.log(most)


def second_moments(
    h: np.ndarray, variance: np.ndarray, a: float, m: float, steps: int
) -> np.ndarray:
    """S_ww after some steps from w = 1, v = 0, for each curvature (D,); inf where it diverges."""
    p, q = 1.0 - a * h, np.full_like(h, -a * m)
    r, s = h, np.full_like(h, m)
    zero, one = np.zeros_like(h), np.ones_like(h)
    step = np.array(
        [
            [p * p, 2 * p * q, q * q, variance * a * a],
            [p * r, p * s + q * r, q * s, -variance * a],
            [r * r, 2 * r * s, s * s, variance],
            [zero, zero, zero, one],
        ]
    ).transpose(2, 0, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        power = np.linalg.matrix_power(step, steps)
        moments = power[:, 0, 0] + power[:, 0, 3]
    return np.where(np.isfinite(moments), moments, math.inf)


def surfaces() -> list[Surface]:
    """Two spectra, wall-clock and sample budgets."""
    return [
        Surface(decay, knee, amount)
        for decay in (0.8, 1.2)
        for knee, amount in ((32.0, 2e3), (256.0, 2e3), (None, 2e5))
    ]


def without_coupling(seed: int) -> BaseSampler:
    """CoupledSampler that takes momentum for a parameter like any other."""
    prior = replace(ScalingPrior.for_optimizer("sgd"), momentum_exponent=0.0)
    return CoupledSampler(prior=prior, seed=seed)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "coupled": lambda seed: CoupledSampler(prior="sgd", seed=seed),
    "coupled, but not to momentum": without_coupling,
    "tpe, 3 random": lambda seed: TPESampler(seed=seed, n_startup_trials=3),
    "gp, 3 random": lambda seed: GPSampler(seed=seed, n_startup_trials=3),
}


def losses(surface: Surface, sampler: BaseSampler, seed: int, trials: int) -> np.ndarray:
    """Lowest log loss after each trial; the range of learning rates is not centred on the best."""
    middle = math.log(0.05) + float(np.random.default_rng(seed).uniform(-1.0, 1.0)) * math.log(5.0)
    low, high = (math.exp(middle + side * math.log(100.0)) for side in (-1.0, 1.0))
    study = optuna.create_study(sampler=sampler)
    values = []
    for _ in range(trials):
        trial = study.ask()
        batch_size = trial.suggest_int("batch_size", *BATCH_SIZES, log=True)
        lr = trial.suggest_float("lr", low, high, log=True)
        values.append(surface.value(batch_size, lr, trial.suggest_float("momentum", *MOMENTA)))
        study.tell(trial, values[-1], state=TrialState.COMPLETE)
    lowest: np.ndarray = np.minimum.accumulate(values)
    return lowest


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="runs on each surface")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, list[np.ndarray]] = {name: [] for name in arguments.samplers}
    print("log loss above the lowest that any sampler found, mean ± standard error over runs")
    for surface in surfaces():
        curves = {
            name: [
                losses(surface, SAMPLERS[name](seed), seed, MARKS[-1])
                for seed in range(arguments.seeds)
            ]
            for name in arguments.samplers
        }
        best = min(curve.min() for runs in curves.values() for curve in runs)
        for name, runs in curves.items():
            found[name] += [curve - best for curve in runs]
    print(f"{'':30s}" + "".join(f"{f'after {mark}':>18s}" for mark in MARKS))
    for name, runs in found.items():
        table = np.array(runs)[:, np.array(MARKS) - 1]
        error = table.std(0, ddof=1) / math.sqrt(len(table))
        cells = (f"{m:.3f} ± {e:.3f}" for m, e in zip(table.mean(0), error, strict=True))
        print(f"{name:30s}" + "".join(f"{cell:>18s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
