"""A loss that says itself what it is, and is not what it is taken for, is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_task import plain_task
from torch import nn

from bs_optuna.errors import TaskError
from bs_optuna.training import AccumulatedBackward


MODEL = nn.Linear(4, 1)


@pytest.mark.parametrize(
    ("loss", "reduction", "said"),
    [
        (nn.MSELoss(reduction="sum"), "mean", "reduction='sum', not 'mean', .* make it with"),
        (nn.MSELoss(), "sum", "reduction='mean', not 'sum'"),
        (nn.MSELoss(reduction="none"), "mean", "reduction='none', not 'mean'"),
        (nn.MSELoss, "mean", r"the class MSELoss; must be one of its kind: MSELoss\(\)"),
    ],
)
def test_it_would_weigh_microbatches_wrongly(loss: Any, reduction: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AccumulatedBackward(MODEL, loss, reduction=reduction)
    if reduction == "mean":
        with pytest.raises(TaskError, match=said):
            plain_task(loss=loss)


class Focal(nn.CrossEntropyLoss):
    """A mean that is made of the losses of its samples."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = super().forward(outputs, targets)
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


def test_means_and_what_says_nothing_are_taken() -> None:
    for loss in (
        nn.KLDivLoss(reduction="batchmean"),
        nn.functional.mse_loss,
        nn.L1Loss(),
        Focal(reduction="none"),
    ):
        AccumulatedBackward(MODEL, loss)
        plain_task(loss=loss)
    AccumulatedBackward(MODEL, nn.MSELoss(reduction="sum"), reduction="sum")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch compiles its own
def test_a_loss_that_is_compiled_is_the_same_loss() -> None:
    with pytest.raises(ValueError, match="reduction='sum', not 'mean'"):
        AccumulatedBackward(MODEL, torch.compile(nn.MSELoss(reduction="sum"), backend="eager"))
