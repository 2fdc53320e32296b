"""Studies of a smooth valley along a ridge, whose bottom is at a loss of 2."""

from __future__ import annotations

import math
from collections.abc import Callable

import optuna

from bs_optuna.sampling import CoupledSampler


Objective = Callable[[optuna.Trial], float]


def best_learning_rate(batch_size: float) -> float:
    return 3e-3 / (1.0 + 200.0 / batch_size)


def loss(batch_size: float, lr: float) -> float:
    off = math.log(lr / best_learning_rate(batch_size))
    return 2.0 + 0.1 * off**2 + 0.02 * math.log(batch_size / 128) ** 2


def objective(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    return loss(trial.suggest_int("batch_size", 16, 4096, log=True), lr)


def run(
    objective: Objective = objective,
    n_trials: int = 12,
    *,
    direction: str = "minimize",
    n_jobs: int = 1,
    sampler: CoupledSampler | None = None,
) -> optuna.Study:
    sampler = sampler or CoupledSampler(prior="adamw", seed=0)
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.optimize(objective, n_trials=n_trials, n_jobs=n_jobs)
    return study


def params(study: optuna.Study) -> list[dict[str, object]]:
    return [t.params for t in study.trials]
