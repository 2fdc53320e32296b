"""The throughput of a task's training steps, measured on microbatches of doubling size."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property

import torch

from bs_optuna.science.throughput import TOLERANCE
from bs_optuna.science.throughput import samples_per_second
from bs_optuna.science.throughput import smallest_fast
from bs_optuna.training.batches import take
from bs_optuna.training.data import first_samples
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import release
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throw_away import FEWEST_SAMPLES
from bs_optuna.training.throw_away import ThrowAwayTraining


_logger = logging.getLogger(__name__)

# Sizes take turns, so that a program that is busy for a while slows down all of them alike. The
# first step of a turn finds the caches of another size.
TURNS = 3
TIMED_STEPS = 2


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
    """Times a few full steps of a throw-away model for each microbatch size, and takes medians.

    Args:
        task: What is trained.
        device: Where it is trained.
        limit: What it may use there.
        batch_size: Samples per optimizer step that the throughput is stated for.
        most: The largest microbatch size to measure; the others are powers of two.
        clock: Seconds since some moment.
    """
    seconds: dict[int, list[_Seconds]] = {}
    fails = None
    limit.start_trial()
    with limit.active():
        try:
            timed = _TimedStep(task, device, clock, most)
            for size in _sizes(most):  # loads kernels and makes the optimizer's state
                if timed.step(size) is None:
                    fails = size
                    break
                seconds[size] = []
            for size in TURNS * list(seconds):
                taken = [timed.step(size) for _ in range(1 + TIMED_STEPS)][1:]
                seconds[size] += [t for t in taken if t is not None]
        except Exception as error:  # not even a smaller one fits, which a trial will tell
            if classify(error) is None:
                raise
            release(error)
    rates = {
        size: samples_per_second(
            batch_size,
            size,
            backward_seconds=statistics.median(t.backward for t in taken),
            update_seconds=statistics.median(t.update for t in taken),
        )
        for size, taken in seconds.items()
        if taken
    }
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


@dataclass(frozen=True)
class _Seconds:
    """Of one step: forward and backward, and the optimizer's part."""

    backward: float
    update: float


class _TimedStep:
    """Full steps of a new model of a task, timed in two parts."""

    def __init__(
        self, task: TrainingTask, device: torch.device, clock: Callable[[], float], most: int
    ) -> None:
        self._batch = first_samples(task.train_data, most)
        self._device = device
        self._clock = clock
        self._training = ThrowAwayTraining(task, device)
        self._backwards = {size: self._training.backward(size) for size in _sizes(most)}

    def step(self, size: int) -> _Seconds | None:
        """Trains on that many samples in one microbatch; None if they do not fit."""
        part = take(self._batch, slice(0, size))
        begin = self._now()
        if self._training.gradient(self._backwards[size], part).accumulation_steps > 1:
            return None
        middle = self._now()
        self._training.update()
        return _Seconds(middle - begin, self._now() - middle)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._clock()
