"""What PyTorch sets up once in a process, done before a trial is timed or its memory limited."""

from __future__ import annotations

import torch

from bs_optuna.training.budget import Budget
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.random_states import kept_random_states
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throw_away import FEWEST_SAMPLES


def load_optimizers() -> None:
    """Makes an optimizer: with the first one PyTorch loads its compiler, for more than a second."""
    torch.optim.SGD([torch.zeros(())])


def rehearse(task: TrainingTask, *, device: torch.device, learning_rate: float, seed: int) -> None:
    """One full small step, so that nothing is set up for the first time under a limit."""
    settings = RunSettings(
        batch_size=min(FEWEST_SAMPLES, task.train_samples),
        learning_rate=learning_rate,
        budget=Budget("steps", 1),
        seed=seed,
        evaluations=1,
    )
    with kept_random_states(device):
        run = TrainingRun(task, settings, device=device, limit=memory_limit(device, None))
        for _ in run.evaluations():
            pass
