"""Trials in worker processes: one that is killed costs an attempt of a trial, not the study."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait

from optuna.trial import BaseTrial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from bs_optuna.errors import EXIT_INTERRUPTED
from bs_optuna.errors import TrainingError
from bs_optuna.errors import WorkerError
from bs_optuna.sampling import attributes
from bs_optuna.study.tuning import Ended
from bs_optuna.study.tuning import Tuning
from bs_optuna.study.tuning import nothing_fits
from bs_optuna.study.worker_process import WorkerProcess
from bs_optuna.training.attempt import after_death
from bs_optuna.training.attempt import inherited


# So many workers in a row that die before their trial: no other one will get there.
DEATHS_BEFORE_A_TRIAL = 3

Started = Callable[[BaseTrial], None]


def run_in_workers(
    tuning: Tuning,
    target: Callable[[Connection], None],
    *,
    count: int,
    timeout: float | None,
    started: Started,
    ended: Ended,
) -> None:
    """Runs trials in processes of their own until the study has as many as it shall have.

    A worker that a signal kills in the middle of a trial costs one attempt: the trial is stored as
    failed, its setting is queued again with half the microbatch and its last checkpoint, and
    another worker takes the place of the dead one. After `MAX_ATTEMPTS` of them the trial is pruned
    as one that does not fit.

    Args:
        tuning: The study; its objective is not called here.
        target: What a worker process runs, see `bs_optuna.worker.work`; must be picklable.
        count: Worker processes at a time.
        timeout: No trial is started after so many seconds.
        started: Called when a trial has its batch size and learning rate.
        ended: Called after each trial.

    Raises:
        TrainingError: The task's own code raised an error, which its worker has printed.
        WorkerError: A worker ended by an error, or several in a row were killed before any trial.
        KeyboardInterrupt: A person stopped it; the trials that were running are queued again.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pool = _WorkerPool(tuning, target, count=count, deadline=deadline, started=started, ended=ended)
    try:
        pool.run()
    finally:
        pool.shut_down()


@contextmanager
def _uncut() -> Iterator[None]:
    """A context, or a decorator of a function, that Ctrl-C does not cut in two: it is heard after.

    Optuna would log a traceback where it was at its database, and a process half started would be
    lost. Processes that start here inherit that the signal is blocked: it comes to them through us.
    In this one it may still arrive by another thread, such as one of BLAS, that does not block it;
    so it is noted, where ignoring it would lose it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is heard here
        return
    resource_tracker.ensure_running()  # its start would unblock the signal
    noted: list[int] = []
    # In this order, and back in the opposite one: one that comes in between raises nothing that
    # would leave the signal blocked.
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if noted:
            signal.raise_signal(signal.SIGINT)


class _WorkerPool:
    """The workers of one study and what they are at."""

    def __init__(
        self,
        tuning: Tuning,
        target: Callable[[Connection], None],
        *,
        count: int,
        deadline: float | None,
        started: Started,
        ended: Ended,
    ) -> None:
        self._tuning = tuning
        self._target = target
        self._count = count
        self._deadline = deadline
        self._started = started
        self._ended = ended
        self._workers: list[WorkerProcess] = []
        self._deaths = 0  # in a row, before any trial
        self._stopped = False

    def run(self) -> None:
        while self._assign():
            # Both, because a process that it left behind may hold the pipe open.
            ends = [worker.end for worker in self._workers]
            ready = set(wait([*ends, *(worker.pipe for worker in self._workers)]))
            self._attend(ready)

    def shut_down(self) -> None:
        """Ends all workers; what they are at is queued again."""
        for worker in self._workers:
            with suppress(OSError):  # it is dead already
                worker.pipe.send(False)
            if worker.busy:
                worker.process.terminate()
        try:
            for worker in self._workers:
                worker.process.join()
        except KeyboardInterrupt:  # once more: a person does not want to wait
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()
        for worker in self._workers:
            if worker.trial is not None:
                trial = self._trial(worker.trial)
                if trial.state == TrialState.RUNNING:
                    self._fail(trial, "interrupted", inherited(trial.user_attrs))
            worker.close()
        self._workers.clear()

    @_uncut()
    def _assign(self) -> bool:
        """Gives workers as many trials as the study lacks; says whether any is at one."""
        busy = sum(worker.busy for worker in self._workers)
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if not late and not self._stopped:
            idle = [worker for worker in self._workers if not worker.busy]
            lacking = self._tuning.trials - self._tuning.finished - busy
            for _ in range(min(lacking, self._count - busy)):
                worker = idle.pop() if idle else self._start()
                worker.busy = True
                busy += 1
                with suppress(OSError):  # it has just died, as its sentinel will tell
                    worker.pipe.send(True)
        return busy > 0

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess.start(self._target)
        self._workers.append(worker)
        return worker

    @_uncut()
    def _attend(self, ready: Collection[object]) -> None:
        """Hears those that have said something, and handles those that have ended."""
        for worker in list(self._workers):
            ended = worker.end in ready
            if not self._listen(worker) or ended:
                self._handle_exit(worker)

    def _listen(self, worker: WorkerProcess) -> bool:
        """Hears all that the worker has said; False if that was its last word."""
        while True:
            try:
                if not worker.pipe.poll():
                    return True
                event, what = worker.pipe.recv()
            except (EOFError, OSError):  # perhaps in the middle of a word
                return False
            self._hear(worker, event, what)

    def _hear(self, worker: WorkerProcess, event: str, what: int | str) -> None:
        if event == "failed":
            raise WorkerError(what)
        if event == "raised":
            raise TrainingError(what)
        trial = self._trial(int(what))
        if event == "created":
            worker.trial = trial.number
            self._deaths = 0
        elif event == "started":
            self._started(trial)
        else:
            worker.busy, worker.trial = False, None
            self._end(trial)

    def _end(self, trial: FrozenTrial) -> None:
        self._ended(self._tuning.study, trial)
        self._stopped = self._stopped or nothing_fits(self._tuning.study)

    def _handle_exit(self, worker: WorkerProcess) -> None:
        """Puts in order what a process has left that ended by itself."""
        worker.process.join()
        code = worker.process.exitcode or 0
        self._workers.remove(worker)
        worker.close()
        trial = None if worker.trial is None else self._trial(worker.trial)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if code >= 0:
            where = "" if trial is None else f" in trial {trial.number}"
            if trial is not None and trial.state == TrialState.RUNNING:
                self._fail(trial, f"its worker ended with status {code}")
            raise WorkerError(
                f"a worker ended with exit status {code}{where}; what it said stands above. "
                "Mend that; the same command goes on."
            )
        name = _signal_name(-code)
        if trial is None:
            self._count_early_death(name)
        elif trial.state == TrialState.RUNNING:
            again = after_death(trial.number, trial.user_attrs, signal=name)
            self._fail(trial, f"killed by {name} {_place_of_death(trial)}", again)
            self._end(self._trial(trial.number))
        else:  # it died between the end of the trial and saying so
            self._end(trial)

    def _count_early_death(self, name: str) -> None:
        self._deaths += 1
        if self._deaths == DEATHS_BEFORE_A_TRIAL:
            raise WorkerError(
                f"{self._deaths} workers in a row were killed by {name} before any trial; "
                "look at what the task does when it is loaded, or give it more memory."
            )

    def _fail(
        self, trial: FrozenTrial, reason: str, again: dict[str, object] | None = None
    ) -> None:
        """Ends a trial that no process runs any more, and queues its setting if it shall be."""
        study, database = self._tuning.study, self._tuning.database
        study_id = database.get_study_id_from_name(study.study_name)
        trial_id = database.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        database.set_trial_user_attr(trial_id, attributes.PRUNE_REASON, reason)
        if again is not None and trial.params:
            study.enqueue_trial(trial.params, user_attrs=again)
        study.tell(trial.number, state=TrialState.FAIL)

    def _trial(self, number: int) -> FrozenTrial:
        return self._tuning.study.get_trials(deepcopy=False)[number]


def _place_of_death(trial: FrozenTrial) -> str:
    if piece := trial.user_attrs.get(attributes.EVALUATION_TRIED):
        return f"evaluating in pieces of {piece}"
    if (size := trial.user_attrs.get(attributes.MICROBATCH_SIZE)) is not None:
        return f"with microbatch_size={size}"
    return "before it trained"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
