"""An existing Optuna study, objective unchanged: only the sampler is new.

    python examples/embed_sampler.py

Trains a small network on the digits at every trial, then asks for the best setting found and for
the learning rate of a batch size that was never tried.
"""

from __future__ import annotations

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn

from bs_optuna import CoupledSampler
from bs_optuna import recommend


digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
y = torch.tensor(digits.target)


def objective(trial: optuna.Trial) -> float:
    """The study's own objective; it knows nothing of bs_optuna."""
    batch_size = trial.suggest_categorical("batch_size", [16, 32, 64, 128, 256])
    lr = trial.suggest_float("lr", 1e-4, 1e0, log=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(1400).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x[1400:]), y[1400:]).item()


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=CoupledSampler(prior="sgd", seed=0))
    study.optimize(objective, n_trials=15)

    best = recommend(study)
    low, high = best.learning_rate_interval
    print(f"batch size {best.batch_size}, learning rate {best.learning_rate:.3g}")
    print(f"best learning rate there, 90 %: {low:.2g} to {high:.2g}")

    untried = recommend(study, batch_size=100)
    print(f"for batch size 100: learning rate {untried.learning_rate:.3g}")
