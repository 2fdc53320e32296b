"""What a study would need of memory, batch size by batch size, as a table; nothing is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace

import torch
from rich.table import Table

from bs_optuna.config import StudyConfig
from bs_optuna.errors import ConfigError
from bs_optuna.science.accumulation import AccumulationPlan
from bs_optuna.study.device import device_named
from bs_optuna.training.host_memory import total_host_bytes
from bs_optuna.training.limit_environment import is_prepared
from bs_optuna.training.memory_limit import memory_limit
from bs_optuna.training.objective import default_device
from bs_optuna.training.predicted_memory import PART_OF_HOST
from bs_optuna.training.predicted_memory import PredictedMemory
from bs_optuna.training.random_states import kept_random_states
from bs_optuna.training.run_settings import check_enough
from bs_optuna.training.starting_sizes import as_limited
from bs_optuna.training.starting_sizes import available_bytes
from bs_optuna.training.task import TrainingTask


_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


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

    It is what a study would begin with, found as it would find it: where there is a limit, or a
    GPU, a few real steps may be taken, of models that are thrown away.

    Raises:
        TaskError: The training data holds fewer samples than the largest batch size.
        UntraceableError: The task cannot be followed without running it, nor measured.
        ConfigError: A device that is not there, or one that does not tell its memory.
    """
    if config.optimizer is not None:
        task = replace(task, optimizer=config.optimizer)
    config = config.for_samples(task.train_samples)
    check_enough(task, config.batch_size[1])
    device = device_named(config.device) or default_device()
    memory = _memory(device, config)
    measure = _can_measure(device, config.memory_limit)
    limit = memory_limit(device, config.memory_limit if measure else None)
    predicted = PredictedMemory(
        task,
        device=device,
        limit=limit,
        in_part=device.type == "cpu" and config.memory_limit is None,
    )
    with as_limited(device, config.memory_limit), kept_random_states(device):
        rows = _forecasts(config, predicted, memory, measure=measure)
    how = "Measured" if predicted.measured else "Predicted"
    title = f"{how} memory of {task.name} on {device}, {_described(memory, device, config)}"
    if task.longest is not None:
        title += ", all samples as long as the longest"
    table = Table(title=title, title_justify="left")
    for column in ("batch size", "microbatch size", "accumulation steps", "peak", "fits"):
        table.add_column(column, justify="right")
    highest = max((row.peak_bytes for row in rows if row.peak_bytes < math.inf), default=0.0)
    for row in rows:
        numbers = (row.plan.batch_size, row.plan.microbatch_size, row.plan.accumulation_steps)
        fits = "yes" if row.fits else "[bold red]no"
        table.add_row(*map(str, numbers), _shown(row.peak_bytes, like=highest), fits)
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
    if device.type == "cpu" and limit_bytes is not None:
        return is_prepared() and not _is_elsewhere(device, limit_bytes)
    return device.type == "cuda"


def _memory(device: torch.device, config: StudyConfig) -> int:
    """What a study would plan with: the limit, or its share of what the device has left."""
    if config.memory_limit is not None and _is_elsewhere(device, config.memory_limit):
        return config.memory_limit
    processes = max(1, config.worker_processes)
    available = available_bytes(device, config.memory_limit, processes=processes)
    if available is not None:
        return available
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type == "cpu" and (total := total_host_bytes()) is not None:
        return total
    raise ConfigError(
        f"device={device}; how much memory it has is unknown here: add --memory-limit."
    )


def _is_elsewhere(device: torch.device, limit_bytes: int) -> bool:
    """Whether a limit is that of another machine, which has more memory than this one."""
    total = total_host_bytes()
    return device.type == "cpu" and total is not None and limit_bytes > total


def _described(memory: int, device: torch.device, config: StudyConfig) -> str:
    if config.memory_limit is not None:
        less = f" ({_shown(memory)} are free)" if memory < config.memory_limit else ""
        return f"limit {_shown(config.memory_limit)}{less}"
    workers = f" for each of {config.workers} workers" if (config.workers or 1) > 1 else ""
    if device.type != "cpu":
        return f"{_shown(memory)} free{workers}"
    return f"{_shown(memory)} free{workers}, {100 * PART_OF_HOST:.0f} % of it for activations"


def _shown(size: float, *, like: float | None = None) -> str:
    """A number of bytes in the unit that suits it, or another one that it stands beside."""
    if size == math.inf:
        return "more"
    suited = size if like is None else like
    unit = next((unit for unit in _UNITS if suited >= _UNITS[unit]), "KiB")
    return f"{size / _UNITS[unit]:,.1f} {unit}"
