"""Trains the digits task on a grid of batch sizes and learning rates; the results as a CSV.

    OMP_NUM_THREADS=1 python benchmarks/digits_grid.py

Every run sees 8,192 samples (6.5 epochs), with bs_optuna's own loop: warmup, then cosine. The 161
runs of a seed take seven minutes of one core. Those that the file already holds are left out, so it
can be stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bs_optuna.errors import DivergedError
from bs_optuna.tasks.digits import task as digits
from bs_optuna.training.budget import Budget
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.task import TrainingTask


FILE = Path(__file__).with_name("digits_grid.csv")
COLUMNS = ("optimizer", "batch_size", "lr", "seed", "valid_loss", "valid_accuracy", "steps")
BUDGET = Budget("samples", 8192)
BATCH_SIZES = [2**k for k in range(3, 10)]
LEARNING_RATES = {
    "adamw": [1e-4 * 2**k for k in range(11)],
    "sgd": [1e-3 * 2**k for k in range(12)],
}


def settings(seeds: int) -> Iterator[tuple[str, int, float, int]]:
    """Optimizer, batch size, learning rate and seed of every run, one seed after the other."""
    for seed, optimizer in itertools.product(range(seeds), LEARNING_RATES):
        for batch_size, lr in itertools.product(BATCH_SIZES, LEARNING_RATES[optimizer]):
            yield optimizer, batch_size, lr, seed


def train(
    task: TrainingTask, optimizer: str, batch_size: int, lr: float, seed: int
) -> tuple[float, float, int]:
    """Validation loss and accuracy, and steps done; inf and nan if it diverged."""
    device = torch.device("cpu")
    run = TrainingRun(
        replace(task, optimizer=optimizer),
        RunSettings(
            batch_size=batch_size, learning_rate=lr, budget=BUDGET, seed=seed, evaluations=1
        ),
        device=device,
        limit=memory_limit(device, None),
    )
    try:
        *_, last = run.evaluations()
    except DivergedError:
        return math.inf, math.nan, run.steps
    return last.values["loss"], last.values["accuracy"], run.steps


def done(file: Path) -> set[tuple[str, int, float, int]]:
    """The runs that a file holds."""
    if not file.exists():
        return set()
    with file.open(newline="") as lines:
        return {
            (row["optimizer"], int(row["batch_size"]), float(row["lr"]), int(row["seed"]))
            for row in csv.DictReader(lines)
        }


def main() -> None:
    """Read the flags and train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--file", type=Path, default=FILE)
    flags = parser.parse_args()
    there, task = done(flags.file), digits()
    with flags.file.open("a", newline="") as lines:
        rows = csv.writer(lines, lineterminator="\n")
        if not there:
            rows.writerow(COLUMNS)
        for setting in settings(flags.seeds):
            if setting not in there:
                loss, accuracy, steps = train(task, *setting)
                optimizer, batch_size, lr, seed = setting
                rows.writerow(
                    [optimizer, batch_size, lr, seed, f"{loss:.5g}", f"{accuracy:.4f}", steps]
                )
                lines.flush()


if __name__ == "__main__":
    main()
