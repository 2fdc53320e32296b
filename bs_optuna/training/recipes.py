"""The optimizers that a task can name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from functools import partial
from numbers import Real

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


_RATES = (1e-5, 1e-3)
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


def checked_optimizer(
    optimizer: str | OptimizerFactory, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """One for the parameters; warns if it ignores the learning rate, or leaves some of them out.

    Raises:
        TaskError: It cannot be used.
    """
    make = optimizer_factory(optimizer)
    found, other = make(parameters, _RATES[0]), make(parameters, _RATES[1])
    if _settings(found) == _settings(other):
        warnings.warn(
            f"The {type(found).__name__} that optimizer returns has the same settings whichever "
            "learning rate it is given, so that there is nothing to tune; pass it on: "
            "optimizer=lambda parameters, lr: AdamW(parameters, lr=lr).",
            stacklevel=2,
        )
    held = {id(p) for group in found.param_groups for p in group["params"]}
    if left := sum(p.requires_grad and id(p) not in held for p in parameters):
        warnings.warn(
            f"The optimizer leaves out {left} of {len(parameters)} parameters, which are never "
            "trained; give it all, or freeze them with requires_grad_(False).",
            stacklevel=2,
        )
    return found


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The numbers among the settings of each group."""
    return [
        {k: float(v) for k, v in group.items() if isinstance(v, Real | torch.Tensor)}
        for group in optimizer.param_groups
    ]


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
