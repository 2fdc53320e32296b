"""The sizes that a study begins with, before any has been seen to fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bs_optuna.training.host_memory import free_host_bytes
from bs_optuna.training.known_sizes import KnownSizes
from bs_optuna.training.limit import MemoryLimit
from bs_optuna.training.oom import empty_caches
from bs_optuna.training.predicted_memory import FittingSizes
from bs_optuna.training.predicted_memory import PredictedMemory
from bs_optuna.training.random_states import kept_random_states
from bs_optuna.training.task import TrainingTask
from bs_optuna.training.throughput import Throughput
from bs_optuna.training.throughput import measure_throughput


class StartingSizes:
    """Predicts the largest sizes that fit, and measures which is fastest, once, when first asked.

    Args:
        task: What is trained.
        device: Where it is trained.
        limit: What it may use there.
        batch_size: The largest batch.
        most: The largest microbatch of interest; None is the whole batch.
        processes: How many train there at a time.

    Attributes:
        measured: The throughput of microbatches; None before ``measure``.
    """

    def __init__(
        self,
        task: TrainingTask,
        *,
        device: torch.device,
        limit: MemoryLimit,
        batch_size: int,
        most: int | None = None,
        processes: int = 1,
    ) -> None:
        self._task = task
        self._device = device
        self._limit = limit
        self._batch_size = batch_size
        self._predicted: dict[int, FittingSizes] = {}
        self._most = most
        self._processes = processes
        self._memory = PredictedMemory(
            task,
            device=device,
            limit=limit,
            in_part=device.type == "cpu" and limit.limit_bytes is None,
        )
        self.measured: Throughput | None = None

    def predicted(self, batch_size: int) -> FittingSizes:
        """What fits beside a batch of a size, as `predict` has found; nothing is known before."""
        return self._predicted.get(self.up_to(batch_size), FittingSizes())

    def predict(self, batch_size: int, known: KnownSizes, *, measure: bool) -> bool:
        """Finds out what fits beside a batch of a size, which takes memory too.

        Once for all sizes up to the next power of two, or to the largest. Nothing is known where
        the device does not tell its memory, if the task can neither be traced nor measured, and on
        a CPU without a limit that plainly has enough.

        Args:
            batch_size: Samples per optimizer step.
            known: What all trials say by now. After a death no real steps are taken, which might
                cause it again.
            measure: Whether real steps of all sizes may be taken, see `PredictedMemory`, where it
                is not known yet whether the whole batch fits.

        Returns:
            Whether that was done now and took its time; False if it was known already.
        """
        up_to = self.up_to(batch_size)
        if up_to in self._predicted:
            return False
        measure = measure and known.leaves_open(up_to) and not known.deaths
        limit_bytes = self._limit.limit_bytes
        available = available_bytes(self._device, limit_bytes, processes=self._processes)
        found = FittingSizes()
        if available is not None:
            with as_limited(self._device, limit_bytes), kept_random_states(self._device):
                if known.deaths or not self._memory.surely_fits(
                    available, batch_size=self._batch_size
                ):
                    most = max(up_to, batch_size)
                    found = self._memory.largest_fitting(
                        available,
                        batch_size=most,
                        most=min(most, self._most or most),
                        measure=measure,
                    )
        self._predicted[up_to] = found
        return True

    def up_to(self, batch_size: int) -> int:
        """The largest batch size that is predicted together with a given one."""
        return min(1 << (batch_size - 1).bit_length(), self._batch_size)

    def searched(self, batch_size: int) -> bool:
        """Whether what fits can only be found by running out of memory, and can be found so."""
        limited = self._device.type == "cuda" or self._limit.limit_bytes is not None
        return limited and self.predicted(batch_size).microbatch is None

    def measure(self, known: KnownSizes) -> Throughput:
        """What microbatches of each size get done, up to the largest that may fit.

        Args:
            known: Which ones other trials have seen to fit.
        """
        if self.measured is None:
            self.predict(self._batch_size, known, measure=False)  # which is what follows
            predicted = self.predicted(self._batch_size).microbatch
            most = known.start(self._batch_size, predicted=predicted)
            with kept_random_states(self._device):
                self.measured = measure_throughput(
                    self._task,
                    device=self._device,
                    limit=self._limit,
                    batch_size=self._batch_size,
                    most=most,
                )
        return self.measured


def available_bytes(
    device: torch.device, limit_bytes: int | None, *, processes: int = 1
) -> int | None:
    """What a training that begins now may use of a device; None where that is unknown.

    Args:
        device: Where it trains.
        limit_bytes: What it may use there, as far as there is a limit.
        processes: How many share what is free; each has the limit for itself.
    """
    if device.type == "cuda":
        empty_caches()  # so that what stays is in use
        free, total = torch.cuda.mem_get_info(device)
        free = min(free, total // processes)
        if limit_bytes is None:
            return free
        return min(free, limit_bytes - torch.cuda.memory_reserved(device))
    host = free_host_bytes() if device.type == "cpu" else None
    if host is None:
        return limit_bytes
    host //= processes
    return host if limit_bytes is None else min(host, limit_bytes)


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
