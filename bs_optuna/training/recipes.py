"""Optimizers and the learning-rate schedule that every trial is trained with.

p: progress of the run in [0, 1]; f: warmup as a fraction of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable

import torch

from bs_optuna.errors import TaskError
from bs_optuna.training.fusing import fusible


OptimizerFactory = Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]

# Longest warmup worth starting with, as a fraction of the run (Godbole et al., Tuning Playbook).
LONGEST_WARMUP = 0.1


def _adamw(parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    # Fused it works in place, so that once its state exists a step needs no memory of its own.
    parameters = list(parameters)
    right = all(fusible(p) or (p.is_cuda and p.is_floating_point()) for p in parameters)
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=right or None)


def _sgd(parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.SGD:
    # Fused it fails on a parameter that joins after the first step: GuardedStep looks at each.
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)


OPTIMIZERS: dict[str, OptimizerFactory] = {"adamw": _adamw, "sgd": _sgd}


def optimizer_factory(optimizer: str | OptimizerFactory) -> OptimizerFactory:
    """The function that makes the optimizer: ``"adamw"``, ``"sgd"``, or the one that is given.

    AdamW has weight decay 0.01, SGD momentum 0.9.

    Raises:
        TaskError: No optimizer has that name.
    """
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise TaskError(
            f"optimizer={optimizer!r}; must be one of {', '.join(OPTIMIZERS)}, "
            "or a function of parameters and learning rate."
        )
    return OPTIMIZERS[optimizer]


def learning_rate_factor(progress: float, *, warmup: float) -> float:
    """Part of the peak learning rate that is used at ``progress``.

    Linear from 0 to 1 while p < f, then (1 + cos(pi * (p - f) / (1 - f))) / 2 down to 0. A function
    of progress, not of steps, so that every batch size is trained on the same schedule.
    """
    if progress < warmup:  # never where there is none
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min((progress - warmup) / (1.0 - warmup), 1.0)))
