"""Peak memory of real training steps, from small ones up: for what fake tensors cannot tell."""

from __future__ import annotations

import gc
import logging
import math
import sys
import warnings
from functools import cached_property
from functools import partial
from typing import Any

import torch

from bs_optuna.science.memory import fits_surely
from bs_optuna.science.memory import largest_from_below as search
from bs_optuna.science.memory import on_the_line
from bs_optuna.training.batches import batch_length
from bs_optuna.training.batches import take
from bs_optuna.training.cutting import sample_lengths
from bs_optuna.training.data import bytes_per_sample
from bs_optuna.training.data import evaluation_batches
from bs_optuna.training.data import first_samples
from bs_optuna.training.data import length
from bs_optuna.training.evaluation import largest_piece
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.live_storages import LiveStorages
from bs_optuna.training.oom import classify
from bs_optuna.training.oom import release
from bs_optuna.training.peak_memory import PeakMemory
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throw_away import FEWEST_SAMPLES
from bs_optuna.training.throw_away import ThrowAwayTraining


_logger = logging.getLogger(__name__)
_READ_AT_ONCE = 256  # samples, while one of the longest is sought


class MeasuredMemory:
    """Trains throw-away models for a step each, and sees how much memory that takes.

    The microbatch is doubled as long as the next one is expected to fit, so that nothing runs out
    of memory as a rule.

    Args:
        task: What would be trained.
        device: Where it would be trained.
        limit: What it may use there, in force meanwhile.

    Attributes:
        counts_tensors: Whether it is tensors that are counted, as on a CPU without a limit, and not
            what the device or the process has used: what an operation allocates inside itself is
            not seen then.
    """

    def __init__(self, task: TrainingTask, *, device: torch.device, limit: MemoryLimit) -> None:
        self._task = task
        self._device = device
        self._limit = limit
        self.counts_tensors = device.type == "cpu" and limit.limit_bytes is None
        self._peaks: dict[int, float | None] = {}

    @cached_property
    def _sample_bytes(self) -> int:
        return bytes_per_sample(self._task.train_data, self._device)

    @property
    def begun(self) -> bool:
        """Whether anything was measured."""
        return bool(self._peaks)

    def peak_bytes(self, microbatch_size: int, *, batch_size: int) -> float | None:
        """Most bytes held at a time while a batch is trained on in microbatches of a size.

        Returns:
            Infinity if the limit was reached. None where the peak is unknown: the task's code has
            raised an error, or samples vary in length, or the device, the system or the C library
            does not tell; the latter two but where it is tensors that are counted.
        """
        if microbatch_size not in self._peaks:
            self._peaks[microbatch_size] = self._measured(microbatch_size)
        peak = self._peaks[microbatch_size]
        return None if peak is None else peak + batch_size * self._sample_bytes

    def least_bytes(self, *, batch_size: int) -> float | None:
        """The peak of the smallest size that was measured; None if none was."""
        sizes = [size for size, peak in self._peaks.items() if peak is not None]
        return self.peak_bytes(min(sizes), batch_size=batch_size) if sizes else None

    def largest_fitting(self, usable_bytes: int, *, batch_size: int, most: int) -> int | None:
        """The largest microbatch size, of ``most``, whose step takes no more; None if unknown."""
        return search(
            partial(self.peak_bytes, batch_size=batch_size),
            usable_bytes,
            least=min(FEWEST_SAMPLES, most),
            most=most,
        )

    def surely_fits(self, available_bytes: int, *, batch_size: int) -> bool:
        """Whether a batch fits that is not split, as far as steps on a few samples tell.

        The evaluation after it, in pieces of up to twice the size, does too then: it takes no more
        than training for samples of one size, and for larger ones at most by the square of that,
        as attention does. For a small model this takes some hundredths of a second, where following
        a step on fake tensors takes one or more.
        """
        task = self._task
        pieces = largest_piece(batch_size, None)
        evaluated = bytes_per_sample(task.valid_data, self._device)
        larger = max(1.0, evaluated / max(1, self._sample_bytes))
        most = max(batch_size, int(min(pieces, length(task.valid_data)) * larger**2))
        return fits_surely(
            lambda size: self.peak_bytes(size, batch_size=size),
            available_bytes,
            least=min(FEWEST_SAMPLES, batch_size),
            most=most,
        )

    def expected_bytes(self, microbatch_size: int, *, batch_size: int) -> float:
        """The peak of any size, on the line through those next to it that were measured.

        Something must have been measured. Below the smallest size that was, its peak is given.
        """
        peaks = {size: self.peak_bytes(size, batch_size=batch_size) for size in self._peaks}
        known = {size: peak for size, peak in peaks.items() if peak is not None}
        finite = {size: peak for size, peak in known.items() if peak < math.inf}
        return on_the_line(microbatch_size, finite) if finite else math.inf

    def _measured(self, size: int) -> float | None:
        if not self.counts_tensors:
            if self._task.longest is not None:
                return None  # the next batch may hold longer ones
            if self._device.type == "cpu" and not is_prepared():
                return None  # what the heap has kept from before would be used again
        gc.collect()  # models of before
        try:
            # The second microbatch of a batch finds gradients, as all but the first do.
            batch = self._longest_samples(2 * size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a trial will say it again
                if self.counts_tensors:
                    return self._counted(size, batch)
                if not self._peaks:
                    self._limit.warm_up(partial(self._train, FEWEST_SAMPLES, batch))
                self._limit.start_trial()
                peak = PeakMemory(self._device)
                peak.start()
                with self._limit.active():
                    fits = self._train(size, batch)
        except Exception as error:  # in the task's own code, of which a trial will tell
            ran_out = classify(error) is not None
            _logger.info("no step of microbatch_size=%d was measured: %s", size, error)
            release(error)
            return math.inf if ran_out else None
        finally:
            gc.collect()
        return peak.bytes() if fits else math.inf

    def _counted(self, size: int, batch: Any) -> float:
        storages = LiveStorages(self._device.type, most_operations=sys.maxsize)
        with storages:
            fits = self._train(size, batch)
        return storages.peak if fits else math.inf

    def _longest_samples(self, count: int) -> Any:
        """So many samples; where they vary in length one of the longest, again and again."""
        if self._task.lengths is None:
            batch = first_samples(self._task.train_data, count)
        else:
            batch = self._longest_sample
        return take(batch, torch.arange(count) % batch_length(batch))

    @cached_property
    def _longest_sample(self) -> Any:
        task = self._task
        assert task.lengths is not None
        assert task.longest is not None
        for piece in evaluation_batches(task.train_data, batch_size=_READ_AT_ONCE):
            lengths = sample_lengths(task.lengths, piece)
            if task.longest in lengths:
                return take(piece, torch.tensor([lengths.index(task.longest)]))
        raise LookupError("no sample is as long as the longest was when the data was read before")

    def _train(self, size: int, batch: Any) -> bool:
        """Trains a new model; says whether microbatches of that size fitted."""
        training = ThrowAwayTraining(self._task, self._device)
        for microbatch_size in (FEWEST_SAMPLES, size):  # the first makes the optimizer's state
            part = take(batch, slice(0, 2 * microbatch_size))
            if len(training.gradient(training.backward(microbatch_size), part).sizes_tried) > 1:
                return False
            training.update()
        return True
