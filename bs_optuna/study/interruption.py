"""A trial that a person interrupted is run again, by whoever takes the next trial."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

from optuna import Trial

from bs_optuna.sampling import attributes
from bs_optuna.training.attempt import inherited


def requeue_interrupted(objective: Callable[[Trial], float]) -> Callable[[Trial], float]:
    """Wrap an objective so that Ctrl-C puts the running trial's parameters back into the queue.

    Optuna stores an interrupted trial as failed, like one with a mistake in it. Queueing it at
    the moment of the interruption needs no mark on the trial, and happens once by construction:
    the next worker, or the next run of the study, takes it.
    """

    def wrapped(trial: Trial) -> float:
        try:
            return objective(trial)
        except KeyboardInterrupt:
            if trial.params:
                # With the seed of the first attempt, so that it is the same trial.
                first = {attributes.FIRST_ATTEMPT: trial.number}
                passed_on = {**first, **inherited(trial.user_attrs)}
                with _deaf_to_ctrl_c():
                    trial.study.enqueue_trial(trial.params, user_attrs=passed_on)
            raise

    return wrapped


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A context that a second Ctrl-C does not cut off; only the main thread hears any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
