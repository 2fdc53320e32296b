"""Models that can only be made for real are followed on fake tensors all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_task import plain_task
from torch import nn

from bs_optuna.errors import UntraceableError
from bs_optuna.training.memory_probe import MemoryProbe


CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self, initialize: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 512), nn.BatchNorm1d(512), nn.ReLU())
        self.decoder = nn.Linear(16, 512)
        self.decoder.weight = self.encoder[0].weight
        self.head = nn.Linear(16, 10)
        initialize(self.head.weight)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.encoder(x) @ self.decoder.weight)


def peak(model: Callable[[], nn.Module], optimizer: str) -> int:
    probe = MemoryProbe(plain_task(model=model, optimizer=optimizer), device=CPU)
    return probe.peak_bytes(32, batch_size=64)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_its_initialization_looks_at_takes_no_more_memory(optimizer: str) -> None:
    """PyTorch's `trunc_normal_`, of which vision transformers are full, looks at values."""
    looked = peak(lambda: Tied(nn.init.trunc_normal_), optimizer)
    assert looked == peak(lambda: Tied(nn.init.zeros_), optimizer)


def test_one_that_cannot_be_copied_says_why_it_could_not_be_made() -> None:
    class Alone(Tied):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("there is only one")

    with pytest.raises(UntraceableError, match=r"DataDependentOutput.*give --memory-limit"):
        peak(lambda: Alone(nn.init.trunc_normal_), "sgd")
