"""The schedule of the learning rate, and optimizers that need no memory in a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_optuna.training.recipes import learning_rate_factor
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.stepping import GuardedStep


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


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False)),
    ],
)
def test_optimizers_step_as_plain_ones_do(name: str, reference: object) -> None:
    weights = []
    for make in (lambda p: optimizer_factory(name)(p, 0.1), reference):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(20, dtype=torch.float64))
        optimizer = make([w])  # type: ignore[operator]
        step = GuardedStep(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (w.sin() ** 2).sum().backward()
            step()
        weights.append(w.detach())
    torch.testing.assert_close(weights[0], weights[1])
