"""Peak memory of real training steps, from small ones up: for what fake tensors cannot tell."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from functools import partial

import torch

from bs_optuna.errors import BsOptunaError
from bs_optuna.science.memory import largest_from_below as search
from bs_optuna.science.memory import on_the_line
from bs_optuna.training.budget import Budget
from bs_optuna.training.data import bytes_per_sample
from bs_optuna.training.data import first_samples
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.loop import TrainingRun
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import release
from bs_optuna.training.run_settings import RunSettings
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throughput import FEWEST_SAMPLES
from bs_optuna.training.throughput import LEARNING_RATE


# The first step makes the optimizer's state, and the second finds it.
STEPS = 2


class MeasuredMemory:
    """Trains throw-away models for two steps each, and sees how much memory that takes.

    The microbatch is doubled as long as the next one is expected to fit, so that nothing runs out
    of memory as a rule.

    Args:
        task: What would be trained.
        device: Where it would be trained.
    """

    def __init__(self, task: TrainingTask, *, device: torch.device) -> None:
        self._task = task
        self._device = device
        self._peaks: dict[int, int | None] = {}

    @cached_property
    def _sample_bytes(self) -> int:
        return bytes_per_sample(self._task.train_data, self._device)

    @property
    def begun(self) -> bool:
        """Whether anything was measured."""
        return bool(self._peaks)

    def peak_bytes(self, microbatch_size: int, *, batch_size: int) -> int | None:
        """Most bytes held at a time while a batch is trained on in microbatches of a size.

        Returns:
            None where that is unknown: the step has failed, samples vary in length, or the device,
            the system or the C library does not tell.
        """
        if microbatch_size not in self._peaks:
            self._peaks[microbatch_size] = self._measured(microbatch_size)
        peak = self._peaks[microbatch_size]
        others = batch_size - 2 * microbatch_size  # two were there when it was measured
        return None if peak is None else peak + others * self._sample_bytes

    def largest_fitting(self, usable_bytes: int, *, batch_size: int) -> int | None:
        """The largest microbatch size whose step takes no more than so much; None if unknown."""
        return search(
            partial(self.peak_bytes, batch_size=batch_size),
            usable_bytes,
            least=min(FEWEST_SAMPLES, batch_size),
            most=batch_size,
        )

    def expected_bytes(self, microbatch_size: int, *, batch_size: int) -> int:
        """The peak of any size, on the line through those next to it that were measured.

        Something must have been measured. Below the smallest size that was, its peak is given.
        """
        peaks = {
            size: peak
            for size in self._peaks
            if (peak := self.peak_bytes(size, batch_size=batch_size)) is not None
        }
        return round(on_the_line(microbatch_size, peaks))

    def _measured(self, size: int) -> int | None:
        if self._task.longest is not None:
            return None  # the next batch may hold longer ones
        if self._device.type == "cpu" and not is_prepared():
            return None  # what the heap has kept from before would be used again
        if not self._peaks:
            self._peak_of_steps(FEWEST_SAMPLES)  # what is set up for the first time does not count
        return self._peak_of_steps(size)

    def _peak_of_steps(self, size: int) -> int | None:
        settings = RunSettings(
            batch_size=2 * size,  # the second microbatch finds gradients, as all but the first do
            microbatch_size=size,
            learning_rate=LEARNING_RATE,
            budget=Budget("steps", STEPS),
            seed=0,
            evaluations=1,
        )
        # The evaluation after the steps must not need more than they do, and a metric may refuse
        # so few samples.
        few = first_samples(self._task.train_data, FEWEST_SAMPLES)
        task = replace(self._task, valid_data=few, metrics={}, objective="loss")
        free = memory_limit(self._device, None)
        run = TrainingRun(task, settings, device=self._device, limit=free)
        try:
            for _ in run.checkpoints():
                pass
        except BsOptunaError:
            return None
        except Exception as error:
            if classify(error) is None:
                raise
            release(error)
            return None
        return None if run.failed_sizes else run.peak_memory_bytes()
