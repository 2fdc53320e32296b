"""ThrowAwayTraining: a new model of a task and its optimizer, for steps that only measure."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from bs_optuna.training.backward import AccumulatedBackward
from bs_optuna.training.pass_attempt import BackwardResult
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.stepping import GuardedStep
from bs_optuna.training.task import TrainingTask


# BatchNorm refuses a single sample.
FEWEST_SAMPLES = 2
# The model is thrown away, and should not diverge before that.
LEARNING_RATE = 1e-6


class ThrowAwayTraining:
    """Steps as a trial takes them, of a model that nobody keeps.

    Args:
        task: What is trained.
        device: Where it is trained.

    Attributes:
        update: The optimizer's part of a step.
    """

    def __init__(self, task: TrainingTask, device: torch.device) -> None:
        self._task = task
        self._model = task.new_model().to(device)
        self._loss = task.loss
        if isinstance(self._loss, nn.Module):
            self._loss = copy.deepcopy(self._loss).to(device)
        modules = [m for m in (self._model, self._loss) if isinstance(m, nn.Module)]
        self._parameters = parameters_of(modules)
        make_optimizer = optimizer_factory(task.optimizer)
        self.update = GuardedStep(make_optimizer(self._parameters, LEARNING_RATE))

    def backward(self, microbatch_size: int) -> AccumulatedBackward:
        """Forward and backward in microbatches of a size; says nothing of what a split changes."""
        return AccumulatedBackward(
            self._model,
            self._loss,
            microbatch_size=microbatch_size,
            count=self._task.count,
            batch_norm="exact",
        )

    def gradient(self, backward: AccumulatedBackward, batch: Any) -> BackwardResult:
        """The gradient of a batch, in the place of the last one."""
        for parameter in self._parameters:
            parameter.grad = None
        return backward(*batch)
