"""The microbatch size that a study begins with, before any has been seen to fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from bs_optuna.training.memory_limit import MemoryLimit
from bs_optuna.training.memory_probe import largest_fitting
from bs_optuna.training.task import TrainingTask


class StartingSize:
    """Predicts the largest microbatch that fits, once, when it is first asked for.

    Args:
        task: What is trained.
        device: Where it is trained.
        limit: What it may use there.
        batch_size: The largest batch. A smaller one leaves more room beside it, so that what is
            predicted for the largest holds for all.
    """

    def __init__(
        self, task: TrainingTask, *, device: torch.device, limit: MemoryLimit, batch_size: int
    ) -> None:
        self._task = task
        self._device = device
        self._limit = limit
        self._batch_size = batch_size

    @cached_property
    def predicted(self) -> int | None:
        """The size, 0 if a single sample is too much; None where nothing limits or can be told."""
        available = available_bytes(self._device, self._limit.limit_bytes)
        if available is None:
            return None
        with without_onednn(self._device, self._limit.limit_bytes):
            return largest_fitting(
                self._task, available, device=self._device, batch_size=self._batch_size
            )


def available_bytes(device: torch.device, limit_bytes: int | None) -> int | None:
    """What a training that begins now may use of a device; None on a CPU without a limit."""
    if device.type != "cuda":
        return limit_bytes
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return free if limit_bytes is None else min(free, limit_bytes - allocated)


@contextmanager
def without_onednn(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Turns oneDNN off where the limit does so too: without it, convolutions need more memory."""
    if device.type != "cpu" or limit_bytes is None:
        yield
        return
    flags = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*flags)
