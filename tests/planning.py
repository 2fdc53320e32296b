"""What a study would begin with, under a limit that is only told, for tests of predictions."""

from __future__ import annotations

import torch
from torch import nn

from bs_optuna.training import TrainingTask
from bs_optuna.training.known_sizes import NOTHING_KNOWN
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.predicted_memory import FittingSizes
from bs_optuna.training.starting_sizes import StartingSizes


CPU = torch.device("cpu")
MIB = 2**20


class Told(NoLimit):
    """A limit that is known but not enforced: predictions need no more."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    @property
    def limit_bytes(self) -> int:  # type: ignore[override]
        return self._limit_bytes


def predicted(task: TrainingTask, limit: MemoryLimit) -> FittingSizes:
    return predicted_for(StartingSizes(task, device=CPU, limit=limit, batch_size=256), 256)


def predicted_for(sizes: StartingSizes, batch_size: int) -> FittingSizes:
    sizes.predict(batch_size, NOTHING_KNOWN, measure=True)
    return sizes.predicted(batch_size)


def looks_at_values(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() > 0 else -loss
