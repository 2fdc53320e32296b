"""RunSettings: what one training run is given beside its task, and what it cannot be given."""

from __future__ import annotations

from dataclasses import dataclass

from bs_optuna.errors import ConfigError
from bs_optuna.errors import TaskError
from bs_optuna.training.budget import Budget
from bs_optuna.training.task import TrainingTask


OOM_BUDGET = 0.5


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What one run is trained with.

    Attributes:
        batch_size: Samples per optimizer step.
        learning_rate: Peak of the schedule.
        budget: When the run ends.
        seed: Of the model's weights and the order of the data.
        microbatch_size: Most samples in a microbatch, to begin with; None is the whole batch.
        evaluation_batch_size: Most samples in a piece of an evaluation, to begin with; None leaves
            it to the microbatch.
        evaluation_killed: Whether a larger piece has ended an attempt before this one.
        short_of_memory: Whether others have run out of it. An evaluation of which nothing else is
            known then begins with pieces twice as large as a microbatch that has trained.
        evaluations: How often to evaluate, the end included.
        warned: Whether it was said before that microbatches change BatchNorm.
        oom_budget: Largest part of the run's time that may be lost to running out of memory, once
            there were more failures than any search for a size needs.
    """

    batch_size: int
    learning_rate: float
    budget: Budget
    seed: int
    microbatch_size: int | None = None
    evaluation_batch_size: int | None = None
    evaluation_killed: bool = False
    short_of_memory: bool = False
    evaluations: int = 5
    warned: bool = False
    oom_budget: float = OOM_BUDGET


def check_range(name: str, low: float, high: float) -> None:
    """Refuses a range that is inverted or not positive, with a ConfigError."""
    if not 0 < low <= high:
        raise ConfigError(
            f"{name}={low}:{high}; must be LOW:HIGH with 0 < LOW <= HIGH. Swap or raise them."
        )


def check_enough(task: TrainingTask, batch_size: int) -> None:
    """Refuses a batch that is larger than the training data, with a TaskError."""
    if batch_size > task.train_samples:
        raise TaskError(
            f"batch_size={batch_size} is more than the {task.train_samples} training samples of "
            f"task {task.name!r}; lower the upper end of the range."
        )
