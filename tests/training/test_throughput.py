"""The throughput is that of the steps that run, told by a clock that the steps themselves move."""

from __future__ import annotations

import logging
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from bs_optuna.sampling import attributes
from bs_optuna.science.throughput import samples_per_second
from bs_optuna.science.throughput import smallest_fast
from bs_optuna.training import Budget
from bs_optuna.training import TrainingObjective
from bs_optuna.training import TrainingTask
from bs_optuna.training.limit import NoLimit
from bs_optuna.training.throughput import Throughput
from bs_optuna.training.throughput import measure_throughput


CPU = torch.device("cpu")
LAUNCH, SAMPLE, UPDATE = 1.0, 1.0, 8.0  # seconds of a forward pass, of a sample in it, of a step


class Watched(nn.Module):
    """Takes its time by a clock that only it and its optimizer move."""

    now = 0.0
    seen: list[int]

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.fits = fits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        first = 1000.0 if len(x) not in Watched.seen else 0.0  # as a kernel that is compiled
        Watched.seen.append(len(x))
        Watched.now += first + LAUNCH + SAMPLE * len(x)
        outputs: torch.Tensor = self.net(x)
        return outputs


class WatchedSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        Watched.now += UPDATE
        return super().step(closure)


def make_task(*, fits: int = 10**9) -> TrainingTask:
    data = (torch.randn(512, 4), torch.zeros(512, dtype=torch.long))
    Watched.now, Watched.seen = 0.0, []
    return TrainingTask(
        model=lambda: Watched(fits),
        train_data=data,
        valid_data=data,
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters, rate: WatchedSGD(parameters, lr=rate),
    )


def measure(task: TrainingTask, *, batch_size: int, most: int) -> Throughput:
    return measure_throughput(
        task,
        device=CPU,
        limit=NoLimit(),
        batch_size=batch_size,
        most=most,
        clock=lambda: Watched.now,
    )


def test_full_steps_are_timed_and_the_first_ones_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bs_optuna"):
        found = measure(make_task(), batch_size=256, most=200)
    sizes = [2, 4, 8, 16, 32, 64, 128, 200]
    assert found.rates == {
        size: samples_per_second(
            256, size, backward_seconds=LAUNCH + SAMPLE * size, update_seconds=UPDATE
        )
        for size in sizes
    }
    assert found.fails is None
    assert found.smallest_fast == 32  # 2.5 % slower than 200
    assert "200: 0.965; the smallest within 3 % of the best: 32" in caplog.text


def test_it_ends_at_the_first_size_that_does_not_fit() -> None:
    found = measure(make_task(fits=20), batch_size=256, most=256)
    assert list(found.rates) == [2, 4, 8, 16]
    assert found.fails == 32


def test_where_nothing_fits_nothing_is_chosen() -> None:
    assert measure(make_task(fits=0), batch_size=256, most=256) == Throughput({}, None)
    assert Throughput({}, None).smallest_fast is None


def test_a_task_that_is_wrong_says_so() -> None:
    task = make_task()
    object.__setattr__(task, "loss", lambda outputs, targets: outputs.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        measure(task, batch_size=64, most=64)


def run(objective: TrainingObjective, study: optuna.Study, batch_size: int) -> dict[str, Any]:
    study.enqueue_trial({"batch_size": batch_size, "lr": 1e-3})
    study.optimize(objective, n_trials=1)
    return study.get_trials()[-1].user_attrs


@pytest.mark.filterwarnings("ignore:BatchNorm normalizes:UserWarning")
def test_a_worker_measures_once_and_its_trials_use_and_store_what_it_found() -> None:
    task, study = make_task(fits=100), optuna.create_study()
    arguments: dict[str, Any] = {"budget": Budget("steps", 1), "batch_size": (8, 256)}
    objective = TrainingObjective(task, device=CPU, microbatch_size="fastest", **arguments)
    first = run(objective, study, 256)
    before = len(Watched.seen)
    second = run(objective, study, 256)
    assert len(Watched.seen) - before <= 256 // 2 + 10  # one step and its evaluations
    assert first[attributes.THROUGHPUT] == second[attributes.THROUGHPUT]
    rates = {size: rate for size, rate in first[attributes.THROUGHPUT]}
    assert list(rates) == [2, 4, 8, 16, 32, 64]
    assert first[attributes.MICROBATCH_SIZE] == smallest_fast(rates)
    assert first[attributes.MICROBATCH_FAILS] == 128
    assert (first[attributes.BACKOFFS], second[attributes.BACKOFFS]) == (0, 0)
    assert run(objective, study, 8)[attributes.MICROBATCH_SIZE] <= 8
    other = TrainingObjective(make_task(fits=100), device=CPU, **arguments)
    assert attributes.THROUGHPUT not in run(other, optuna.create_study(), 8)
