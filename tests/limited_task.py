"""A task on a device that holds so many samples at a time, and trials of it."""

from __future__ import annotations

from typing import Any

import optuna
import torch
from torch import nn

from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask


SAMPLES = 128


class Limited(nn.Module):
    """A linear model whose device holds no more than ``fits`` samples at a time in training."""

    seen: list[int]

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.fits = fits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        outputs: torch.Tensor = self.net(x)
        return outputs


def make_task(*, fits: int = 10**9, **changes: Any) -> TrainingTask:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator)
    y = x[:, :3].argmax(dim=1)
    Limited.seen = []
    arguments: dict[str, Any] = {
        "model": lambda: Limited(fits),
        "train_data": (x, y),
        "valid_data": (x[:32], y[:32]),
        "test_data": (x[32:64], y[32:64]),
        "loss": nn.functional.cross_entropy,
        "metrics": {"accuracy": lambda o, t: (o.argmax(-1) == t).float().mean()},
        "optimizer": "sgd",
    }
    return TrainingTask(**{**arguments, **changes})


def make_objective(task: TrainingTask, **changes: Any) -> TrainingObjective:
    arguments: dict[str, Any] = {
        "budget": Budget("samples", 512),
        "batch_size": (8, 64),
        "learning_rate": (1e-3, 1e1),
        "device": torch.device("cpu"),
    }
    return TrainingObjective(task, **{**arguments, **changes})


def run_trial(objective: TrainingObjective, study: optuna.Study, **params: float) -> Any:
    study.enqueue_trial(params)
    study.optimize(objective, n_trials=1)
    return study.get_trials()[-1]
