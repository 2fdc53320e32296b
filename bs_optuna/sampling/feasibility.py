"""How a trial that did not fit into memory is stored, so that samplers take it for what it is.

Such a trial is pruned, not failed (samplers ignore failed trials and suggest the same again) and
not complete (then its made-up value could become the best one). Beyond that it violates the
constraint `memory`. The constraint is set on these trials only. Optuna 5.0.0 reads it so:

- TPESampler puts a violating trial behind every other one. Without it, a trial that ran out of
  memory late counts as better than those that the pruner stopped earlier.
- GPSampler looks at complete trials alone. If some of them had a constraint and others had none,
  as in a study that was begun without, it would raise ValueError.
- CmaEsSampler ignores constraints and warns of that after such a trial.
"""

from __future__ import annotations

from optuna import Trial
from optuna.trial import FrozenTrial


MEMORY_CONSTRAINT = "memory"  # of a trial: 1.0 where not even one sample fitted


def mark_memory(trial: Trial, *, fits: bool) -> None:
    """Store that the trial did not fit into memory; the caller raises TrialPruned next.

    A trial that fits stays unmarked: GPSampler could not go on with a study in which only some
    complete trials have a constraint.
    """
    # A trial that is run again after its worker died brings the mark with it.
    if not fits and MEMORY_CONSTRAINT not in trial.constraints:
        trial.set_constraint(MEMORY_CONSTRAINT, 1.0)


def is_out_of_memory(trial: FrozenTrial) -> bool:
    """Whether the trial is marked as one that did not fit into memory."""
    return trial.constraints.get(MEMORY_CONSTRAINT, 0.0) > 0.0
