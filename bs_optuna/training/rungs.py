"""The points of a run at which it is evaluated, comparable between batch sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bs_optuna.training.budget import Budget


@dataclass(frozen=True)
class Rung:
    """One evaluation of a run.

    Attributes:
        progress: Part of the budget that is used up by then, in (0, 1].
        resource: What a pruner compares runs at: training samples seen, or milliseconds if the
            budget is in seconds. None for an end that no other batch size shares.
    """

    progress: float
    resource: int | None


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on the validation data; see Rung for progress and resource."""

    progress: float
    resource: int | None
    values: dict[str, float]
    last: bool


def rungs(budget: Budget, *, batch_size: int, count: int) -> list[Rung]:
    """The evaluations of a run: at most ``count``, and always one at the end.

    Runs of every batch size must meet on the same rungs, or a pruner has nothing to compare. With
    equal samples or seconds, equal parts of the budget are the same for all. With equal steps, runs
    see samples in proportion to their batch size, so the rungs are at powers of two times
    the number of steps: a run of size 64 passes those of size 16 and 32 on its way.
    """
    if budget.unit == "steps":
        return _geometric(steps=budget.steps(1) or 1, batch_size=batch_size, count=count)
    scale = 1000 if budget.unit == "seconds" else 1
    parts = (
        Rung(k / count, max(1, round(budget.amount * scale * k / count)))
        for k in range(1, count + 1)
    )
    return list({rung.resource: rung for rung in parts}.values())  # a tiny budget has fewer


def _geometric(*, steps: int, batch_size: int, count: int) -> list[Rung]:
    highest = int(math.log2(batch_size))
    sizes = [2**j for j in range(max(0, highest - count + 1), highest + 1)]
    found = [Rung(size / batch_size, size * steps) for size in sizes]
    if found[-1].progress == 1:
        return found
    return [*found[max(0, len(found) + 1 - count) :], Rung(1.0, None)]
