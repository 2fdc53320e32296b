"""The optimizers that a task can name."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from functools import partial

import torch

from bs_optuna.errors import TaskError
from bs_optuna.training.fusing import fusible


OptimizerFactory = Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]


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
        TaskError: No optimizer has that name. The function raises it where it makes something else,
            or an LBFGS.
    """
    if not isinstance(optimizer, str):
        return partial(_checked, optimizer)
    if optimizer not in OPTIMIZERS:
        raise TaskError(
            f"optimizer={optimizer!r}; must be one of {', '.join(OPTIMIZERS)}, "
            "or a function of parameters and learning rate."
        )
    return OPTIMIZERS[optimizer]


def _checked(
    make: OptimizerFactory, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    made = make(parameters, learning_rate)
    if not isinstance(made, torch.optim.Optimizer):
        raise TaskError(
            f"optimizer returned a {type(made).__name__}; must be a torch.optim.Optimizer."
        )
    if isinstance(made, torch.optim.LBFGS):
        raise TaskError(
            "optimizer returned an LBFGS, which steps by a closure; must be one that steps "
            "without, such as AdamW."
        )
    return made
