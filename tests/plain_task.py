"""A plain task that a test changes in what it is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bs_optuna.training import TrainingTask


def plain_task(samples: int = 256, **changes: Any) -> TrainingTask:
    """A wide network on noise; train_data, loss and so on may be others."""
    data = (torch.randn(samples, 16), torch.zeros(samples, dtype=torch.long))
    arguments: dict[str, Any] = {
        "name": "plain",
        "model": lambda: nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 10)),
        "train_data": data,
        "valid_data": data,
        "loss": nn.functional.cross_entropy,
    }
    return TrainingTask(**{**arguments, **changes})
