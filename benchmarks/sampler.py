"""Trials to a good batch size and learning rate: CoupledSampler against other samplers.

    OMP_NUM_THREADS=1 python benchmarks/sampler.py --plot regret.png   # a few minutes
    OMP_NUM_THREADS=1 python benchmarks/sampler.py --ridge    # recommend() where trials are few

On two sources that no setting of the sampler was chosen on: the noisy quadratic model, whose every
value is exact, and the digits, measured on a grid (`digits_grid.py`). regret(n) = (best of n
trials - best of the surface) / (median - best), with the standard error over runs; to 0.1: trials
until the regret is at most 0.1, a miss counts as ten more than there were.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import optuna
from measured_grid import measured_grids
from noisy_quadratic import surfaces
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import GPSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from regret_figure import regret_figure

from bs_optuna import CoupledSampler
from bs_optuna import recommend
from bs_optuna.sampling.recommend import recommend_each


class Surface(Protocol):
    """An objective over batch size and learning rate whose best is known."""

    optimizer: str
    batch_sizes: tuple[int, int]
    best: float
    median: float
    ridge: dict[int, float]

    def learning_rates(self, seed: int) -> tuple[float, float]:
        """The range that a run with that seed searches."""

    def value(self, batch_size: float, learning_rate: float) -> float:
        """Lower is better; inf for a run that diverges."""

    def studies(self) -> list[list[tuple[int, float, float]]]:
        """Batch sizes, learning rates and values of runs; several lists where seeds allow."""


BOTORCH = "botorch, 3 random"
BOTORCH_NEEDS = ("optuna_integration", "botorch")  # from PyPI; not among the dependencies


def _botorch(seed: int, optimizer: str) -> BaseSampler:
    from optuna_integration import BoTorchSampler

    return BoTorchSampler(seed=seed, n_startup_trials=3)


SOURCES: dict[str, Callable[[], list[Surface]]] = {
    "noisy quadratic model": lambda: list(surfaces()),
    "digits": lambda: list(measured_grids()),
}
SAMPLERS: dict[str, Callable[[int, str], BaseSampler]] = {
    "coupled": lambda seed, optimizer: CoupledSampler(prior=optimizer, seed=seed),
    "tpe": lambda seed, optimizer: TPESampler(seed=seed),
    "tpe, 3 random": lambda seed, optimizer: TPESampler(seed=seed, n_startup_trials=3),
    "gp, 3 random": lambda seed, optimizer: GPSampler(seed=seed, n_startup_trials=3),
    BOTORCH: _botorch,
    "cmaes": lambda seed, optimizer: CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed, optimizer: RandomSampler(seed=seed),
}
THRESHOLD = 0.1
MARKS = (5, 10, 20, 30)
# Regret of a run that has seen nothing but divergence; the median cell has 1.
NOTHING_YET = 2.0


def regrets(
    surface: Surface, sampler: BaseSampler, seed: int, trials: int
) -> tuple[np.ndarray, float]:
    """Regret after each trial, and seconds of the sampler a trial."""
    values, spent = searched(optuna.create_study(sampler=sampler), surface, seed, trials)
    best = np.minimum.accumulate(values)
    regret = (best - surface.best) / (surface.median - surface.best)
    return np.where(np.isfinite(regret), regret, NOTHING_YET), spent / trials


def searched(
    study: optuna.Study, surface: Surface, seed: int, trials: int
) -> tuple[list[float], float]:
    """Values of so many trials, and seconds of the sampler."""
    low, high = surface.learning_rates(seed)
    spent, values = 0.0, []
    for _ in range(trials):
        start = time.perf_counter()
        trial = study.ask()
        batch_size = trial.suggest_int("batch_size", *surface.batch_sizes, log=True)
        lr = trial.suggest_float("lr", low, high, log=True)
        spent += time.perf_counter() - start
        values.append(surface.value(batch_size, lr))
        if math.isfinite(values[-1]):
            study.tell(trial, values[-1])
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return values, spent


def compare(names: list[str], runs: int, trials: int) -> dict[str, dict[str, np.ndarray]]:
    """Print a table for each source and one for all; regrets (runs, trials) by source and name."""
    curves: dict[str, dict[str, np.ndarray]] = {}
    for source, load in SOURCES.items():
        known = load()
        _heading(f"{source}, {len(known)} surfaces, {runs} runs", trials)
        curves[source] = {}
        for name in names:
            found = []
            for i in range(runs):
                surface, seed = known[i % len(known)], i // len(known)
                found.append(
                    regrets(surface, SAMPLERS[name](seed, surface.optimizer), seed, trials)
                )
            curves[source][name] = np.array([curve for curve, _ in found])
            _row(name, curves[source][name], f"{1e3 * np.mean([s for _, s in found]):8.1f}")
    _heading("all", trials)
    for name in names:
        _row(name, np.concatenate([curves[source][name] for source in SOURCES]), "")
    return curves


def _heading(title: str, trials: int) -> None:
    marks = "".join(f"r@{n:<12d}" for n in MARKS if n <= trials)
    print(f"\n{title}\n{'sampler':20s}{marks}to 0.1  ms/ask")


def _row(name: str, curves: np.ndarray, milliseconds: str) -> None:
    trials = curves.shape[1]
    cells = ""
    for n in MARKS:
        if n <= trials:
            at = curves[:, n - 1]
            cells += f"{at.mean():.3f} ± {at.std(ddof=1) / math.sqrt(len(at)):.3f} "
    reached = curves <= THRESHOLD
    hit = np.where(reached.any(1), reached.argmax(1) + 1, trials + 10)
    print(f"{name:20s}{cells}{hit.mean():6.1f}{milliseconds}", flush=True)


def ridge() -> None:
    """Ask for learning rates: of batch sizes left out, and in studies of the sampler itself."""
    for source, load in SOURCES.items():
        found: dict[str, list[tuple[bool, bool]]] = {"interior": [], "edge": [], "own": []}
        for surface in load():
            for place, *answer in left_out(surface) + own_trials(surface):
                found[place].append(tuple(answer))
        print(f"\n{source}")
        for place, answers in found.items():
            close, covered = np.mean(answers, axis=0)
            print(
                f"{place:9s} {len(answers)} batch sizes: within a factor of 1.5 {close:.0%}, "
                f"90 % interval covers {covered:.0%}"
            )


def left_out(surface: Surface) -> list[tuple[str, bool, bool]]:
    """Where each batch size lies, whether its answer is close, whether its interval holds it."""
    sizes, answers = list(surface.ridge), []
    for runs in surface.studies():
        for size, truth in surface.ridge.items():
            study = _study([run for run in runs if run[0] != size], runs)
            advice = recommend(study, batch_size=size, prior=surface.optimizer)
            low, high = advice.learning_rate_interval
            place = "edge" if size in (sizes[0], sizes[-1]) else "interior"
            close = abs(math.log(advice.learning_rate / truth)) <= math.log(1.5)
            answers.append((place, close, low <= truth <= high))
    return answers


def own_trials(surface: Surface, studies: int = 3) -> list[tuple[str, bool, bool]]:
    """The same for each batch size after 30 trials of CoupledSampler, most near the best one."""
    answers = []
    for seed in range(studies):
        sampler = CoupledSampler(prior=surface.optimizer, seed=seed)
        study = optuna.create_study(sampler=sampler)
        searched(study, surface, seed, 30)
        lowest, highest = surface.learning_rates(seed)
        sizes = [size for size, truth in surface.ridge.items() if lowest < truth < highest]
        for advice in recommend_each(study, sizes):
            truth = surface.ridge[advice.batch_size]
            low, high = advice.learning_rate_interval
            close = abs(math.log(advice.learning_rate / truth)) <= math.log(1.5)
            answers.append(("own", close, low <= truth <= high))
    return answers


def _study(
    runs: list[tuple[int, float, float]], everything: list[tuple[int, float, float]]
) -> optuna.Study:
    """A study of the runs; the ranges are those of everything."""
    sizes, rates, _ = zip(*everything, strict=True)
    space = {
        "batch_size": IntDistribution(min(sizes), max(sizes), log=True),
        "lr": FloatDistribution(min(rates), max(rates), log=True),
    }
    study = optuna.create_study()
    for batch_size, lr, value in runs:
        ended = math.isfinite(value)
        study.add_trial(
            optuna.create_trial(
                params={"batch_size": batch_size, "lr": lr},
                distributions=space,
                value=value if ended else None,
                state=TrialState.COMPLETE if ended else TrialState.PRUNED,
            )
        )
    return study


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=24, help="for each sampler and source")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--sampler", action="append", choices=sorted(SAMPLERS))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="regret against trials")
    parser.add_argument("--ridge", action="store_true", help="recommend() where trials are few")
    flags = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    warnings.filterwarnings("ignore", module="botorch")
    if flags.ridge:
        ridge()
        return
    names = flags.sampler or list(SAMPLERS)
    if BOTORCH in names and not all(map(importlib.util.find_spec, BOTORCH_NEEDS)):
        names.remove(BOTORCH)
        print(f"{BOTORCH} is left out: {' and '.join(BOTORCH_NEEDS)} are not both installed")
    curves = compare(names, flags.runs, flags.trials)
    if flags.plot:
        regret_figure(curves).savefig(flags.plot)


if __name__ == "__main__":
    main()
