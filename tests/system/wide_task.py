"""A task whose samples are large: about 1.6 MB of activations each, in a model of 5 kB."""

from __future__ import annotations

import torch
from torch import nn

from bs_optuna.training import TrainingTask


def task() -> TrainingTask:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(600, 1, 32, 32, generator=generator)
    labels = (images.mean(dim=(1, 2, 3)) > 0).long()
    return TrainingTask(
        name="wide",
        model=lambda: nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(64, 2),
        ),
        train_data=(images[:520], labels[:520]),
        valid_data=(images[520:560], labels[520:560]),
        test_data=(images[560:], labels[560:]),
        loss=nn.functional.cross_entropy,
    )  # fmt: skip
