"""A task of one's own for the command line.

    python -m bs_optuna.tune examples/my_task.py --trials 10 --lr 1e-3:1 --batch-size 4:64

Wine cultivars from 13 measurements, with SGD; judged by accuracy.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from torch import nn

from bs_optuna.training import TrainingTask


def task() -> TrainingTask:
    """What the command line looks for."""
    wine = load_wine()
    x = torch.tensor(wine.data, dtype=torch.float32)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    y = torch.tensor(wine.target)
    rest, test = train_test_split(range(len(y)), test_size=30, stratify=y, random_state=0)
    train, valid = train_test_split(rest, test_size=30, stratify=y[rest], random_state=0)
    return TrainingTask(
        name="wine",
        model=lambda: nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3)),
        train_data=(x[train], y[train]),
        valid_data=(x[valid], y[valid]),
        test_data=(x[test], y[test]),
        loss=nn.functional.cross_entropy,
        metrics={"accuracy": lambda logits, labels: (logits.argmax(1) == labels).float().mean()},
        optimizer="sgd",
    )
