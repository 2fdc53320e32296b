"""RunSettings: what one training run is given beside its task."""

from __future__ import annotations

from dataclasses import dataclass

from bs_optuna.training.budget import Budget


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
        evaluations: How often to evaluate, the end included.
        oom_budget: Largest part of the run's time that may be lost to running out of memory, once
            there were more failures than any search for a size needs.
    """

    batch_size: int
    learning_rate: float
    budget: Budget
    seed: int
    microbatch_size: int | None = None
    evaluation_batch_size: int | None = None
    evaluations: int = 5
    oom_budget: float = OOM_BUDGET
