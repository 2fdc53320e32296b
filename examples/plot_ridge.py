"""A picture of a study: its trials, and the learning rate that they support at every batch size.

    python examples/plot_ridge.py

Trains the digits for half a second a trial, so that the fastest batch size wins, and writes
ridge.png.
Needs the extra "plot": python -m pip install -c constraints.txt -e ".[plot]"
"""

from __future__ import annotations

import matplotlib  # noqa: F401 - missed here if it is not installed, not after the training
import optuna
import torch

from bs_optuna import CoupledSampler
from bs_optuna.report.figure import ridge_figure
from bs_optuna.tasks import digits
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_flush_denormal(True)
    objective = TrainingObjective(
        digits.task(),
        budget=Budget("seconds", 0.5),
        batch_size=(8, 512),
        learning_rate=(1e-4, 1e-1),
    )
    study = optuna.create_study(sampler=CoupledSampler(prior="adamw", seed=0))
    study.optimize(objective, n_trials=25)
    ridge_figure(study).savefig("ridge.png")
    print(f"ridge.png: {len(study.trials)} trials, best {study.best_value:.4f}")
