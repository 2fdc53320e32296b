"""Predictions where the optimizer's copies or the validation samples are what takes the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_task import plain_task
from torch import nn

from bs_optuna.training.limit import NoLimit
from bs_optuna.training.measured_memory import MeasuredMemory
from bs_optuna.training.memory_probe import MemoryProbe


CPU = torch.device("cpu")
WEIGHTS_BYTES = 4 * (16 * 4096 + 4096 + 4096 * 10 + 10)  # of the plain task


@pytest.mark.parametrize(
    ("optimizer", "states"), [(torch.optim.NAdam, 2), (torch.optim.RMSprop, 1)]
)
def test_a_single_sample_counts_the_copies_of_the_optimizers_state(
    optimizer: type[torch.optim.Optimizer], states: int
) -> None:
    task = plain_task(optimizer=lambda parameters, lr: optimizer(parameters, lr=lr))
    probe = MemoryProbe(task, device=CPU)
    one, two = (probe.peak_bytes(size, batch_size=64) for size in (1, 2))
    # Weights, gradients and state, and the copies of weights and state while it steps.
    assert one >= (3 + 2 * states) * WEIGHTS_BYTES
    assert one == pytest.approx(two, rel=0.02)


class Pooled(nn.Module):
    """Takes images of every size."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.convolution(images).relu().mean((2, 3)))
        return outputs


def images(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(64, 1, width, width), torch.zeros(64, dtype=torch.long)


def cropped(width: int) -> Any:
    return plain_task(model=Pooled, train_data=images(8), valid_data=images(width))


def test_an_evaluation_is_predicted_for_the_samples_that_it_takes() -> None:
    small, large = (MemoryProbe(cropped(width), device=CPU) for width in (8, 32))
    at_small, at_large = (p.evaluation_peak_bytes(16, batch_size=16) for p in (small, large))
    activations = 4 * 16 * 32 * 8 * 8
    assert at_large - at_small >= 2 * 15 * activations
    assert small.peak_bytes(16, batch_size=16) == large.peak_bytes(16, batch_size=16)


def test_what_surely_fits_does_so_in_the_evaluation_too() -> None:
    available = 40 * 2**20
    small, large = (
        MeasuredMemory(cropped(width), device=CPU, limit=NoLimit()) for width in (8, 64)
    )
    assert small.surely_fits(available, batch_size=16)
    assert not large.surely_fits(available, batch_size=16)  # 64 images of 64 x 64 take twice that
