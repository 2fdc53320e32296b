"""The sizes that a study begins with, before any has been seen to fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from bs_optuna.errors import UntraceableError
from bs_optuna.science.memory import MicrobatchBounds
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.loop import SMALLEST_EVALUATION_BATCH
from bs_optuna.training.measured_memory import MeasuredMemory
from bs_optuna.training.memory_probe import MemoryProbe
from bs_optuna.training.memory_probe import usable_bytes
from bs_optuna.training.oom import release
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throughput import FEWEST_SAMPLES
from bs_optuna.training.throughput import Throughput
from bs_optuna.training.throughput import measure_throughput


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittingSizes:
    """What is predicted to fit; 0 where a single sample does not, None where nothing is known.

    Attributes:
        microbatch: Samples in a microbatch of training.
        evaluation: Samples in a piece of an evaluation.
    """

    microbatch: int | None = None
    evaluation: int | None = None


class StartingSizes:
    """Predicts the largest sizes that fit, and measures which is fastest, once, when first asked.

    Args:
        task: What is trained.
        device: Where it is trained.
        limit: What it may use there.
        batch_size: The largest batch.

    Attributes:
        measured: The throughput of microbatches; None before ``measure``.
    """

    def __init__(
        self, task: TrainingTask, *, device: torch.device, limit: MemoryLimit, batch_size: int
    ) -> None:
        self._task = task
        self._device = device
        self._limit = limit
        self._batch_size = batch_size
        self._predicted: dict[int, FittingSizes] = {}
        self._probe: MemoryProbe | None = None
        self._untraceable = False
        self._real_steps = MeasuredMemory(task, device=device)
        self.measured: Throughput | None = None

    def predicted(self, batch_size: int) -> FittingSizes:
        """What fits beside a batch of a size, as `predict` has found; nothing is known before."""
        return self._predicted.get(self._up_to(batch_size), FittingSizes())

    def predict(self, batch_size: int, *, measure: bool) -> bool:
        """Finds out what fits beside a batch of a size, which takes memory too.

        Once for all sizes up to the next power of two, or to the largest. Nothing is known without
        a limit, or if the task can neither be traced nor measured.

        Args:
            batch_size: Samples per optimizer step.
            measure: Whether real steps may be taken where a task cannot be traced, or to see
                whether they take more than was traced. Where some were taken for another batch
                size they are for all.

        Returns:
            Whether that was done now and took its time; False if it was known already.
        """
        up_to = self._up_to(batch_size)
        if up_to in self._predicted:
            return False
        available = available_bytes(self._device, self._limit.limit_bytes)
        found = FittingSizes()
        if available is not None:
            with as_limited(self._device, self._limit.limit_bytes):
                found = self._traced(max(up_to, batch_size), available)
                if measure or self._real_steps.begun:
                    found = self._checked(found, max(up_to, batch_size), available)
        self._predicted[up_to] = found
        return True

    def _up_to(self, batch_size: int) -> int:
        return min(1 << (batch_size - 1).bit_length(), self._batch_size)

    def _checked(self, traced: FittingSizes, batch_size: int, available: int) -> FittingSizes:
        size = traced.microbatch
        if size is not None and not self._contradicted(size, batch_size, available):
            return traced
        usable = usable_bytes(available)
        measured = self._real_steps.largest_fitting(usable, batch_size=batch_size)
        if measured is None or measured == batch_size:
            return FittingSizes(size if measured is None else measured, traced.evaluation)
        # Without gradients twice as much fits as a rule.
        return FittingSizes(measured, min(traced.evaluation or 2 * measured, 2 * measured))

    def _contradicted(self, size: int, batch_size: int, available: int) -> bool:
        """Whether a real step of half a size shows that the whole of it does not fit.

        One is taken if more than half of what there is would be needed. A half that cannot be
        traced says that the rest is not to be trusted either.
        """
        assert self._probe is not None
        traced = partial(self._probe.peak_bytes, batch_size=batch_size)
        half = size // 2
        if half < FEWEST_SAMPLES or 2 * traced(size) <= available:
            return False
        measured = self._real_steps.peak_bytes(half, batch_size=batch_size)
        if measured is None:
            return False
        try:
            expected = traced(half)
        except UntraceableError as error:
            _logger.info("%s", error)
            release(error)
            return True
        # Of twice the size twice as much is not seen.
        if 2 * (measured - expected) <= available - usable_bytes(available):
            return False
        _logger.info(
            "A step with microbatch_size=%d takes %d bytes, not %d as predicted: memory is "
            "measured.", half, measured, expected
        )  # fmt: skip
        return True

    def _traced(self, batch_size: int, available: int) -> FittingSizes:
        if self._untraceable:
            return FittingSizes()
        microbatch: int | None = None
        most = max(2 * batch_size, SMALLEST_EVALUATION_BATCH)
        try:
            self._probe = self._probe or MemoryProbe(self._task, device=self._device)
            microbatch = self._probe.largest_fitting(available, batch_size=batch_size)
            evaluation = self._probe.largest_evaluation(available, batch_size=batch_size, most=most)
            return FittingSizes(microbatch, evaluation)
        except UntraceableError as error:
            _logger.info("%s", error)
            release(error)  # what it holds would count in what is followed next
            self._untraceable = self._probe is None
            return FittingSizes(microbatch)

    def searched(self, batch_size: int) -> bool:
        """Whether what fits can only be found by running out of memory."""
        limited = available_bytes(self._device, self._limit.limit_bytes) is not None
        return limited and self.predicted(batch_size).microbatch is None

    def measure(self, known: MicrobatchBounds) -> Throughput:
        """What microbatches of each size get done, up to the largest that may fit.

        Args:
            known: Which ones other trials have seen to fit.
        """
        if self.measured is None:
            self.predict(self._batch_size, measure=False)  # which is what follows
            predicted = self.predicted(self._batch_size).microbatch
            most = known.start(self._batch_size, predicted=predicted)
            self.measured = measure_throughput(
                self._task,
                device=self._device,
                limit=self._limit,
                batch_size=self._batch_size,
                most=most,
            )
        return self.measured


def available_bytes(device: torch.device, limit_bytes: int | None) -> int | None:
    """What a training that begins now may use of a device; None on a CPU without a limit."""
    if device.type != "cuda":
        return limit_bytes
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return free if limit_bytes is None else min(free, limit_bytes - allocated)


@contextmanager
def as_limited(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Turns off what a limit on the CPU does; convolutions then need more memory.

    See `LinuxCpuLimit`; a prediction must be made with the kernels that training will use.
    """
    if device.type != "cpu" or limit_bytes is None:
        yield
        return
    onednn = torch.backends.mkldnn.set_flags(False)
    nnpack = torch.backends.nnpack.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*onednn)
        torch.backends.nnpack.set_flags(*nnpack)
