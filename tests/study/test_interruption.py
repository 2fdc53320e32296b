"""Ctrl-C in a real process: the trial is kept as interrupted, and its setting is run once more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.event import listen
from sqlalchemy.event import remove

from bs_optuna.config import StudyConfig
from bs_optuna.sampling import attributes
from bs_optuna.study import open_study
from bs_optuna.study import requeue_interrupted
from bs_optuna.study.tuning import prepare
from bs_optuna.study.workers import run_in_workers
from bs_optuna.tasks import digits
from bs_optuna.worker import work


WORKER = """
from bs_optuna.study import open_study, requeue_interrupted

def objective(trial):
    trial.suggest_float("x", 0.0, 1.0)
    print("training", flush=True)
    sys.stdin.readline()

study = open_study(storage=sys.argv[1], name="s")
try:
    study.optimize(requeue_interrupted(objective))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
def test_what_several_interrupted_workers_ran_is_run_once_more(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    workers = [start(WORKER, url) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "training\n"
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    for worker in workers:
        printed, errors = worker.communicate(timeout=120)
        assert printed == "interrupted\n", errors
    study = open_study(storage=url, name="s")
    interrupted = {trial.params["x"] for trial in study.get_trials(states=[TrialState.FAIL])}
    assert len(interrupted) == 3
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=4)
    done = [trial.params["x"] for trial in study.get_trials(states=[TrialState.COMPLETE])]
    assert set(done[:3]) == interrupted
    assert done[3] not in interrupted


def test_a_trial_that_is_queued_again_keeps_the_seed_of_its_first_attempt(tmp_path: Path) -> None:
    study = open_study(storage=f"sqlite:///{tmp_path / 'study.db'}", name="s")

    def interrupted(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        raise KeyboardInterrupt

    for _ in range(2):  # the second time it is the trial that was queued
        with pytest.raises(KeyboardInterrupt):
            study.optimize(requeue_interrupted(interrupted), n_trials=1)
        (waiting,) = study.get_trials(states=[TrialState.WAITING])
        assert waiting.user_attrs[attributes.FIRST_ATTEMPT] == 0


def test_a_mistake_is_not_queued_again(tmp_path: Path) -> None:
    study = open_study(storage=f"sqlite:///{tmp_path / 'study.db'}", name="s")

    def mistaken(trial: optuna.Trial) -> float:
        return 1.0 / int(trial.suggest_float("x", 0.0, 0.5))

    with pytest.raises(ZeroDivisionError):
        study.optimize(requeue_interrupted(mistaken), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_a_second_ctrl_c_does_not_cut_the_queueing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(storage=f"sqlite:///{tmp_path / 'study.db'}", name="s")
    enqueue = optuna.Study.enqueue_trial

    def impatient(self: optuna.Study, *arguments: object, **settings: object) -> None:
        signal.raise_signal(signal.SIGINT)
        enqueue(self, *arguments, **settings)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0.0, 1.0)
        signal.raise_signal(signal.SIGINT)
        return 0.0

    monkeypatch.setattr(optuna.Study, "enqueue_trial", impatient)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(requeue_interrupted(objective), n_trials=1)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert len(waiting) == 1
    with pytest.raises(KeyboardInterrupt):  # heard again
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_before_the_first_parameter_queues_nothing(tmp_path: Path) -> None:
    study = open_study(storage=f"sqlite:///{tmp_path / 'study.db'}", name="s")

    def interrupted(_trial: optuna.Trial) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.optimize(requeue_interrupted(interrupted), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


class Interrupting:
    """A target that interrupts its own process when it is sent to a new one."""

    def __reduce__(self) -> tuple[type[Interrupting], tuple[()]]:
        os.kill(os.getpid(), signal.SIGINT)
        return Interrupting, ()

    def __call__(self, pipe: Connection) -> None:
        pipe.recv()


@pytest.fixture(params=["alone", "beside another thread"])
def _company(request: pytest.FixtureRequest) -> Iterator[None]:
    """A thread that does not block the signal, as those of BLAS: the system may give it to that."""
    done = threading.Event()
    if request.param != "alone":
        threading.Thread(target=done.wait).start()
    yield
    done.set()


@pytest.mark.usefixtures("_company")
def test_an_interruption_while_a_worker_starts_is_not_lost(tmp_path: Path) -> None:
    config = StudyConfig(storage=f"sqlite:///{tmp_path / 'study.db'}", budget="steps=1")
    tuning = prepare(config, digits.task())
    with pytest.raises(KeyboardInterrupt):
        run_in_workers(
            tuning,
            Interrupting(),
            count=1,
            timeout=None,
            started=lambda trial: None,
            ended=lambda study, trial: None,
        )
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert tuning.study.get_trials() == []


def parent_of_a_worker(config: StudyConfig, folder: Path, pipe: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=work, args=(config, folder, pipe)).start()
    signal.pause()


@pytest.mark.slow
def test_a_worker_queues_its_trial_though_the_pipe_outlives_its_parent(tmp_path: Path) -> None:
    # The system closes what a dead process held one by one, the pipe perhaps last.
    url = f"sqlite:///{tmp_path / 'study.db'}"
    config = StudyConfig(storage=url, budget="samples=1e7", isolate=True)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    parent = context.Process(target=parent_of_a_worker, args=(config, tmp_path, there))
    parent.start()
    there.close()
    here.send(True)
    assert [here.recv()[0], here.recv()[0]] == ["created", "started"]
    parent.kill()
    with pytest.raises(EOFError):  # no process holds the other end any more
        here.recv()
    first, again = open_study(storage=url, name="digits").get_trials()
    assert (first.state, again.state) == (TrialState.FAIL, TrialState.WAITING)
    assert again.system_attrs["fixed_params"] == first.params


@dataclass(frozen=True)
class Asking:
    """A target that begins a trial and tells its parent, after which a file says so."""

    url: str
    file: str

    def __call__(self, pipe: Connection) -> None:
        pipe.recv()
        number = open_study(storage=self.url, name="digits").ask().number
        Path(self.file).touch()
        pipe.send(("created", number))
        signal.pause()


@pytest.mark.parametrize("moment", ["before any trial", "when a trial is heard of"])
def test_an_interruption_while_the_parent_reads_the_study_leaves_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    told = tmp_path / "told"
    tuning = prepare(StudyConfig(storage=url, budget="steps=1"), digits.task())
    assert isinstance(tuning.database, RDBStorage)
    if moment == "before any trial":
        told.touch()

    def interrupt(_connection: object) -> None:
        if told.exists():
            told.unlink()
            os.kill(os.getpid(), signal.SIGINT)

    optuna.logging.enable_propagation()
    listen(tuning.database.engine, "commit", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_workers(
                tuning,
                Asking(url, str(told)),
                count=1,
                timeout=None,
                started=lambda trial: None,
                ended=lambda study, trial: None,
            )
    finally:
        remove(tuning.database.engine, "commit", interrupt)
        optuna.logging.disable_propagation()
    assert not caplog.records
    states = [trial.state for trial in tuning.study.get_trials()]
    assert states == ([] if moment == "before any trial" else [TrialState.FAIL])
