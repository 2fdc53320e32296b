"""A training of the recommended setting: its scores, and the noise of its gradients on the way."""

from __future__ import annotations

from dataclasses import dataclass

from bs_optuna.science.noise_scale import NoiseReading
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.task import TrainingTask


@dataclass(frozen=True)
class FinalRun:
    """What it came to.

    Attributes:
        valid: Loss, as ``"loss"``, and metrics on the validation data at the end.
        test: Likewise on the test data; empty without any.
        noise: Readings of the gradient's noise, by the part of the run, in hundredths, after which
            each was taken. Those that failed are missing.
        noise_samples: Samples in each reading.
    """

    valid: dict[str, float]
    test: dict[str, float]
    noise: dict[int, NoiseReading]
    noise_samples: int


def train_final(run: TrainingRun, task: TrainingTask) -> FinalRun:
    """Trains a run of a task to its end.

    Raises:
        DivergedError: The loss is not finite.
        MicrobatchDoesNotFitError: A single sample does not fit.
    """
    noise = {}
    for evaluated in run.evaluations():
        reading = run.gradient_noise()
        if reading is not None:
            noise[round(100 * evaluated.progress)] = reading
    test = {} if task.test_data is None else run.evaluate(task.test_data)
    return FinalRun(run.values, test, noise, run.noise_probe.samples)
