"""Several real processes on one study: they start together, lose nothing, die, are replaced."""

from __future__ import annotations

import collections
import contextlib
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from bs_optuna.study import open_study


Start = Callable[..., "subprocess.Popen[str]"]

DEADLINE_S = 120
WORKERS = 4

# Arguments: storage, number of trials. Waits for a line, so that all workers begin at once.
WORKER = """
from bs_optuna.study import open_study

print("ready", flush=True)
sys.stdin.readline()
study = open_study(storage=sys.argv[1], name="shared")

def objective(trial):
    value = trial.suggest_float("x", 0.0, 1.0)
    trial.report(value, 1)
    trial.set_user_attr("worker", sys.argv[2])
    return value

study.optimize(objective, n_trials=int(sys.argv[3]))
"""

# Waits inside of its first trial, once its parameters are stored.
STUCK = """
from bs_optuna.study import open_study

def objective(trial):
    trial.suggest_float("x", 0.0, 1.0)
    print("training", flush=True)
    sys.stdin.readline()

open_study(storage=sys.argv[1], name="shared", heartbeat_interval=1).optimize(objective)
"""


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.communicate()[1]
    return line


def kill_in_trial(worker: subprocess.Popen[str], path: Path) -> None:
    """Kill a worker in its trial, once the trial's first sign of life is stored."""
    assert read_line(worker) == "training"
    question = (
        "SELECT COUNT(*) FROM trials LEFT JOIN trial_heartbeats USING (trial_id) "
        "WHERE state = 'RUNNING' AND heartbeat IS NULL"
    )
    deadline = time.monotonic() + DEADLINE_S
    with contextlib.closing(sqlite3.connect(path)) as database:
        while database.execute(question).fetchone() != (0,):
            assert time.monotonic() < deadline
    worker.send_signal(signal.SIGKILL)
    worker.wait(timeout=DEADLINE_S)


def run_together(start: Start, storage: str, *, trials: int) -> None:
    """Run the workers, each with so many trials, and expect all of them to end well."""
    workers = [start(WORKER, storage, str(i), str(trials)) for i in range(WORKERS)]
    for worker in workers:
        assert read_line(worker) == "ready"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=DEADLINE_S)
        assert worker.returncode == 0, errors


@pytest.fixture(params=["sqlite", "postgresql", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage that does not exist yet, or an empty database on a server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'studies' / 'shared.db'}"
    if request.param == "journal":
        return str(tmp_path / "studies" / "shared.journal")
    server: str = request.getfixturevalue("postgresql")
    name = f"test_{abs(hash(str(tmp_path)))}"
    engine = sqlalchemy.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}/{name}"


@pytest.mark.slow
def test_workers_that_start_together_make_one_study_and_lose_nothing(
    start: Start, storage: str
) -> None:
    run_together(start, storage, trials=6)
    study = open_study(storage=storage, name="shared")
    trials = study.trials
    assert [trial.number for trial in trials] == list(range(WORKERS * 6))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert all(trial.intermediate_values == {1: trial.value} for trial in trials)
    by_worker = collections.Counter(trial.user_attrs["worker"] for trial in trials)
    assert by_worker == {str(i): 6 for i in range(WORKERS)}


@pytest.mark.slow
def test_enqueued_trials_run_once(start: Start, storage: str) -> None:
    study = open_study(storage=storage, name="shared")
    queued = [i / 64 for i in range(WORKERS * 12)]
    for x in queued:
        study.enqueue_trial({"x": x})
    run_together(start, storage, trials=12)
    trials = open_study(storage=storage, name="shared").trials
    assert sorted(trial.params["x"] for trial in trials) == queued
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


@pytest.mark.slow
def test_a_trial_whose_worker_was_killed_is_run_again(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    storage = f"sqlite:///{path}"
    kill_in_trial(start(STUCK, storage), path)
    study = open_study(storage=storage, name="shared", heartbeat_interval=1)
    (killed,) = study.trials
    assert killed.state == TrialState.RUNNING

    def stop_at_retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if "failed_trial" in trial.system_attrs:
            study.stop()

    study.optimize(
        lambda trial: trial.suggest_float("x", 0.0, 1.0),
        timeout=DEADLINE_S,
        callbacks=[stop_at_retry],
    )
    assert study.trials[0].state == TrialState.FAIL
    again = [t for t in study.trials if t.params == killed.params and t.number != killed.number]
    assert [t.state for t in again] == [TrialState.COMPLETE]


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_is_given_up_after_two_retries(
    start: Start, tmp_path: Path
) -> None:
    path = tmp_path / "shared.db"
    for _ in range(3):
        kill_in_trial(start(STUCK, f"sqlite:///{path}"), path)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            # The last sign of life lies a day back: no need to wait for it.
            database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 day')")
    study = open_study(storage=f"sqlite:///{path}", name="shared")
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=1)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL] * 3 + [TrialState.COMPLETE]
    same = [trial.params == study.trials[0].params for trial in study.trials]
    assert same == [True, True, True, False]
