"""Steps that only measure memory leave nothing behind, warn of nothing and end no study."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from plain_task import plain_task
from torch import nn

from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training import measured_memory
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.measured_memory import MeasuredMemory
from bs_optuna.training.predicted_memory import PredictedMemory


CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def measurable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had been started for a limit; what is measured is only about right."""
    monkeypatch.setattr(measured_memory, "is_prepared", lambda: True)


class Told(NoLimit):
    """A limit that is known but not enforced."""

    @property
    def limit_bytes(self) -> int:  # type: ignore[override]
        return 64 * MIB


def looks(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() > 0 else -loss


def make_task(**changes: Any) -> TrainingTask:
    return plain_task(**{"loss": looks, **changes})


def measured(task: TrainingTask, *, most: int = 256) -> MeasuredMemory:
    memory = MeasuredMemory(task, device=CPU, limit=Told())
    memory.largest_fitting(2**40, batch_size=256, most=most)
    return memory


def test_no_model_is_left_behind() -> None:
    models: list[weakref.ref[nn.Module]] = []

    def model() -> nn.Module:
        made = nn.Linear(16, 10)
        made.itself = [made]  # a cycle, as in a model whose parts know it
        models.append(weakref.ref(made))
        return made

    was_on = gc.isenabled()
    gc.disable()
    try:
        measured(make_task(model=model))
        assert len(models) > 5
        assert not any(made() for made in models)
    finally:
        if was_on:
            gc.enable()


def test_no_more_than_the_largest_microbatch_of_interest_is_trained_on() -> None:
    seen: list[int] = []

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    measured(make_task(model=lambda: Net(16, 10)), most=4)
    assert max(seen) == 4
    seen.clear()
    measured(make_task(model=lambda: Net(16, 10)))
    assert max(seen) == 256
    assert sum(seen) <= 5 * 256


def test_nothing_is_drawn_that_others_would_draw() -> None:
    class Draws(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 0 * (random.random() + np.random.rand()))

    def value(*, prepared: bool) -> tuple[float, float, float]:
        random.seed(0)
        np.random.seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measured_memory, "is_prepared", lambda: prepared)
            task = make_task(model=lambda: Draws(16, 10))
            objective = TrainingObjective(
                task, budget=Budget("steps", 1), batch_size=(64, 64), device=CPU
            )
            objective._starting_sizes._limit = Told()
            optuna.create_study().optimize(objective, n_trials=1)
        return random.random(), np.random.rand(), torch.rand(()).item()

    torch.manual_seed(0)
    first = value(prepared=True)
    torch.manual_seed(0)
    assert value(prepared=False) == first


def test_a_split_that_only_measures_is_not_warned_of() -> None:
    model = lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))  # noqa: E731
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        memory = measured(make_task(model=model))
    assert memory.peak_bytes(64, batch_size=256) is not None  # in two microbatches
    assert not found


def test_code_that_fails_on_few_samples_says_nothing_of_memory() -> None:
    def needs_four(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return looks(outputs, targets) + outputs[:, 0].topk(4).values.sum()

    memory = MeasuredMemory(make_task(loss=needs_four), device=CPU, limit=Told())
    assert memory.largest_fitting(2**40, batch_size=256, most=256) is None
    assert memory.peak_bytes(8, batch_size=256) is None  # two samples come first


def test_what_ran_out_of_memory_is_more_than_any_limit() -> None:
    class Large(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 16:
                torch.empty(2**55)
            return super().forward(x)

    memory = MeasuredMemory(make_task(model=lambda: Large(16, 10)), device=CPU, limit=Told())
    assert memory.largest_fitting(2**40, batch_size=256, most=256) == 16
    assert memory.peak_bytes(32, batch_size=256) == float("inf")
    assert memory.expected_bytes(16, batch_size=256) < float("inf")


def test_not_even_one_sample_that_fits_is_a_verdict_too() -> None:
    class Never(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.empty(2**55)
            return super().forward(x)

    memory = MeasuredMemory(make_task(model=lambda: Never(16, 10)), device=CPU, limit=Told())
    assert memory.largest_fitting(2**40, batch_size=256, most=256) == 1
    assert memory.expected_bytes(1, batch_size=256) == float("inf")


def test_a_half_that_runs_out_of_memory_contradicts_the_prediction() -> None:
    class Large(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 16 and type(x) is torch.Tensor:
                torch.empty(2**55)
            return super().forward(x)

    model = lambda: nn.Sequential(Large(16, 4096), nn.ReLU(), nn.Linear(4096, 10))  # noqa: E731
    task = make_task(model=model, loss=nn.functional.cross_entropy)
    memory = PredictedMemory(task, device=CPU, limit=Told())
    options: dict[str, Any] = {"batch_size": 256, "most": 256}
    traced = memory.largest_fitting(8 * MIB, measure=False, **options)
    assert traced.microbatch is not None
    found = memory.largest_fitting(8 * MIB, measure=True, **options)
    assert found.microbatch is not None
    assert found.microbatch <= 32 < traced.microbatch  # about right; see the fixture
