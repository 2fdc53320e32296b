"""The learning rate that every trial is trained with: warmup, then half a cosine.

p: progress of the run in [0, 1]; f: warmup as a fraction of the run.
"""

from __future__ import annotations

import math

import torch

from bs_optuna.science.companions import warmup_steps


# Longest warmup worth starting with, as a fraction of the run (Godbole et al., Tuning Playbook).
LONGEST_WARMUP = 0.1


class Schedule:
    """Sets the learning rate of each group of parameters, from the peak that it has now.

    A factory of optimizers may give groups rates of their own.

    Args:
        optimizer: Whose learning rates are set.
        total: Steps of the run; None where the clock decides.

    Attributes:
        warmup: f, from the optimizer's ``beta2`` and the number of steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, total: int | None) -> None:
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self.warmup = LONGEST_WARMUP
        if total is not None:
            betas = getattr(optimizer, "defaults", {}).get("betas", ())
            beta2 = float(betas[1]) if len(betas) > 1 else None  # some have three
            self.warmup = warmup_steps(total, beta2=beta2) / total

    def set(self, progress: float) -> None:
        """Sets what is right at ``progress``."""
        factor = learning_rate_factor(progress, warmup=self.warmup)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor


def learning_rate_factor(progress: float, *, warmup: float) -> float:
    """Part of the peak learning rate that is used at ``progress``.

    Linear from 0 to 1 while p < f, then (1 + cos(pi * (p - f) / (1 - f))) / 2 down to 0. A function
    of progress, not of steps, so that every batch size is trained on the same schedule.
    """
    if progress < warmup:  # never where there is none
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min((progress - warmup) / (1.0 - warmup), 1.0)))
