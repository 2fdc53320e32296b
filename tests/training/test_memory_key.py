"""What the knowledge about fitting microbatches is kept under."""

from __future__ import annotations

import torch
from torch import nn

from bs_optuna.training import TrainingTask
from bs_optuna.training.memory_key import memory_key


class Classes(nn.Module):
    """A loss with a weight for each class."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.head = nn.Linear(4, count)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(outputs), targets)


def key(loss: nn.Module) -> str:
    data = (torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    task = TrainingTask(model=lambda: nn.Linear(3, 4), train_data=data, valid_data=data, loss=loss)
    return memory_key(task, device=torch.device("cpu"), limit_bytes=None)


def test_a_loss_with_more_weights_inherits_nothing_from_one_with_fewer() -> None:
    assert key(Classes(10)) == key(Classes(10))
    assert key(Classes(10)) != key(Classes(65536))
