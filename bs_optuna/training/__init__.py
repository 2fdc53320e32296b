"""PyTorch training that survives running out of memory.

The names below load PyTorch when they are first used, not when this package is imported: the
command line must be able to prepare the process before that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING
from typing import Any


if TYPE_CHECKING:
    from bs_optuna.training.backward import AccumulatedBackward as AccumulatedBackward
    from bs_optuna.training.budget import Budget as Budget
    from bs_optuna.training.normalization import convert_batch_norm as convert_batch_norm
    from bs_optuna.training.objective import TrainingObjective as TrainingObjective
    from bs_optuna.training.pass_attempt import BackwardResult as BackwardResult
    from bs_optuna.training.stepping import GuardedStep as GuardedStep
    from bs_optuna.training.task import TrainingTask as TrainingTask

_MODULES = {
    "AccumulatedBackward": "backward",
    "BackwardResult": "pass_attempt",
    "Budget": "budget",
    "GuardedStep": "stepping",
    "TrainingObjective": "objective",
    "TrainingTask": "task",
    "convert_batch_norm": "normalization",
}

__all__ = [
    "AccumulatedBackward",
    "BackwardResult",
    "Budget",
    "GuardedStep",
    "TrainingObjective",
    "TrainingTask",
    "convert_batch_norm",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
