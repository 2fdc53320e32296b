"""Budget: what every trial of a study gets the same amount of. Loads no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal
from typing import get_args

from bs_optuna.errors import ConfigError


BudgetUnit = Literal["samples", "steps", "seconds"]


@dataclass(frozen=True)
class Budget:
    """An amount of training samples, optimizer steps or seconds of training.

    The unit decides what a study can find out. Equal samples favour small batches and equal steps
    large ones; neither says which batch size is fastest: equal seconds do (Godbole et al., Deep
    Learning Tuning Playbook). So a study always says which one it compared.

    Attributes:
        unit: ``"samples"``, ``"steps"`` or ``"seconds"``.
        amount: How much of it, above 0.
    """

    unit: BudgetUnit
    amount: float

    def __post_init__(self) -> None:
        if self.unit not in get_args(BudgetUnit):
            raise ConfigError(
                f"budget={self.unit!r}; the unit must be samples, steps or seconds, "
                "as in budget='samples=2e6'."
            )
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ConfigError(f"budget={self}; the amount must be a finite number above 0.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``"samples=2e6"``.

        Raises:
            ConfigError: It is not of that form, the unit is unknown or the amount not above 0.
        """
        unit, _, amount = text.partition("=")
        try:
            return cls(unit.strip(), float(amount))  # type: ignore[arg-type]  # checked there
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(
                f"budget={text!r}; must be samples=NUMBER, steps=NUMBER or seconds=NUMBER, "
                "as in budget='samples=2e6'."
            ) from None

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:.12g}"

    def steps(self, batch_size: int) -> int | None:
        """Optimizer steps at that batch size, at least 1; None if only the clock can tell."""
        if self.unit == "seconds":
            return None
        samples = self.amount if self.unit == "samples" else self.amount * batch_size
        return max(1, round(samples / batch_size))
