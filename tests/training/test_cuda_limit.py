"""A memory limit on CUDA, by the fraction that its allocator may use."""

from __future__ import annotations

import pytest
import torch

from bs_optuna.errors import ConfigError
from bs_optuna.training.memory_limit import memory_limit


@pytest.mark.gpu
def test_what_cublas_keeps_is_there_before_a_prediction() -> None:
    device = torch.device("cuda")
    limit = memory_limit(device, 2**30)

    def step() -> None:
        weight = torch.ones(64, 64, device=device, requires_grad=True)
        (weight @ weight).sum().backward()

    limit.warm_up(step)
    limit.start_trial()
    assert torch.cuda.memory_allocated(device) >= 2**20  # more than all of its tensors


@pytest.mark.gpu
def test_a_cuda_limit_refuses_and_is_lifted() -> None:
    device = torch.device("cuda")
    limit = memory_limit(device, 2**30)
    limit.start_trial()

    with limit.active(), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**31, dtype=torch.uint8, device=device)

    assert torch.empty(2**31, dtype=torch.uint8, device=device).numel() == 2**31
    with pytest.raises(ConfigError, match="the device has"):
        memory_limit(device, 2**60)
