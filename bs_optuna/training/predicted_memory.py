"""The largest sizes that fit: predicted on fake tensors, checked and mended by a few real steps."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace
from functools import partial

import torch

from bs_optuna.errors import UntraceableError
from bs_optuna.training.evaluation import largest_piece
from bs_optuna.training.fake_leftovers import no_fake_tensors_left
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.measured_memory import MeasuredMemory
from bs_optuna.training.memory_probe import MemoryProbe
from bs_optuna.training.memory_probe import usable_bytes
from bs_optuna.training.oom import release
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throw_away import FEWEST_SAMPLES


_logger = logging.getLogger(__name__)
# Of what a machine has left: in an ordinary process the C library keeps what is freed, so that
# trainings take up to three times as much as their tensors, and other programs want some too.
PART_OF_HOST = 0.3


@dataclass(frozen=True)
class FittingSizes:
    """What is predicted to fit; 0 where a single sample does not, None where nothing is known.

    Attributes:
        microbatch: Samples in a microbatch of training.
        evaluation: Samples in a piece of an evaluation.
    """

    microbatch: int | None = None
    evaluation: int | None = None


class PredictedMemory:
    """What a task's training takes of memory, before it is trained.

    Args:
        task: What would be trained.
        device: Where it would be trained.
        limit: What it may use there.
        in_part: Whether only a part of what there is may be planned with, as on a CPU without a
            limit, where the kernel kills who takes too much.

    Attributes:
        untraceable: Why nothing can be followed on fake tensors, if that is so.
        measured: Whether it is real steps that predict, not fake tensors.
    """

    def __init__(
        self,
        task: TrainingTask,
        *,
        device: torch.device,
        limit: MemoryLimit,
        in_part: bool = False,
    ) -> None:
        self._task = task
        self._device = device
        self._in_part = in_part
        self._probe: MemoryProbe | None = None
        self._real_steps = MeasuredMemory(task, device=device, limit=limit)
        self.untraceable: UntraceableError | None = None
        self.measured = False

    def surely_fits(self, available_bytes: int, *, batch_size: int) -> bool:
        """Whether there plainly is enough for a batch that is not split; see `MeasuredMemory`.

        It is only looked at where a part may be planned with; most trainings are far from that.
        """
        planned = int(PART_OF_HOST * available_bytes)
        return self._in_part and self._real_steps.surely_fits(planned, batch_size=batch_size)

    def largest_fitting(
        self, available_bytes: int, *, batch_size: int, most: int, measure: bool
    ) -> FittingSizes:
        """The largest sizes that are predicted to fit.

        Args:
            available_bytes: What there is; on a CPU without a limit a part of it is planned with.
            batch_size: Samples per optimizer step; the batch takes memory too.
            most: The largest microbatch of interest.
            measure: Whether real steps may be taken where a task cannot be traced, or to see
                whether they take more than was traced. Where some were taken for another batch
                size they are for all.
        """
        if not self._in_part:
            return self._largest_fitting(available_bytes, batch_size, most, measure=measure)
        planned = self._planned(available_bytes, batch_size)
        found = self._largest_fitting(planned, batch_size, most, measure=measure)
        if found.microbatch is None:
            return found
        # It is a guess that memory is short; BatchNorm refuses a single sample for certain.
        return replace(found, microbatch=max(found.microbatch, min(FEWEST_SAMPLES, most)))

    def _planned(self, free_bytes: int, batch_size: int) -> int:
        """What to plan with: all that does not go with the microbatch, and of the rest a part.

        Model, gradients and the optimizer's state stay; it is what comes and goes that the C
        library keeps.
        """
        fixed = 0
        if (probe := self._followed()) is not None:
            with suppress(UntraceableError), self._predicting():
                fixed = probe.peak_bytes(1, batch_size=batch_size)
        elif (peak := self._real_steps.least_bytes(batch_size=batch_size)) is not None:
            fixed = int(min(peak, free_bytes))  # infinite if it ran out all the same
        return fixed + int(PART_OF_HOST * max(0, free_bytes - fixed))

    def _largest_fitting(
        self, available_bytes: int, batch_size: int, most: int, *, measure: bool
    ) -> FittingSizes:
        traced = self._traced(available_bytes, batch_size, most)
        if not measure and (self._real_steps.counts_tensors or not self._real_steps.begun):
            return traced
        size = traced.microbatch
        if size is not None and not self._contradicted(size, batch_size, available_bytes):
            return traced
        usable = usable_bytes(available_bytes)
        measured = self._real_steps.largest_fitting(usable, batch_size=batch_size, most=most)
        if measured is None:
            return traced
        self.measured = True
        if measured == most:
            return FittingSizes(measured, traced.evaluation)
        # Gradients and optimizer state are there too: twice as much would not always fit.
        pieces = measured if traced.evaluation is None else traced.evaluation
        return FittingSizes(measured, min(pieces, measured))

    def peak_bytes(self, microbatch_size: int, *, batch_size: int) -> float:
        """Most bytes held at a time while a batch is trained on in microbatches of a size.

        Raises:
            UntraceableError: It can neither be traced nor was it measured.
        """
        if self.measured:
            return self._real_steps.expected_bytes(microbatch_size, batch_size=batch_size)
        if self._probe is None:
            assert self.untraceable is not None
            raise self.untraceable
        with self._predicting():
            return self._probe.peak_bytes(microbatch_size, batch_size=batch_size)

    def _predicting(self) -> AbstractContextManager[None]:
        """Around all that follows the task's code on fake tensors; real steps come between."""
        task = self._task
        return no_fake_tensors_left((task.model, task.loss, *task.metrics.values()))

    def _followed(self) -> MemoryProbe | None:
        """A training on fake tensors, made once; None where it cannot be followed."""
        if self._probe is None and self.untraceable is None:
            try:
                with self._predicting():
                    self._probe = MemoryProbe(self._task, device=self._device)
            except UntraceableError as error:
                _logger.info("%s", error)
                release(error)  # what it holds would count in what is followed next
                self.untraceable = error
        return self._probe

    def _traced(self, available_bytes: int, batch_size: int, most: int) -> FittingSizes:
        if (probe := self._followed()) is None:
            return FittingSizes()
        microbatch: int | None = None
        pieces = largest_piece(batch_size, None)
        try:
            with self._predicting():
                fitting = probe.largest_fitting(available_bytes, batch_size=batch_size)
                microbatch = min(fitting, most)
                evaluation = probe.largest_evaluation(
                    available_bytes, batch_size=batch_size, most=pieces
                )
            return FittingSizes(microbatch, evaluation)
        except UntraceableError as error:
            _logger.info("%s", error)
            release(error)
            return FittingSizes(microbatch)

    def _contradicted(self, size: int, batch_size: int, available_bytes: int) -> bool:
        """Whether a real step of half a size shows that the whole of it does not fit.

        One is taken if more than half of what there is would be needed, and if it would show more
        than was traced. A half that cannot be traced says that the rest is not to be trusted
        either.
        """
        if self._real_steps.counts_tensors:
            return False
        assert self._probe is not None
        traced = partial(self._probe.peak_bytes, batch_size=batch_size)
        half = size // 2
        try:
            with self._predicting():
                if half < FEWEST_SAMPLES or 2 * traced(size) <= available_bytes:
                    return False
                expected = traced(half)
            measured = self._real_steps.peak_bytes(half, batch_size=batch_size)
            if measured is None:
                return False
        except UntraceableError as error:
            _logger.info("%s", error)
            release(error)
            return True
        # Of twice the size twice as much is not seen.
        if 2 * (measured - expected) <= available_bytes - usable_bytes(available_bytes):
            return False
        _logger.info(
            "A step with microbatch_size=%d takes %.0f bytes, not %.0f as predicted: memory is "
            "measured.", half, measured, expected
        )  # fmt: skip
        return True
