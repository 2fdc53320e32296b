"""What a person sees while a study runs: a bar on a terminal, a line per trial elsewhere."""

from __future__ import annotations

import datetime
import time
from types import TracebackType
from typing import Literal

import optuna
from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

from bs_optuna.sampling import attributes


Verbosity = Literal["quiet", "normal", "verbose"]


class TrialProgress:
    """Shows the trial that runs, the best so far and the time left until the last one.

    Args:
        console: Where to show it.
        total: Finished trials that the study shall have.
        finished: Finished trials that it has.
        verbosity: ``"quiet"`` shows nothing, ``"verbose"`` a line per trial beside the bar.
    """

    def __init__(
        self, console: Console, *, total: int, finished: int, verbosity: Verbosity
    ) -> None:
        self._console = console
        self._begin = time.perf_counter()
        self._ran = 0
        self._left = total - finished
        self._lines = verbosity == "verbose" or (verbosity == "normal" and not console.is_terminal)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8),  # all of it within 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=verbosity == "quiet" or not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, completed=finished, best="")

    def __enter__(self) -> TrialProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def started(self, trial: BaseTrial) -> None:
        """A trial has its settings."""
        self._bar.update(self._task, description=f"trial {trial.number}: {_setting(trial.params)}")

    def ended(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A trial is over."""
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            self._bar.advance(self._task)
            self._ran += 1
            self._left -= 1
        best = _best(study)
        self._bar.update(self._task, best=best)
        if self._lines:
            self._console.print(
                f"trial {trial.number}: {_setting(trial.params)}{_cut(trial)}, {_outcome(trial)}; "
                f"{best}{self._time_left()}",
                highlight=False,
                soft_wrap=True,
            )

    def _time_left(self) -> str:
        if self._left <= 0 or self._ran == 0:
            return ""
        seconds = (time.perf_counter() - self._begin) / self._ran * self._left
        # The final runs come after them, and last as long as complete trials.
        return f"; about {datetime.timedelta(seconds=round(seconds))} of trials left"


def _setting(params: dict[str, object]) -> str:
    return f"batch {params.get('batch_size', '?')}, lr {params.get('lr', float('nan')):.2e}"


def _cut(trial: FrozenTrial) -> str:
    """Into how many microbatches its batches were cut in the end, where they were."""
    steps = trial.user_attrs.get(attributes.ACCUMULATION_STEPS, 1)
    if steps == 1:
        return ""
    return f", microbatch {trial.user_attrs[attributes.MICROBATCH_SIZE]} x {steps}"


def _outcome(trial: FrozenTrial) -> str:
    lasted = 0.0 if trial.duration is None else trial.duration.total_seconds()
    seconds = trial.user_attrs.get(attributes.SECONDS, lasted)
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.4g} in {seconds:.1f} s"
    reason = trial.user_attrs.get(attributes.PRUNE_REASON, "")
    return f"{trial.state.name.lower()} after {seconds:.1f} s ({reason or 'no reason stored'})"


def _best(study: optuna.Study) -> str:
    try:
        best = study.best_trial
    except ValueError:  # none is complete
        return "no result yet"
    return f"best {best.value:.4g} (trial {best.number})"
