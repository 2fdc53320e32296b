"""An error in the task's own code: the same in one process and in workers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from children import run_python
from optuna.trial import TrialState

from bs_optuna.study import open_study


# Its loss raises once a trial is stored, or where it sees the test data, whose targets are 9.
TASK = """
import sqlite3
import torch
from bs_optuna.training import TrainingTask

def a_trial_is_stored():
    query = "SELECT count(*) FROM trials WHERE state = 'COMPLETE'"
    with sqlite3.connect("studies/wrong.db") as connection:
        return connection.execute(query).fetchone()[0] > 0

def loss(outputs, targets):
    if WHEN:
        raise ArithmeticError("my own\\nand more")
    return ((outputs - targets) ** 2).mean()

def task():
    x = torch.linspace(-1, 1, 128)[:, None]
    return TrainingTask(
        name="wrong", model=lambda: torch.nn.Linear(1, 1), loss=loss,
        train_data=(x, 2 * x), valid_data=(x, 2 * x), test_data=(x, 0 * x + 9),
    )
"""


def tune(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "wrong.py").write_text(source)
    return run_python(
        "-m", "bs_optuna.tune", "wrong.py", "--batch-size", "8:16", *arguments, folder=folder
    )


def tune_raising(folder: Path, when: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "studies").mkdir()
    short = ("--budget", "steps=20", "--final-runs", "1")
    return tune(folder, TASK.replace("WHEN", when), *short, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("where", [(), ("--isolate",), ("--workers", "2")], ids=" ".join)
def test_in_a_trial_it_is_shown_with_one_line_that_names_the_trial(
    tmp_path: Path, where: tuple[str, ...]
) -> None:
    when = "torch.is_grad_enabled() and outputs.requires_grad and a_trial_is_stored()"
    run = tune_raising(tmp_path, when, "--trials", "9", *where)
    assert run.returncode == 1, run.stderr
    study = open_study(storage=f"sqlite:///{tmp_path}/studies/wrong.db", name="wrong")
    failed = study.get_trials(states=(TrialState.FAIL,))
    lines = [
        f"error: trial {t.number} (batch_size={t.params['batch_size']}, lr={t.params['lr']:.3g}) "
        "ended by ArithmeticError: my own; its traceback stands above. "
        "Finished trials are kept; mend it, and the same command goes on."
        for t in failed
        if "lr" in t.params  # another worker's may have been interrupted before it had both
    ]
    assert run.stderr.splitlines()[-1] in lines
    assert run.stderr.count("\nerror: ") == 1
    shown = run.stderr.partition("Traceback (most recent call last):")[2]
    assert shown.lstrip().startswith(f'File "{tmp_path}/wrong.py", line')
    assert study.get_trials(states=(TrialState.COMPLETE,))
    if where:  # a study goes on alike, whoever trained in it
        return
    (tmp_path / "wrong.py").write_text(TASK.replace("WHEN", "False"))
    again = subprocess.run(run.args, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "Recommended for wrong" in again.stdout


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_while_it_exits_says_nothing_more(tmp_path: Path) -> None:
    """As its parent does when it has heard of the error; here by the worker, so that it is sure."""
    late = """
import atexit, multiprocessing, os, signal
if multiprocessing.parent_process() is not None:
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)
"""
    run = tune(tmp_path, late + TASK.replace("WHEN", "outputs.requires_grad"), "--isolate")
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("Traceback (most recent call last)") == 1
    assert run.stderr.splitlines()[-1].startswith("error: trial 0 ")
    assert "KeyboardInterrupt" not in run.stderr


@pytest.mark.slow
def test_in_a_final_run_it_is_shown_with_one_line_too(tmp_path: Path) -> None:
    run = tune_raising(tmp_path, "bool((targets == 9).all())", "--trials", "3")
    assert run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: final run 1 of trial ")
    assert "'s setting ended by ArithmeticError: my own; its traceback" in run.stderr
    study = open_study(storage=f"sqlite:///{tmp_path}/studies/wrong.db", name="wrong")
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 3


@pytest.mark.parametrize(
    ("source", "error", "how"),
    [
        ("import torch\nx = y", "NameError: name 'y' is not defined", ()),
        ("def task(:", "SyntaxError: invalid syntax (wrong.py, line 1)", ("--dry-run",)),
        (TASK.replace("torch.nn.Linear(1, 1)", "layer"), "NameError: name 'layer'", ()),
    ],
    ids=["loaded", "read", "model"],
)
def test_before_any_trial_it_is_shown_with_one_line_that_names_the_task(
    tmp_path: Path, source: str, error: str, how: tuple[str, ...]
) -> None:
    run = tune(tmp_path, source, *how)
    assert run.returncode == 1
    assert 'wrong.py", line' in run.stderr
    assert "bs_optuna/" not in run.stderr  # where the task's code was called from
    assert "importlib" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: the set-up of task wrong.py ended by {error}")
    assert last.endswith("mend it, and the same command goes on.")
    assert run.stderr.count("\nerror: ") == 1
