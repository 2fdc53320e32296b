"""Every error that bs_optuna raises on purpose; each names the value, the bound and the remedy.

BsOptunaError
├── UserError                 a mistake that the user can mend: exit status 2, no traceback
│   ├── ConfigError           a setting: unknown key, wrong type, inverted range
│   ├── TaskError             the task: not found, not a task, data smaller than the batch
│   ├── StudyError            the study: no database, read-only, another search space, disk full
│   ├── WorkerError           worker processes end by an error, or die before any trial
│   └── UntraceableError      the task's step cannot be predicted, only run
├── DivergedError             the loss or a metric of a training is no finite number
├── TrainingError             the task's own code raised an error: status 1, with its traceback
├── ThrashingError            memory runs out again and again
├── RanksError                processes that train together differ, or another one failed
├── MicrobatchDoesNotFitError not even one sample fits into memory
└── StepDoesNotFitError       the optimizer's step does not fit into memory
"""

from __future__ import annotations

from collections.abc import Sequence


EXIT_INTERRUPTED = 130  # of the command and its workers; as a shell has it for Ctrl-C
EXIT_TERMINATED = 143  # of the command; as a shell has it for SIGTERM


class BsOptunaError(Exception):
    """The root of every error that bs_optuna raises on purpose."""


class UserError(BsOptunaError, ValueError):
    """A mistake that the user can mend; the command line prints it and exits with status 2."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of its bounds."""


class TaskError(UserError):
    """A task cannot be found, is no task, or cannot serve the settings."""


class StudyError(UserError):
    """A study cannot be opened or stored, or holds something else than what was asked for."""


class WorkerError(UserError):
    """A worker process ended by an error, or died again and again before any trial."""


class UntraceableError(UserError):
    """A training step cannot be followed without running it."""


class NoTargetError(BsOptunaError, ValueError):
    """A batch holds nothing that a mean could be taken over."""


class DivergedError(BsOptunaError, ArithmeticError):
    """The loss is no finite number any more, or a metric is none.

    Attributes:
        metric: Its name, where the loss is finite.
    """

    def __init__(self, message: str, *, metric: str | None = None) -> None:
        super().__init__(message)
        self.metric = metric


class TrainingError(BsOptunaError, RuntimeError):
    """A training ended by an unexpected error, its cause; as a rule one of the task's own code.

    The command line prints that with its traceback, then this line, and exits with status 1.
    """


class ThrashingError(BsOptunaError, MemoryError):
    """A training loses more time to running out of memory than it may."""


class RanksError(BsOptunaError, RuntimeError):
    """Processes that train one model together differ, or another one of them failed."""


class MicrobatchDoesNotFitError(BsOptunaError, MemoryError):
    """One sample does not fit into memory, so there is nothing left to back off to.

    Attributes:
        sizes_tried: Microbatch sizes that were tried, in order.
        sizes_failed: Those of them that ran out of memory: all, unless the last one was refused for
            a microbatch of a single sample.
        bytes_requested: Size in bytes of the allocation that failed last, where it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        sizes_tried: Sequence[int],
        sizes_failed: Sequence[int] | None = None,
        bytes_requested: int | None,
    ) -> None:
        super().__init__(message)
        self.sizes_tried = tuple(sizes_tried)
        self.sizes_failed = tuple(sizes_tried if sizes_failed is None else sizes_failed)
        self.bytes_requested = bytes_requested


class StepDoesNotFitError(BsOptunaError, MemoryError):
    """The optimizer's step does not fit into memory; it has left no trace, unless partly done.

    Attributes:
        bytes_requested: Size in bytes of the allocation that failed last, where it is known.
        partly: Whether some groups of parameters have been stepped and others not; go on from a
            checkpoint.
    """

    def __init__(self, message: str, *, bytes_requested: int | None, partly: bool = False) -> None:
        super().__init__(message)
        self.bytes_requested = bytes_requested
        self.partly = partly
