"""A memory limit on CUDA, by the fraction that its allocator may use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bs_optuna.errors import ConfigError
from bs_optuna.training.memory_limit import memory_limit


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_the_fraction_is_set_for_a_device_with_a_number(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With the driver's answers put in; PyTorch's own functions refuse what has no number."""
    fractions = [1.0, 0.8]
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**32)
    )
    monkeypatch.setattr(
        torch._C, "_cuda_getMemoryFraction", lambda device: fractions[device], raising=False
    )
    monkeypatch.setattr(
        torch._C,
        "_cuda_setMemoryFraction",
        lambda fraction, device: fractions.__setitem__(device, fraction),
        raising=False,
    )
    before = [*fractions]
    limit = memory_limit(torch.device(name), 2**30)
    with limit.active():
        assert fractions[int(name == "cuda:1")] == 0.25
        assert fractions != before
    assert fractions == before


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
