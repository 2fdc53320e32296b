"""What a study would need of memory, batch size by batch size, as a table; nothing is stored."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from dataclasses import replace

import torch
from rich.table import Table

from bs_optuna.config import StudyConfig
from bs_optuna.errors import ConfigError
from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.study.device import device_named
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.objective import default_device
from bs_optuna.training.predicted_memory import PredictedMemory
from bs_optuna.training.random_states import kept_random_states
from bs_optuna.training.starting_sizes import as_limited
from bs_optuna.training.starting_sizes import available_bytes
from bs_optuna.training.task import TrainingTask


@dataclass(frozen=True)
class Forecast:
    """What a step on a batch is predicted to need.

    Attributes:
        plan: How the batch would be cut to begin with.
        peak_bytes: Most bytes of model, gradients, optimizer state, batch and activations.
        fits: Whether that is less than there is.
    """

    plan: AccumulationPlan
    peak_bytes: float
    fits: bool


def forecast(config: StudyConfig, task: TrainingTask) -> Table:
    """The table of the powers of two in the range of batch sizes, and of its ends.

    Where there is a limit, or a GPU, it is what a study would begin with, found as it would find
    it: a few real steps may be taken, of models that are thrown away.

    Raises:
        UntraceableError: The task cannot be followed without running it, nor measured.
        ConfigError: A device that is not there, or one that does not tell its memory.
    """
    if config.optimizer is not None:
        task = replace(task, optimizer=config.optimizer)
    device = device_named(config.device) or default_device()
    memory = _memory(device, config.memory_limit)
    measure = _can_measure(device, config.memory_limit)
    limit = memory_limit(device, config.memory_limit if measure else None)
    predicted = PredictedMemory(task, device=device, limit=limit)
    with as_limited(device, config.memory_limit), kept_random_states(device):
        rows = _forecasts(config, predicted, memory, measure=measure)
    kind = "limit" if config.memory_limit is not None else "memory"
    how = "Measured" if predicted.measured else "Predicted"
    title = f"{how} memory of {task.name} on {device}, {kind} {_mib(memory)}"
    if task.longest is not None:
        title += ", all samples as long as the longest"
    table = Table(title=title, title_justify="left")
    for column in ("batch size", "microbatch size", "accumulation steps", "peak", "fits"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (row.plan.batch_size, row.plan.microbatch_size, row.plan.accumulation_steps)
        fits = "yes" if row.fits else "[bold red]no"
        table.add_row(*map(str, numbers), _mib(row.peak_bytes), fits)
    return table


def _forecasts(
    config: StudyConfig, predicted: PredictedMemory, memory: int, *, measure: bool
) -> list[Forecast]:
    low, high = config.batch_size
    powers = {2**n for n in range(low.bit_length(), high.bit_length())}
    found = []
    for batch_size in sorted({low, *powers, high}, reverse=True):  # each narrows the next search
        most = batch_size
        if isinstance(config.microbatch_size, int):  # which one is the fastest only a run can tell
            most = min(most, config.microbatch_size)
        sizes = predicted.largest_fitting(memory, batch_size=batch_size, most=most, measure=measure)
        most = most if sizes.microbatch is None else sizes.microbatch
        plan = AccumulationPlan(batch_size, max(1, most))
        peak = predicted.peak_bytes(plan.microbatch_size, batch_size=batch_size)
        found.append(Forecast(plan, peak, peak <= memory))
    return found[::-1]


def _can_measure(device: torch.device, limit_bytes: int | None) -> bool:
    """Whether a study would take real steps to see what fits, and this machine has the memory."""
    if limit_bytes is None or device.type not in ("cpu", "cuda"):
        return device.type == "cuda"
    prepared = device.type == "cuda" or is_prepared()
    return prepared and limit_bytes <= _memory(device, None)


def _memory(device: torch.device, limit_bytes: int | None) -> int:
    """What there is: the limit, or what the device has left, or the memory of the machine."""
    available = available_bytes(device, limit_bytes)
    if available is not None:
        return available
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    raise ConfigError(
        f"device={device}; how much memory it has is unknown here: add --memory-limit."
    )


def _mib(size: float) -> str:
    return "more" if size == math.inf else f"{size / 2**20:,.1f} MiB"
