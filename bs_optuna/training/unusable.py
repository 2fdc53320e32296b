"""Losses and metrics that a training cannot go on with, and what to say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn

from bs_optuna.errors import DivergedError
from bs_optuna.errors import TaskError
from bs_optuna.training.batches import Batch
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import call_model
from bs_optuna.training.batches import moved
from bs_optuna.training.batches import take
from bs_optuna.training.snapshot import device_of
from bs_optuna.training.weighted_pass import LossFunction


def check_training_loss(loss: float, samples: int) -> None:
    """Checks the loss of a step after so many samples.

    Raises:
        DivergedError: It is not finite.
    """
    if not math.isfinite(loss):
        raise DivergedError(f"training loss {loss} after {samples} samples")


def check_values(values: Mapping[str, float], samples: int) -> None:
    """Checks the loss and the metrics of an evaluation after so many samples.

    Raises:
        DivergedError: One of them is not finite.
    """
    loss = values["loss"]
    if not math.isfinite(loss):
        raise DivergedError(f"validation loss {loss} after {samples} samples")
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"validation {name} {value} after {samples} samples, with a loss of {loss:.4g}; "
                "mend that metric or leave it out",
                metric=name,
            )


def check_kind_of_loss(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> None:
    """Says what the loss returns if that is why no gradient could be taken; for after a failure.

    Raises:
        TaskError: It is no tensor of one number.
    """
    found = ""
    with suppress(Exception), torch.no_grad():  # what failed may be something else
        part = moved(take(batch, slice(0, 2)), device_of(model, loss_fn))
        inputs, targets = part
        loss: object = loss_fn(call_model(model, inputs), targets)
        found = type(loss).__name__
        if isinstance(loss, torch.Tensor):
            shape = f"tensor of shape {list(loss.shape)} for {batch_length(part)} samples"
            found = "" if loss.numel() == 1 else shape
    if found:
        raise TaskError(
            f"loss returned a {found}; must return one number as a tensor, and nothing else: the "
            "mean over the samples, such as losses.mean()."
        )


def check_had_targets(had: bool) -> None:
    """Refuses a training of which no batch has held a target.

    Raises:
        TaskError: That is so.
    """
    if not had:
        raise TaskError(
            "count was 0 for every batch up to the first evaluation, so that nothing was trained; "
            "must be what the mean loss is taken over."
        )
