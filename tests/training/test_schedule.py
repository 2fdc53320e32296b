"""The schedule of the learning rate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.training.schedule import Schedule
from bs_optuna.training.schedule import learning_rate_factor


WARMUP = st.floats(0.01, 0.5)


@given(progress=st.floats(0, 1), warmup=WARMUP)
def test_the_schedule_stays_between_nothing_and_the_peak(progress: float, warmup: float) -> None:
    assert 0 <= learning_rate_factor(progress, warmup=warmup) <= 1


@given(warmup=WARMUP)
def test_the_schedule_starts_at_zero_peaks_after_warmup_and_ends_at_zero(warmup: float) -> None:
    assert learning_rate_factor(0.0, warmup=warmup) == 0
    assert learning_rate_factor(warmup, warmup=warmup) == 1
    assert learning_rate_factor(1.0, warmup=warmup) == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(1.5, warmup=warmup) == pytest.approx(0, abs=1e-12)


def test_groups_keep_peaks_of_their_own() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule(optimizer, total=100)
    assert schedule.warmup == pytest.approx(0.05)
    for progress, factor in ((0.025, 0.5), (0.05, 1.0), (0.525, 0.5), (1.0, 0.0)):
        schedule.set(progress)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.1 * factor, 0.4 * factor])


@pytest.mark.parametrize("betas", [(0.9, 0.995), (0.9, 0.995, 0.5), (0.9, torch.tensor(0.995))])
def test_the_warmup_goes_by_the_second_of_the_betas(betas: tuple[float, ...]) -> None:
    class Other(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.nn.Parameter(torch.ones(1))], {"lr": 0.1, "betas": betas})

    assert Schedule(Other(), total=4000).warmup == pytest.approx(400 / 4000, rel=1e-4)


def test_an_optimizer_without_defaults_has_a_schedule_too() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    del optimizer.defaults
    assert Schedule(optimizer, total=100).warmup == pytest.approx(0.05)
