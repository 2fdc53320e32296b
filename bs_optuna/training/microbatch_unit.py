"""What a study counts microbatches in: samples, or samples as long as the longest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bs_optuna.training.task import TrainingTask


@dataclass(frozen=True)
class MicrobatchUnit:
    """Between the sizes of a study and the limits of AccumulatedBackward.

    Attributes:
        elements: Of the longest training sample; None where microbatches are limited by their
            number of samples.
    """

    elements: int | None

    @classmethod
    def of(cls, task: TrainingTask) -> MicrobatchUnit:
        """The unit of a task."""
        return cls(task.longest)

    def settings(self, task: TrainingTask, size: int) -> dict[str, Any]:
        """The arguments of AccumulatedBackward for microbatches of at most some size."""
        if self.elements is None:
            return {"microbatch_size": size}
        return {
            "microbatch_tokens": self.limit(size), "lengths": task.lengths, "trim": task.trim
        }  # fmt: skip

    def size(self, limit: int) -> int:
        """The smallest size whose microbatches may hold as much as a limit."""
        return limit if self.elements is None else -(-limit // self.elements)

    def full_size(self, limit: int) -> int:
        """The largest size that holds no more than a limit; 0 is less than one sample."""
        return limit if self.elements is None else limit // self.elements

    def limit(self, size: int) -> int:
        """What microbatches of a size may hold."""
        return size if self.elements is None else size * self.elements
