"""The throughput of a task's training steps, measured on microbatches of doubling size."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property

import torch
from torch import nn

from bs_optuna.science.throughput import TOLERANCE
from bs_optuna.science.throughput import samples_per_second
from bs_optuna.science.throughput import smallest_fast
from bs_optuna.training.backward import AccumulatedBackward
from bs_optuna.training.data import first_samples
from bs_optuna.training.memory_limit import MemoryLimit
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import release
from bs_optuna.training.recipes import optimizer_factory
from bs_optuna.training.stepping import GuardedStep
from bs_optuna.training.task import TrainingTask


_logger = logging.getLogger(__name__)

# BatchNorm refuses a single sample.
FEWEST_SAMPLES = 2
# The first ones load kernels and make the optimizer's state.
UNTIMED_STEPS = 3
TIMED_STEPS = 7
# The model is thrown away, and should not diverge before that.
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
        rates: Samples per second of full training steps, by microbatch size.
        fails: The microbatch size that ran out of memory, None if none did.
    """

    rates: dict[int, float] = field(default_factory=dict)
    fails: int | None = None

    @cached_property
    def smallest_fast(self) -> int | None:
        """The smallest size within 3 % of the best throughput; None if not one step fitted."""
        return smallest_fast(self.rates) if self.rates else None


def measure_throughput(
    task: TrainingTask,
    *,
    device: torch.device,
    limit: MemoryLimit,
    batch_size: int,
    most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Times a few full steps of a throw-away model for each microbatch size, and takes the median.

    Args:
        task: What is trained.
        device: Where it is trained.
        limit: What it may use there.
        batch_size: Samples per optimizer step that the throughput is stated for.
        most: The largest microbatch size to measure; the others are powers of two.
        clock: Seconds since some moment.
    """
    rates: dict[int, float] = {}
    fails = None
    limit.start_trial()
    with limit.active():
        try:
            timed = _TimedStep(task, device, clock)
            for size in _sizes(most):
                seconds = timed.medians(size)
                if seconds is None:
                    fails = size
                    break
                rates[size] = samples_per_second(
                    batch_size, size, backward_seconds=seconds[0], update_seconds=seconds[1]
                )
        except Exception as error:  # not even a smaller one fits, which a trial will tell
            if classify(error) is None:
                raise
            release(error)
    found = Throughput(rates, fails)
    _logger.info(
        "samples per second by microbatch size: %s; the smallest within %.0f %% of the best: %s",
        ", ".join(f"{size}: {rate:,.4g}" for size, rate in rates.items()),
        100 * TOLERANCE,
        found.smallest_fast,
    )
    return found


def _sizes(most: int) -> list[int]:
    least = min(FEWEST_SAMPLES, most)
    return sorted({*(2**n for n in range(1, most.bit_length())), least, most})


class _TimedStep:
    """A new model of a task, whose steps are timed in two parts."""

    def __init__(
        self, task: TrainingTask, device: torch.device, clock: Callable[[], float]
    ) -> None:
        self._task = task
        self._device = device
        self._clock = clock
        self._model = task.model().to(device).train()
        self._loss = task.loss
        self._parameters = list(self._model.parameters())
        if isinstance(task.loss, nn.Module):
            self._loss = copy.deepcopy(task.loss).to(device)
            self._parameters += self._loss.parameters()
        optimizer = optimizer_factory(task.optimizer)(self._parameters, LEARNING_RATE)
        self._update = GuardedStep(optimizer)

    def medians(self, size: int) -> tuple[float, float] | None:
        """Seconds of forward and backward on that many samples, and of the optimizer's step.

        None if so many do not fit.
        """
        inputs, targets = first_samples(self._task.train_data, size)
        backward = AccumulatedBackward(
            self._model,
            self._loss,
            count=self._task.count,
            batch_norm="exact",  # says nothing of a split, which ends the measurement
        )
        seconds = []
        for _ in range(UNTIMED_STEPS + TIMED_STEPS):
            for parameter in self._parameters:
                parameter.grad = None
            begin = self._now()
            if backward(inputs, targets).backoffs:
                return None
            middle = self._now()
            self._update()
            seconds.append((middle - begin, self._now() - middle))
        first, second = zip(*seconds[UNTIMED_STEPS:], strict=True)
        return statistics.median(first), statistics.median(second)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._clock()
