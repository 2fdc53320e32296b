"""Trials to a good batch size and learning rate: CoupledSampler against Optuna's samplers.

    python benchmarks/sampler.py --seeds 10 --trials 30
    python benchmarks/sampler.py --ridge            # recommend() for batch sizes left out

On the noisy quadratic model, whose every value is exact. regret(n) = (best of n trials - best of
the surface) / (median - best); trials: until the regret is at most 0.1, a miss counts as
ten more than there were.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import optuna
from noisy_quadratic import BATCH_SIZES
from noisy_quadratic import Surface
from noisy_quadratic import surfaces
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import GPSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler

from bs_optuna import CoupledSampler
from bs_optuna import recommend


SAMPLERS: dict[str, Callable[[int, str], BaseSampler]] = {
    "random": lambda seed, optimizer: RandomSampler(seed=seed),
    "cmaes": lambda seed, optimizer: CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "tpe": lambda seed, optimizer: TPESampler(seed=seed),
    "tpe, 3 random": lambda seed, optimizer: TPESampler(seed=seed, n_startup_trials=3),
    "gp, 3 random": lambda seed, optimizer: GPSampler(seed=seed, n_startup_trials=3),
    "coupled": lambda seed, optimizer: CoupledSampler(prior=optimizer, seed=seed),
}
THRESHOLD = 0.1
MARKS = (5, 10, 20, 30)


def regrets(
    surface: Surface, sampler: BaseSampler, seed: int, trials: int
) -> tuple[np.ndarray, float]:
    """Regret after each trial, and seconds of the sampler a trial."""
    study = optuna.create_study(sampler=sampler)
    low, high = surface.learning_rates(seed)
    spent, values = 0.0, []
    for _ in range(trials):
        start = time.perf_counter()
        trial = study.ask()
        batch_size = trial.suggest_int("batch_size", *BATCH_SIZES, log=True)
        lr = trial.suggest_float("lr", low, high, log=True)
        spent += time.perf_counter() - start
        values.append(surface.value(batch_size, lr))
        study.tell(trial, values[-1])
    best = np.minimum.accumulate(values)
    return (best - surface.best) / (surface.median - surface.best), spent / trials


def compare(names: list[str], seeds: int, trials: int) -> None:
    """Print the table."""
    marks = [n for n in MARKS if n <= trials]
    print(f"{'sampler':16s}" + "".join(f"r@{n:<6d}" for n in marks) + "trials  ms/ask")
    for name in names:
        curves, seconds = [], []
        for surface in surfaces():
            for seed in range(seeds):
                made = SAMPLERS[name](seed, surface.optimizer)
                curve, spent = regrets(surface, made, seed, trials)
                curves.append(curve)
                seconds.append(spent)
        c = np.array(curves)
        hit = np.where((c <= THRESHOLD).any(1), (c <= THRESHOLD).argmax(1) + 1, trials + 10)
        row = "".join(f"{c[:, n - 1].mean():<8.4f}" for n in marks)
        print(f"{name:16s}{row}{hit.mean():6.1f}{1e3 * np.mean(seconds):8.1f}", flush=True)


def ridge() -> None:
    """Leave each batch size out of a grid and ask for its learning rate.

    Where the best one is on the brink of divergence (within a factor of 1.5), a grid cannot show
    it and the answer is lower, on the safe side; such batch sizes are counted apart.
    """
    found: dict[str, list[tuple[bool, bool]]] = {"interior": [], "edge": [], "brink": []}
    for surface in surfaces():
        sizes = list(surface.ridge)
        for left_out in sizes:
            advice = recommend(
                _grid_study(surface, [b for b in sizes if b != left_out]),
                batch_size=left_out,
                prior=surface.optimizer,
            )
            truth, interval = surface.ridge[left_out], advice.learning_rate_interval
            close = abs(math.log(advice.learning_rate / truth)) <= math.log(1.5)
            place = "edge" if left_out in (sizes[0], sizes[-1]) else "interior"
            if truth * 1.5 > surface.stable_below:
                place = "brink"
            found[place].append((close, interval[0] <= truth <= interval[1]))
    for place, answers in found.items():
        close, covered = np.mean(answers, axis=0)
        print(
            f"{place:9s} {len(answers)} batch sizes: within a factor of 1.5 {close:.0%}, "
            f"90 % interval covers {covered:.0%}"
        )


def _grid_study(surface: Surface, batch_sizes: list[int]) -> optuna.Study:
    low, high = surface.learning_rates(0)
    space = {
        "batch_size": IntDistribution(*BATCH_SIZES, log=True),
        "lr": FloatDistribution(low, high, log=True),
    }
    study = optuna.create_study()
    for batch_size in batch_sizes:
        for lr in np.exp(np.linspace(math.log(low), math.log(high), 7)):
            params = {"batch_size": batch_size, "lr": min(max(float(lr), low), high)}
            study.add_trial(
                optuna.create_trial(
                    params=params, distributions=space, value=surface.value(**_named(params))
                )
            )
    return study


def _named(params: dict[str, float]) -> dict[str, float]:
    return {"batch_size": params["batch_size"], "learning_rate": params["lr"]}


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--sampler", action="append", choices=sorted(SAMPLERS))
    parser.add_argument("--ridge", action="store_true", help="recommend() for batch sizes left out")
    flags = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if flags.ridge:
        ridge()
    else:
        compare(flags.sampler or list(SAMPLERS), flags.seeds, flags.trials)


if __name__ == "__main__":
    main()
