"""What a run trains: a new model, its loss, optimizer and schedule; and their state."""

from __future__ import annotations

import copy
import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bs_optuna.training.random_states import random_states
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.schedule import Schedule
from bs_optuna.training.snapshot import parameters_of
from bs_optuna.training.task import TrainingTask


_logger = logging.getLogger(__name__)


class Learner:
    """Made anew from the seed of a run.

    Args:
        task: What to train.
        settings: With what.
        device: Where.
        within: Entered while model and loss are made: the limit on memory.

    Attributes:
        task: With a loss of its own if that is a module, which may hold weights or parameters.
        model: In training mode.
        modules: What is trained: the model, and the loss if it is a module.
        parameters: Of these.
        optimizer: Of the parameters, at the peak learning rate.
        schedule: Of its learning rates.
    """

    def __init__(
        self,
        task: TrainingTask,
        settings: RunSettings,
        device: torch.device,
        *,
        within: AbstractContextManager[object],
    ) -> None:
        torch.manual_seed(settings.seed)
        self._device = device
        self.task = task
        with within:
            self.model = task.new_model().to(device)
            if isinstance(task.loss, nn.Module):
                self.task = replace(task, loss=copy.deepcopy(task.loss).to(device))
        self.modules = [m for m in (self.model, self.task.loss) if isinstance(m, nn.Module)]
        self.parameters = parameters_of(self.modules)
        make_optimizer = optimizer_factory(task.optimizer)
        self.optimizer = make_optimizer(self.parameters, settings.learning_rate)
        total = settings.budget.steps(settings.batch_size)
        self.schedule = Schedule(self.optimizer, total=total)

    def forget_gradients(self) -> None:
        """As the optimizer's ``zero_grad``, which takes ten times as long."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """The state of modules, optimizer and every random generator, not copied."""
        return {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(self._device),
        }

    def load(self, state: dict[str, Any]) -> bool:
        """Loads modules and optimizer; the random states are left to the caller.

        Returns:
            Whether the state is that of such a model; if not, nothing can be said of what was
            loaded.
        """
        try:
            for module, stored in zip(self.modules, state["modules"], strict=True):
                module.load_state_dict(stored)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            _logger.warning("a checkpoint is of another model (%s); the trial begins anew", reason)
            return False
        return True
