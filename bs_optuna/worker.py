"""A worker process: runs trials of a study, one each time that its parent asks for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType

from bs_optuna.config import StudyConfig
from bs_optuna.errors import EXIT_INTERRUPTED
from bs_optuna.errors import TrainingError
from bs_optuna.errors import UserError
from bs_optuna.forks import end_forks_by_sigterm
from bs_optuna.tracebacks import print_traceback


# How much likelier than its parent a worker is killed when memory is short, in thousandths of all
# the memory there is.
_OOM_SCORE = 200
# In PyTorch's error about a process of a DataLoader.
_KILLED = "is killed by signal: Killed"


def work(config: StudyConfig, checkpoints: Path, pipe: Connection) -> None:
    """The life of a worker process.

    From the pipe it reads True for each trial that it shall run, and False when it is done with.
    It sends pairs: ``"created"``, ``"started"`` or ``"ended"`` with the number of a trial, or
    ``"failed"`` with the one line that says what the user has to mend, or ``"raised"`` with that of
    an error of the task's code, whose traceback it has printed.

    Args:
        config: The settings of the study.
        checkpoints: Folder for the state of running trials.
        pipe: To the parent.
    """
    # The terminal sends Ctrl-C to all of its processes; the parent passes it on, once, as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die)
    # A process that is spawned would spawn its own, such as those of a DataLoader of the task's,
    # which know nothing of a task that was read from a file.
    multiprocessing.set_start_method(None, force=True)  # the system's own
    end_forks_by_sigterm()
    _offer_itself()
    interruption = _Interruption(pipe)
    threading.Thread(target=_outlive_no_parent, args=(interruption,), daemon=True).start()
    try:
        _run_trials(config, checkpoints, pipe, interruption)
    except UserError as error:
        _tell(pipe, "failed", str(error))
    except KeyboardInterrupt:
        # The processes of a DataLoader are ended with this one, of which PyTorch would complain.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if _lost_a_process(error):
            _die(signal.SIGKILL)
        if interruption.asked:
            # What it interrupted was cut in two; the parent queues the trial again.
            sys.exit(EXIT_INTERRUPTED)
        if not isinstance(error, TrainingError):
            raise
        # Here, because tracebacks cannot be sent; the parent adds the line.
        print_traceback(error.__cause__ or error)
        _tell(pipe, "raised", str(error))


def _offer_itself() -> None:
    """Makes Linux kill this process rather than its parent, whose death would end the study."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError, ValueError):  # another system
        score.write_text(str(min(1000, int(score.read_text()) + _OOM_SCORE)))


def _die(number: int, frame: FrameType | None = None) -> None:
    """Ends this process by a signal, and before it those that it has started."""
    for child in multiprocessing.active_children():
        child.kill()
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _lost_a_process(error: BaseException | None) -> bool:
    """Whether an error comes from a process of a DataLoader that was killed."""
    while error is not None:
        if isinstance(error, RuntimeError) and _KILLED in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def set_up_libraries() -> None:
    """Settings of Optuna and PyTorch that the command and its workers share."""
    import optuna
    import torch

    # Its warnings are of trials that failed, with a traceback: the error itself comes anyway.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Numbers too small to matter slow a CPU down tenfold when a network has learned its data.
    torch.set_flush_denormal(True)


def _outlive_no_parent(interruption: _Interruption) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    interruption.orphaned = True
    os.kill(os.getpid(), signal.SIGTERM)


class _Interruption:
    """What SIGTERM means in a trial: KeyboardInterrupt, if it comes from the parent or its end.

    Raised later where it would cut a storing in two. Without a trial there is nothing to queue, and
    the signal ends the process; so it does where somebody else sent it, as any other that kills.

    Args:
        pipe: To the parent, which says False before it sends the signal.
    """

    def __init__(self, pipe: Connection) -> None:
        self.asked = False
        self.orphaned = False  # told apart: the pipe may end a moment after the parent
        self._deferred = False
        self._pipe = pipe

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._is_told():
            _die(number)
        self.asked = True
        self._raise_if_asked()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The context of a trial: it waits for the end; after an error for good.

        Then it is told how the worker ended, and its exit not cut.
        """
        self._deferred = True
        signal.signal(signal.SIGTERM, self)
        yield
        self._deferred = False
        self._raise_if_asked()
        signal.signal(signal.SIGTERM, _die)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A part of that context in which it does not wait.

        The kernel may kill any process of a trial for want of memory; if it was one of a DataLoader
        this one dies of it too, and the trial is tried again.
        """
        self._deferred = False
        try:
            self._raise_if_asked()
            yield
        except TrainingError as error:
            if _lost_a_process(error):
                _die(signal.SIGKILL)
            raise
        finally:
            self._deferred = True

    def _is_told(self) -> bool:
        """Whether the parent has said no, or is gone: in a trial it says nothing else."""
        try:
            return self.orphaned or self._pipe.poll()
        except OSError:
            return True

    def _raise_if_asked(self) -> None:
        if self.asked and not self._deferred:
            raise KeyboardInterrupt


def _run_trials(
    config: StudyConfig, checkpoints: Path, pipe: Connection, interruption: _Interruption
) -> None:
    import torch

    from bs_optuna.study.collecting import imports_left_out
    from bs_optuna.study.storage_errors import named_storage_errors
    from bs_optuna.study.tuning import prepare
    from bs_optuna.study.tuning import storage_of
    from bs_optuna.tasks.loading import load_task

    set_up_libraries()
    # Together they use the cores once; more threads than cores only wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() // config.worker_processes))
    task = load_task(config.task)
    with named_storage_errors(storage_of(config, task)):
        tuning = prepare(config, task, checkpoints=checkpoints)
        with imports_left_out():
            while _is_asked(pipe):
                with interruption.deferred():
                    tuning.run_one(
                        created=lambda trial: _tell(pipe, "created", trial.number),
                        started=lambda trial: _tell(pipe, "started", trial.number),
                        ended=lambda study, trial: _tell(pipe, "ended", trial.number),
                        training=interruption.allowed,
                    )


def _is_asked(pipe: Connection) -> bool:
    """Whether to run one more trial; a parent that is gone wants none."""
    try:
        return bool(pipe.recv())
    except (EOFError, OSError):
        return False


def _tell(pipe: Connection, event: str, what: int | str) -> None:
    try:
        pipe.send((event, what))
    except OSError:  # the parent is gone; the trial is to be queued again, as after Ctrl-C
        raise KeyboardInterrupt from None
