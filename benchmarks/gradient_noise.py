"""The gradient noise scale that final runs read, against that of every single training sample.

    python benchmarks/gradient_noise.py

The digits as the README's study recommends to train them, as the final runs of three studies. What
is read costs a part of the time of such a run, which is printed too.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.science.noise_scale import pooled
from bs_optuna.tasks import digits
from bs_optuna.training import Budget
from bs_optuna.training import TrainingTask
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.noise_probe import samples_to_read
from bs_optuna.training.run_settings import RunSettings


STUDIES = 3
SEEDS = 3  # final runs of a study
BATCH_SIZE, LEARNING_RATE, SAMPLES = 16, 1.63e-3, 10056
CPU = torch.device("cpu")


def exact(model: nn.Module, task: TrainingTask) -> NoiseReading:
    """Signal and noise of the whole training set, from one gradient for each sample."""
    inputs, targets = task.train_data  # type: ignore[misc]
    weights = list(model.parameters())
    total = torch.zeros(sum(w.numel() for w in weights), dtype=torch.float64)
    squares = 0.0
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):
        found = torch.autograd.grad(task.loss(model(x), y), weights)
        gradient = torch.cat([g.flatten() for g in found]).double()
        total += gradient
        squares += float(gradient.square().sum())
    n = len(inputs)
    signal = float((total / n).square().sum())
    return NoiseReading(squared_gradient=signal, variance=(squares / n - signal) * n / (n - 1))


def run(seed: int) -> tuple[list[NoiseReading], list[NoiseReading], float]:
    """What was read and what is true at each evaluation, and what reading cost beside the rest."""
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made.append(digits.task().model())
        return made[-1]

    task = replace(digits.task(), model=model)
    settings = RunSettings(
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        budget=Budget("samples", SAMPLES),
        seed=seed,
    )
    training = TrainingRun(task, settings, device=CPU, limit=memory_limit(CPU, None))
    samples = samples_to_read(task.train_data, batch_size=BATCH_SIZE, run_samples=SAMPLES)
    read, truth, reading, checking = [], [], 0.0, 0.0
    begin = time.perf_counter()
    for _ in training.evaluations():
        began = time.perf_counter()
        found = training.gradient_noise(samples)
        assert found is not None
        read.append(found)
        reading += time.perf_counter() - began
        began = time.perf_counter()
        truth.append(exact(made[-1], task))
        checking += time.perf_counter() - began
    return read, truth, reading / (time.perf_counter() - begin - checking - reading)


def main() -> None:
    """Prints the table."""
    torch.set_flush_denormal(True)
    print("| seeds | after | of all samples, each seed | of all samples | read |")
    print("|---|---|---|---|---|", flush=True)
    costs = []
    for first in range(0, STUDIES * SEEDS, SEEDS):
        runs = [run(seed) for seed in range(first, first + SEEDS)]
        costs += [cost for *_, cost in runs]
        for k in range(len(runs[0][0])):
            truths = [truth[k] for _, truth, _ in runs]
            found = pooled([read[k] for read, _, _ in runs]).noise_scale
            shown = "no signal" if found is None else f"{found:,.0f}"
            each = ", ".join(f"{truth.noise_scale:,.0f}" for truth in truths)
            exactly = f"{pooled(truths).noise_scale:,.0f}"
            seeds = f"{first} to {first + SEEDS - 1}"
            print(f"| {seeds} | {20 * (k + 1)} % | {each} | {exactly} | {shown} |", flush=True)
    print("time of reading / time of training:", *(f"{cost:.3f}" for cost in costs))


if __name__ == "__main__":
    main()
