"""The 1,797 handwritten digits that come with scikit-learn, for a small convolutional network."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from bs_optuna.training.task import TrainingTask


TEST_FRACTION = 0.15
VALID_FRACTION = 0.15


def task() -> TrainingTask:
    """1,257 images to train on, 270 to compare trials on, 270 for the final test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target)
    # The split is always the same: a study that is resumed must not move images between its parts.
    rest, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0
    )
    train, valid = train_test_split(
        rest,
        test_size=VALID_FRACTION / (1 - TEST_FRACTION),
        stratify=labels[rest],
        random_state=0,
    )
    return TrainingTask(
        name="digits",
        model=build_model,
        train_data=(images[train], labels[train]),
        valid_data=(images[valid], labels[valid]),
        test_data=(images[test], labels[test]),
        loss=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
    )


def build_model() -> nn.Module:
    """Two convolutions and a classifier; (N, 1, 8, 8) images to (N, 10) logits; 48,074 weights.

    Group normalization, because batch normalization would make another function of every
    microbatch size.
    """
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Part of the samples whose largest logit is that of their label."""
    return (logits.argmax(dim=-1) == labels).float().mean()
