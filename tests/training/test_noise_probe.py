"""Readings of the gradient noise are right on average, and the training goes on as without them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from limited_task import Limited
from limited_task import make_task
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

from bs_optuna.science.noise_scale import pooled
from bs_optuna.training import Budget
from bs_optuna.training.final_run import train_final
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.noise_probe import samples_to_read
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.task import TrainingTask


CPU = torch.device("cpu")


def make_run(task: TrainingTask, **settings: Any) -> TrainingRun:
    values = {"batch_size": 32, "learning_rate": 0.1, "budget": Budget("steps", 64), "seed": 3}
    return TrainingRun(
        task, RunSettings(**values | settings), device=CPU, limit=memory_limit(CPU, None)
    )


def test_the_mean_of_many_readings_is_what_all_samples_say() -> None:
    """Against the gradient of every single sample, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 4, generator=generator, dtype=torch.float64)
    targets = (inputs[:, 0] > 0).long() + torch.randint(2, (512,), generator=generator)
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made.append(nn.Linear(4, 3).double())
        return made[-1]

    task = make_task(model=model, train_data=(inputs, targets), valid_data=(inputs, targets))
    run = make_run(task)
    next(run.evaluations())
    weights = list(made[-1].parameters())
    gradients = torch.stack([
        torch.cat([
            g.flatten()
            for g in torch.autograd.grad(
                cross_entropy(made[-1](inputs[i : i + 1]), targets[i : i + 1]), weights
            )
        ])
        for i in range(512)
    ])  # fmt: skip
    noise = float(gradients.var(0).sum())
    signal = float(gradients.mean(0).square().sum())
    readings = []
    for seed in range(300):
        run.settings = replace(run.settings, seed=seed)  # of the samples that are read
        reading = run.gradient_noise()
        assert reading is not None
        readings.append(reading)
    assert pooled(readings).variance == pytest.approx(noise, rel=0.02)
    # Without replacement a part of the data is nearer to the whole than to what it is drawn from.
    assert pooled(readings).squared_gradient == pytest.approx(signal - noise / 512, rel=0.1)


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws from every generator there is."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return noise + index % 3, index % 3


def test_a_training_that_is_read_ends_as_one_that_is_not() -> None:
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made.append(
            nn.Sequential(
                spectral_norm(nn.Linear(4, 8)), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
            )
        )
        return made[-1]

    task = make_task(model=model, train_data=Augmented())
    for read in (False, True):
        random.seed(0)
        np.random.seed(0)
        run = make_run(task)
        if read:
            found = train_final(run, task)
            assert len(found.noise) == 5
            assert all(module.training for module in made[-1].modules())
            continue
        for _ in run.evaluations():
            pass
    plain, watched = (module.state_dict() for module in made)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_a_final_run_reads_at_each_evaluation() -> None:
    run = train_final(make_run(make_task(), budget=Budget("samples", 1600)), make_task())
    assert list(run.noise) == [20, 40, 60, 80, 100]
    assert run.noise_samples == 64  # one part in 25


def test_memory_that_runs_out_over_a_reading_costs_only_that() -> None:
    made: list[Limited] = []

    def model() -> nn.Module:
        made.append(Limited(32))
        return made[-1]

    run = make_run(make_task(model=model))
    for _ in run.evaluations():
        made[-1].fits = 0
        assert run.gradient_noise() is None
        made[-1].fits = 32
    assert run.steps == 64
    assert run.lost.attempts == 0


def test_code_that_refuses_so_few_samples_costs_only_the_reading() -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) < 16:
            raise ValueError("made for more")
        return cross_entropy(outputs, targets)

    task = make_task(loss=loss)
    run = make_run(task)
    for _ in run.evaluations():
        assert run.gradient_noise() is None
    assert run.steps == 64
    plain = make_run(task)
    for _ in plain.evaluations():
        pass
    assert run.values == plain.values


@pytest.mark.parametrize(
    ("samples", "features", "batch_size", "run_samples", "read"),
    [
        (10_000, 1, 32, 25_000, 1_000),
        (10_000, 1, 32, 1599, 0),  # too few beside the training
        (10_000, 1, 32, 1e9, 2_048),
        (40, 1, 32, 1e9, 40),
        (300, 2**18, 32, 1e9, 63),  # a bit more than a megabyte each
        (300, 2**18, 128, 1e9, 128),
    ],
)
def test_few_samples_are_read_beside_a_training(
    samples: int, features: int, batch_size: int, run_samples: float, read: int
) -> None:
    # Views of a single number, which take no memory.
    data = (torch.zeros(1, 1).expand(samples, features), torch.zeros(1).expand(samples))
    assert samples_to_read(data, batch_size=batch_size, run_samples=run_samples) == read
