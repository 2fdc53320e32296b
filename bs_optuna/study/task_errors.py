"""An error of the task's own code, with the training it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import optuna

from bs_optuna.errors import BsOptunaError
from bs_optuna.errors import TrainingError
from bs_optuna.study.storage_errors import is_storage_error


@contextmanager
def named_errors(training: str) -> Iterator[None]:
    """A context whose unexpected errors become a TrainingError that names the training.

    Args:
        training: What runs in it, in a few words.

    Raises:
        TrainingError: Anything but an error that is meant, or the storage's, was raised, which is
            its cause.
    """
    try:
        yield
    except (BsOptunaError, optuna.TrialPruned):
        raise
    except Exception as error:
        if is_storage_error(error):
            raise
        reason = "".join(f": {line}" for line in str(error).splitlines()[:1])
        raise TrainingError(
            f"{training} ended by {type(error).__name__}{reason}; its traceback stands above. "
            "Finished trials are kept; mend it, and the same command goes on."
        ) from error


def set_up_of(task: str) -> str:
    """What runs before any trial, in a few words."""
    return f"the set-up of task {task}"


def described(trial: optuna.Trial) -> str:
    """A trial that has its batch size and learning rate, in a few words."""
    batch_size, learning_rate = trial.params["batch_size"], trial.params["lr"]
    return f"trial {trial.number} (batch_size={batch_size}, lr={learning_rate:.3g})"
