"""The digits' grid: how it is measured, what the file holds, and the surface made of it."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import digits_grid
import numpy as np
import pytest
from measured_grid import MeasuredGrid
from measured_grid import measured_grids
from optuna.samplers import RandomSampler
from sampler import NOTHING_YET
from sampler import left_out
from sampler import regrets

from bs_optuna.tasks.digits import task


SIZES = [8, 32, 128]
RATES = [1e-3 * 4**k for k in range(7)]


def best_rate(batch_size: float) -> float:
    return 4e-3 * math.sqrt(batch_size)


def loss(batch_size: float, lr: float) -> float:
    return math.exp(0.1 * math.log(lr / best_rate(batch_size)) ** 2) * (1 + batch_size / 64)


def file_with(folder: Path, broken: float = math.inf) -> Path:
    """Two seeds, 10 % around the loss; the highest rate of the largest batch ends as said."""
    file = folder / "grid.csv"
    with file.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(digits_grid.COLUMNS)
        for seed, lr, size in [(s, lr, b) for s in (1, 0) for lr in RATES[::-1] for b in SIZES]:
            value = loss(size, lr) * (0.9, 1.1)[seed]
            if (seed, lr, size) == (1, RATES[-1], 128):
                value = broken
            rows.writerow(["sgd", size, lr, seed, value, 0.5, 10])
    return file


def grid_of(folder: Path) -> MeasuredGrid:
    (grid,) = measured_grids(file_with(folder))
    return grid


def test_a_cell_has_the_mean_over_its_seeds(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    for size in SIZES:
        for lr in RATES[:-2]:
            assert grid.value(size, lr) == pytest.approx(loss(size, lr))
    assert grid.best == pytest.approx(min(loss(b, lr) for b in SIZES for lr in RATES))


def test_between_cells_it_is_bilinear_in_the_logarithms(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    corners = [grid.value(b, lr) for b in SIZES[:2] for lr in RATES[1:3]]
    assert grid.value(16, math.sqrt(RATES[1] * RATES[2])) == pytest.approx(np.mean(corners))


def test_a_run_beside_a_diverged_cell_diverges(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    assert grid.value(128, RATES[-1]) == math.inf
    assert grid.value(127, RATES[-1] * 0.99) == math.inf
    assert math.isfinite(grid.value(32, RATES[-1]))
    assert math.isfinite(grid.value(128, RATES[-2]))


def test_the_best_learning_rate_lies_between_the_cells(tmp_path: Path) -> None:
    assert grid_of(tmp_path).ridge == {b: pytest.approx(best_rate(b)) for b in SIZES}


def test_every_searched_range_lies_in_the_grid(tmp_path: Path) -> None:
    ranges = [grid_of(tmp_path).learning_rates(seed) for seed in range(20)]
    assert all(RATES[0] <= low < high <= RATES[-1] for low, high in ranges)
    assert len(set(ranges)) == 20


def test_a_run_that_begins_with_divergence_has_a_regret() -> None:
    losses = np.ones((1, 2, 8)) + np.arange(8) / 8
    losses[:, :, 5:] = math.inf
    grid = MeasuredGrid("sgd", np.array([8.0, 16.0]), 1e-3 * 4.0 ** np.arange(8), losses)
    curves = np.array([regrets(grid, RandomSampler(seed=s), s, 5)[0] for s in range(8)])
    assert (curves[:, 0] == NOTHING_YET).any()
    assert (curves[:, -1] < NOTHING_YET).all()
    assert (np.diff(curves) <= 0).all()


def test_every_batch_size_is_left_out_of_every_study(tmp_path: Path) -> None:
    two = grid_of(tmp_path)
    three_times = replace(two, losses=np.concatenate([two.losses] * 3))
    for grid, studies, trials in ((two, 1, 42), (three_times, 2, 63)):
        assert [len(study) for study in grid.studies()] == [trials] * studies
        answers = left_out(grid)
        assert [place for place, *_ in answers] == ["edge", "interior", "edge"] * studies
        assert all(close for place, close, _ in answers if place == "interior")


def test_a_diverging_run_is_recorded_as_such() -> None:
    valid_loss, accuracy, steps = digits_grid.train(task(), "sgd", 256, 1e30, 0)
    assert valid_loss == math.inf
    assert math.isnan(accuracy)
    assert steps < 32


def test_a_grid_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_grid, "BATCH_SIZES", [256, 512])
    monkeypatch.setattr(digits_grid, "LEARNING_RATES", {"sgd": [0.01]})
    file = tmp_path / "grid.csv"
    monkeypatch.setattr(sys, "argv", ["digits_grid.py", "--seeds", "1", "--file", str(file)])
    digits_grid.main()
    whole = file.read_text()
    assert len(whole.splitlines()) == 3
    file.write_text("\n".join(whole.splitlines()[:2]) + "\n")
    digits_grid.main()
    assert file.read_text() == whole


def test_the_file_of_the_project_is_whole() -> None:
    grids = {grid.optimizer: grid for grid in measured_grids()}
    assert sorted(grids) == sorted(digits_grid.LEARNING_RATES)
    for optimizer, grid in grids.items():
        assert list(grid.sizes) == digits_grid.BATCH_SIZES
        assert list(grid.rates) == digits_grid.LEARNING_RATES[optimizer]
        for seed in range(20):
            low, high = grid.learning_rates(seed)
            within = grid.mean[:, (low < grid.rates) & (grid.rates < high)]
            assert within.min() - grid.best < 0.002 * (grid.median - grid.best)
